"""Several runs side by side: ``fedsim compare`` prints the tables and writes a page with overlaid curves.

Runs that differ in nothing but their seed are one group and are summed up as mean ± standard deviation.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import runs
from fedsim.report.figures import Series
from fedsim.report.numbers import ABSENT, duration, number, percent, size
from fedsim.report.page import Chart, Table, curve_chart, leaves, render
from fedsim.report.results import Results, curve, results
from fedsim.runs import RunFolder

_LABELS = ("name", "output")  # say what a run is called and where it lies, not what it does
# With more differing settings than this a legend has the names of the runs, if they differ, and a table of runs has
# the settings after the outcome.
MAX_LABEL_KEYS = 4


@dataclass(frozen=True)
class Run:
    """One run: where it lies, what came out, every config leaf under its dotted key, and its group's number."""

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
    """Runs that differ only in ``seed``. The statistics are over its finished runs; None if there is none.

    label: the group in a legend. settings: the keys by which the groups differ, as text.
    seeds: of all its runs, in order; the same twice means runs that are not independent.
    rounds_to_target: over the runs that reached it, so its n may be less than that of the others.
    """

    label: str
    settings: dict[str, str]
    seeds: tuple[Any, ...]
    accuracy: Statistic | None
    best_accuracy: Statistic | None
    loss: Statistic | None
    rounds_to_target: Statistic | None
    traffic: Statistic | None
    seconds: Statistic | None


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given, the config keys in which they differ, and their groups."""

    runs: tuple[Run, ...]
    differing: tuple[str, ...]
    groups: tuple[Group, ...]


def compare(folders: list[RunFolder]) -> Comparison:
    """Read the runs and sort them into groups.

    Raises:
        ValueError: no folders.
        DataError: a file of a run is damaged.
    """
    if not folders:
        raise ValueError("folders must hold at least one run, got none")
    settings = [{k: v for k, v in leaves(f.config()).items() if k not in _LABELS} for f in folders]
    keys = {key: None for own in settings for key in own}  # in order of first appearance
    differing = tuple(key for key in keys if len({_written(own, key) for own in settings}) > 1)
    marks = [tuple(_written(own, key) for key in differing if key != "seed") for own in settings]
    order = {mark: i for i, mark in enumerate(dict.fromkeys(marks))}
    compared = tuple(
        Run(folder.path.resolve().name, results(folder), own, order[mark])
        for folder, own, mark in zip(folders, settings, marks, strict=True)
    )
    members = [[run for run in compared if run.group == i] for i in range(len(order))]
    named = len(differing) > MAX_LABEL_KEYS and len({own[0].results.name for own in members}) == len(members)
    return Comparison(compared, differing, tuple(_group(own, differing, named) for own in members))


def _written(settings: dict[str, Any], key: str) -> str:
    """A value as text that tells 1 from 1.0, true from "true", and null from absent."""
    return json.dumps(settings[key], default=str) if key in settings else ""


def _group(members: Sequence[Run], differing: Sequence[str], named: bool) -> Group:
    own = members[0].settings
    shown = {key: _shown(own, key) for key in differing if key != "seed"}
    label = "" if named else ", ".join(f"{key}={text}" for key, text in shown.items() if key in own)
    ended = [run.results for run in members if run.results.status == "finished"]
    return Group(
        label=label or members[0].results.name,
        settings=shown,
        seeds=tuple(run.settings.get("seed") for run in members),
        accuracy=_statistic(r.final.accuracy for r in ended),
        best_accuracy=_statistic(r.best.accuracy for r in ended),
        loss=_statistic(r.final.loss for r in ended),
        rounds_to_target=_statistic(r.rounds_to_target for r in ended),
        traffic=_statistic(r.traffic for r in ended),
        seconds=_statistic(r.seconds for r in ended),
    )


def _statistic(values: Iterable[Any]) -> Statistic | None:
    present = [float(v) for v in values if v is not None]
    if not present:
        return None
    std = statistics.stdev(present) if len(present) > 1 else None
    return Statistic(statistics.fmean(present), std, len(present))


# ---------------------------------------------------------------- as text


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """One line per run, column title -> text, every line with the same columns."""
    with_target = any(run.results.target is not None for run in comparison.runs)
    return [_row(run, comparison.differing, with_target) for run in comparison.runs]


def _row(run: Run, differing: Sequence[str], with_target: bool) -> dict[str, str]:
    found = run.results
    settings = {key: _shown(run.settings, key) for key in differing}
    outcome = {
        "rounds": number(len(found.rounds)),
        "accuracy": percent(found.final.accuracy),
        "best accuracy": percent(found.best.accuracy),
        **({"rounds to target": _to_target(found)} if with_target else {}),
        "up": size(found.bytes_up),
        "down": size(found.bytes_down),
        "time": duration(found.seconds),
    }
    first, then = (settings, outcome) if len(settings) <= MAX_LABEL_KEYS else (outcome, settings)
    return {"run": run.folder, "status": found.status} | first | then


def _to_target(found: Results) -> str:
    if found.target is None:
        return ABSENT
    if found.rounds_to_target is None:
        return "not reached" if found.status == "finished" else ABSENT
    return number(found.rounds_to_target)


def _shown(settings: dict[str, Any], key: str) -> str:
    """A setting as YAML would have it; a dash if this run has no such key."""
    if key not in settings:
        return ABSENT
    value = settings[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)


def group_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One line per group, column title -> text, values as mean ± standard deviation."""
    with_target = any(group.rounds_to_target for group in comparison.groups)
    return [_group_row(group, with_target) for group in comparison.groups]


def _group_row(group: Group, with_target: bool) -> dict[str, str]:
    row = {
        **group.settings,
        "seeds": ", ".join(str(seed) for seed in group.seeds),
        "n": str(group.accuracy.n if group.accuracy else 0),
        "accuracy": _spread(group.accuracy, percent),
        "best accuracy": _spread(group.best_accuracy, percent),
        "loss": _spread(group.loss, _two_digits, number),
    }
    if with_target:
        reached = group.rounds_to_target
        row["rounds to target"] = _spread(reached, _two_digits, number) + (f" (n = {reached.n})" if reached else "")
    return row | {"traffic": _spread(group.traffic, size), "time": _spread(group.seconds, duration)}


def _two_digits(value: float) -> str:
    return f"{value:.2g}"


def _spread(
    value: Statistic | None, of_std: Callable[[float], str], of_mean: Callable[[float], str] | None = None
) -> str:
    """Mean ± deviation, with the unit once where both have the same."""
    if value is None:
        return ABSENT
    mean = (of_mean or of_std)(value.mean)
    if value.std is None:
        return mean
    std = of_std(value.std)
    figure, _, unit = mean.partition(" ")
    return f"{figure if std.endswith(f' {unit}') else mean} ± {std}"


# ---------------------------------------------------------------- as a page


def write(folders: list[RunFolder], path: Path) -> Path:
    """Write the comparison as one self-contained page; returns ``path``.

    Raises:
        ValueError: no folders.
        DataError: a file of a run is damaged.
    """
    runs.write_bytes(path, page(compare(folders)))
    return path


def page(comparison: Comparison) -> bytes:
    """The page; the same comparison gives the same bytes."""
    grouped = len(comparison.groups) < len(comparison.runs)
    return render(
        "compare.html",
        title=f"{len(comparison.runs)} runs compared",
        runs=_table("Runs", rows(comparison)),
        groups=_table("Over seeds", group_rows(comparison)) if grouped else None,
        words=("run", "status", "seeds", *comparison.differing),
        repeated=any(len(set(group.seeds)) < len(group.seeds) for group in comparison.groups),
        unfinished=sum(run.results.status != "finished" for run in comparison.runs),
        differing=comparison.differing,
        charts=[
            _overlay(comparison, "Accuracy by round", "accuracy", "round"),
            _overlay(comparison, "Accuracy by traffic", "accuracy", "bytes"),
            _overlay(comparison, "Loss by round", "loss", "round"),
            _overlay(comparison, "Loss by traffic", "loss", "bytes"),
        ],
    )


def _table(title: str, lines: Sequence[dict[str, str]]) -> Table:
    return Table(title, tuple(lines[0]), tuple(tuple(line.values()) for line in lines))


def _overlay(comparison: Comparison, title: str, field: str, against: str) -> Chart:
    """One line per run; the runs of a group share colour, dashes and legend."""
    series = [
        Series(comparison.groups[run.group].label, *curve(run.results, field, against), number=run.group)
        for run in comparison.runs
    ]
    targets = {run.results.target for run in comparison.runs}
    target = targets.pop() if field == "accuracy" and len(targets) == 1 else None
    return curve_chart(title, series, x=against, y=field, fraction=field == "accuracy", target=target)
