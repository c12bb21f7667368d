"""Runs sorted into groups: runs of one kind that differ in nothing but their seed are one group.

What a group comes to is a mean and a standard deviation over its finished runs.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.report.numbers import ABSENT
from fedsim.report.page import leaves
from fedsim.report.results import Results, results
from fedsim.runs import RunFolder

_LABELS = ("name", "output")  # say what a run is called and where it lies, not what it does
LABEL_VALUE = 24  # characters of a value in a label


@dataclass(frozen=True)
class Run:
    """One run: where it lies, what came out, its kind and every config leaf by dotted key, its group's number."""

    folder: str
    results: Results
    settings: dict[str, Any]
    group: int


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (divisor n - 1) of n values; ``std`` is None for n = 1."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Group:
    """Runs that differ only in ``seed``. The statistics are over ``finished``; None if there is none.

    label: the group in a legend, no two alike. settings: the keys by which the groups differ, as text.
    seeds: of all its runs, in order.
    rounds_to_target, bytes_to_target: over the runs that reached it, so their n may be less than that of the others.
    sparsity: over the runs that were pruned.
    """

    label: str
    settings: dict[str, str]
    seeds: tuple[Any, ...]
    finished: tuple[Results, ...]
    accuracy: Statistic | None
    best_accuracy: Statistic | None
    loss: Statistic | None
    rounds_to_target: Statistic | None
    bytes_to_target: Statistic | None
    sparsity: Statistic | None
    traffic: Statistic | None
    seconds: Statistic | None


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given, the settings in which they differ, and their groups."""

    runs: tuple[Run, ...]
    differing: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def grouped(self) -> bool:
        """Whether any group has more than one run."""
        return len(self.groups) < len(self.runs)


def compare(folders: Sequence[RunFolder]) -> Comparison:
    """Read the runs and sort them into groups. A folder given twice counts once.

    Raises:
        ValueError: no folders.
        DataError: a file of a run is damaged.
    """
    if not folders:
        raise ValueError("folders must hold at least one run, got none")
    places: dict[Path, RunFolder] = {}
    for folder in folders:
        places.setdefault(folder.path.resolve(), folder)
    folders = list(places.values())
    found = [results(folder) for folder in folders]
    settings = [_settings(folder, own.kind) for folder, own in zip(folders, found, strict=True)]
    keys = {key: None for own in settings for key in own}  # in order of first appearance
    differing = tuple(key for key in keys if len({_written(own, key) for own in settings}) > 1)
    marks = [tuple(_written(own, key) for key in differing if key != "seed") for own in settings]
    order = {mark: i for i, mark in enumerate(dict.fromkeys(marks))}
    compared = tuple(
        Run(folder.path.resolve().name, what, own, order[mark])
        for folder, what, own, mark in zip(folders, found, settings, marks, strict=True)
    )
    members = [[run for run in compared if run.group == i] for i in range(len(order))]
    by = [key for key in differing if key != "seed"]
    groups = [_group(own, by, label) for own, label in zip(members, _labels(members, by), strict=True)]
    return Comparison(compared, differing, tuple(groups))


def _settings(folder: RunFolder, kind: str) -> dict[str, Any]:
    return {"kind": kind} | {key: value for key, value in leaves(folder.config()).items() if key not in _LABELS}


def _written(settings: dict[str, Any], key: str) -> str:
    """A value as text that tells 1 from 1.0, true from "true", and null from absent."""
    return json.dumps(settings[key], default=str) if key in settings else ""


def _group(members: Sequence[Run], by: Sequence[str], label: str) -> Group:
    ended = tuple(run.results for run in members if run.results.status == "finished")
    return Group(
        label=label,
        settings={key: shown(members[0].settings, key) for key in by},
        seeds=tuple(run.settings.get("seed") for run in members),
        finished=ended,
        accuracy=_statistic(r.final.accuracy for r in ended),
        best_accuracy=_statistic(r.best.accuracy for r in ended),
        loss=_statistic(r.final.loss for r in ended),
        rounds_to_target=_statistic(r.rounds_to_target for r in ended),
        bytes_to_target=_statistic(r.bytes_to_target for r in ended),
        sparsity=_statistic(r.sparsity for r in ended),
        traffic=_statistic(r.traffic for r in ended),
        seconds=_statistic(r.seconds for r in ended),
    )


def _statistic(values: Iterable[Any]) -> Statistic | None:
    present = [float(v) for v in values if v is not None]
    if not present:
        return None
    std = statistics.stdev(present) if len(present) > 1 else None
    return Statistic(statistics.fmean(present), std, len(present))


def shown(settings: dict[str, Any], key: str) -> str:
    """A setting as YAML would have it; a dash if there is no such key."""
    if key not in settings:
        return ABSENT
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


# ---------------------------------------------------------------- labels


def _labels(members: Sequence[Sequence[Run]], by: Sequence[str]) -> list[str]:
    """The name that the runs of a group share, if no other group has it; otherwise the settings, made short."""
    names = [{run.results.name for run in own} for own in members]
    if len(set().union(*names)) == sum(map(len, names)) == len(members):
        return [name for (name,) in names]
    short = _short_keys(by)
    bare = f"no {', '.join(short.values())}" if by else "all runs"
    labels = []
    for first, *_ in members:
        own = {short[key]: _short(shown(first.settings, key)) for key in by if key in first.settings}
        labels.append(", ".join(f"{key}={value}" for key, value in own.items()) or bare)
    often = Counter(labels)
    return [label if often[label] == 1 else f"{label} ({i})" for i, label in enumerate(labels, 1)]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The shortest end of each key that is the end of no other: ``strategy`` for strategy.name, ``lr``.

    The seed is never a setting that tells groups apart, so no other key is shortened to ``seed``.
    """
    parts = {key: key.removesuffix(".name").split(".") for key in keys}
    ends = Counter(end for own in parts.values() for end in _ends(own))
    return {
        key: next((end for end in _ends(own) if ends[end] == 1 and end != "seed" and not end.isdigit()), key)
        for key, own in parts.items()
    }


def _ends(parts: Sequence[str]) -> list[str]:
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]


def _short(value: str) -> str:
    """The end of a long value: that is where two paths differ."""
    return value if len(value) <= LABEL_VALUE else "…" + value[1 - LABEL_VALUE :]
