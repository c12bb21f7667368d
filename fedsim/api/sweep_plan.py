"""What a sweep is to run: which keys are axes, their combinations, and whether each of these is a config."""

import collections.abc
import itertools
import json
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import RootModel

from fedsim.api import folders
from fedsim.config import load as config_files
from fedsim.config import read
from fedsim.config.components import factory_of, model_of
from fedsim.config.foreign import importable
from fedsim.config.schema import Config, Data, Section, Train, default_name
from fedsim.config.tables import KINDS, Kind
from fedsim.errors import ConfigError

MAX_RUNS = 10_000  # a slip of the pen makes more than anybody would want
NAME_LENGTH, VALUE_LENGTH = 100, 40  # characters of a folder's name, and of a value in it
_NOT_SWEPT = ("name", "output")  # say what a run is called and where it lies, not what it does
_SECTIONS: dict[str, type[Section]] = {"": Config, "data": Data, "train": Train}
_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence)


@dataclass(frozen=True)
class Combination:
    """One run of a sweep. name: of its folder. values: of the axes, by dotted key."""

    name: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs.

    base: the config, with what it extends. fixed: changes for every run. axes: dotted key -> values, in order.
    beside: where the config lies. alone: runs of the local engine that leave ``engine.workers`` open get one process.
    """

    base: dict[str, Any]
    fixed: dict[str, Any]
    axes: dict[str, list[Any]]
    beside: Path
    alone: bool

    @property
    def name(self) -> str:
        """What all its runs are called."""
        return str(self.fixed.get("name", self.base.get("name")))

    @property
    def output(self) -> Path:
        """The folder of its folder."""
        default = Config.model_fields["output"].default
        return Path(self.fixed.get("output", self.base.get("output", default))).expanduser()

    def combinations(self) -> list[Combination]:
        """The product of the axes; the last one varies fastest."""
        short = short_keys(list(self.axes))
        width = max(2, len(str(math.prod(map(len, self.axes.values())))))
        found = []
        for number, values in enumerate(itertools.product(*self.axes.values()), 1):
            own = dict(zip(self.axes, values, strict=True))
            told = "-".join(f"{_safe(short[key])}={_safe(text(value))}" for key, value in own.items())
            found.append(Combination(f"{number:0{width}}-{told}"[:NAME_LENGTH].rstrip("-_=."), own))
        return found

    def config(self, combination: Combination) -> Config:
        """The checked config of one run.

        Raises:
            ConfigError: with every problem found.
        """
        found = config_files.load(self.base, {**self.fixed, **combination.values})
        if self.alone and found.engine.name == "local" and found.engine.params().get("workers") == "auto":
            return found.model_copy(update={"engine": found.engine.model_copy(update={"workers": 1})})
        return found


def plan(config: str | Path | Mapping[str, Any], changes: Mapping[str, Any], *, alone: bool) -> Plan:
    """Sort the changes into axes and others, and check every combination.

    Args:
        config: path of a YAML file, or the same as a mapping.
        changes: dotted key -> value. A list is an axis, unless the key itself takes a list; there a list of lists is.
        alone: see :class:`Plan`.

    Raises:
        ConfigError: with every problem, and the combination that has it.
    """
    beside, problems = folders.folder_of(config).resolve(), list[str]()
    raw = config if isinstance(config, Mapping) else read.read(Path(config))
    base = read.plain(raw, "", problems)
    given = {key: read.plain(list(v) if isinstance(v, range) else v, key, problems) for key, v in changes.items()}
    if problems:
        raise ConfigError(problems)
    with importable(beside):
        axes = {key: value for key, value in given.items() if _is_axis(key, value, base, given)}
        _check_axes(axes, given)
        fixed = {key: value for key, value in given.items() if key not in axes}
        made = Plan(base, fixed, axes, beside, alone)
        _check_combinations(made)
        first = {**fixed, **made.combinations()[0].values}
        name = config_files.load(config, first).name  # a file without one is named after itself
    return Plan({"name": name, **base}, fixed, axes, beside, alone)


# ---------------------------------------------------------------- axes


def _is_axis(key: str, value: Any, base: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    if not isinstance(value, list):
        return False
    return not _takes_list(key, base, given) or any(isinstance(one, list) for one in value)


def _takes_list(key: str, base: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a value of this key is a list: it has one in the config, or its type says so."""
    if isinstance(read.at(base, key.split(".")), list):
        return True
    above, _, last = key.rpartition(".")
    for kind in KINDS.values():
        if kind.path == above:
            return any(_key_takes_list(name, last, kind) for name in _names(above, base, given))
    section = _SECTIONS.get(above)
    field = section.model_fields.get(last) if section else None
    return field is not None and _is_list(field.annotation)


def _names(path: str, base: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """Every component that a run of the sweep may have there."""
    found = [read.at(base, path.split(".")) or default_name(path)]
    for value in (given.get(path), given.get(f"{path}.name")):
        found += value if isinstance(value, list) else [value]
    names = (one.get("name") if isinstance(one, Mapping) else one for one in found)
    return {name for name in names if isinstance(name, str)}


def _key_takes_list(name: str, key: str, kind: Kind) -> bool:
    try:
        field = model_of(name, factory_of(name, kind), kind).model_fields.get(key)
    except (KeyError, ValueError):  # there is no such component, as the check of the config says
        return False
    return field is not None and _is_list(field.annotation)


def _is_list(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, RootModel):
        return _is_list(annotation.model_fields["root"].annotation)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType, Annotated):
        return any(map(_is_list, get_args(annotation)))
    return annotation in _LISTS or origin in _LISTS


def _check_axes(axes: Mapping[str, list[Any]], given: Mapping[str, Any]) -> None:
    problems = [
        f"{key}: cannot be swept, it only says what a run is called or where" for key in _NOT_SWEPT if key in axes
    ]
    problems += [
        f"{key}: a list of values to sweep must hold at least one" for key, values in axes.items() if not values
    ]
    if not axes:
        problems.append("nothing to sweep: give a key a list of values, such as seed=[1, 2, 3]")
        lists = [key for key, value in given.items() if isinstance(value, list)]
        problems += [f"{key}: takes a list itself, so it is swept by a list of lists" for key in lists]
    count = math.prod(map(len, axes.values()))
    if count > MAX_RUNS:
        problems.append(f"a sweep may have {MAX_RUNS:,} runs at most, these values make {count:,}")
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------- checks


def _check_combinations(made: Plan) -> None:
    """Refuse a sweep in which a combination is no config, or is the same run as another one."""
    combinations = made.combinations()
    having: dict[str, list[str]] = {}
    same: dict[str, str] = {}
    for one in combinations:
        try:
            settings = json.dumps(config_files.resolved(made.config(one)), sort_keys=True, default=str)
        except ConfigError as error:
            for problem in error.problems:
                having.setdefault(problem, []).append(one.name)
            continue
        first = same.setdefault(settings, one.name)
        if first != one.name:
            having[f"the same run as {first}"] = [one.name]
    if having:
        raise ConfigError([_blamed(problem, names, len(combinations)) for problem, names in having.items()])


def _blamed(problem: str, names: Sequence[str], count: int) -> str:
    """A problem with the combination that has it; one that all have is of none of them."""
    if len(names) == count:
        return problem
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}: {problem}"


# ---------------------------------------------------------------- words


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key; the whole key where two have the same.

    >>> short_keys(["train.local_epochs", "seed", "strategy.name"])
    {'train.local_epochs': 'local_epochs', 'seed': 'seed', 'strategy.name': 'strategy'}
    """
    last: Callable[[str], str] = lambda key: key.removesuffix(".name").rpartition(".")[2]  # noqa: E731
    ends = [last(key) for key in keys]
    return {key: last(key) if ends.count(last(key)) == 1 else key for key in keys}


def text(value: Any) -> str:
    """A value of an axis in a few words.

    >>> text({"name": "fedavgm", "momentum": 0.9}), text([]), text(["dropout", {"name": "l2"}]), text(True)
    ('fedavgm(momentum=0.9)', '[]', '[dropout, l2]', 'true')
    """
    match value:
        case str():
            return value
        case list():
            return f"[{', '.join(map(text, value))}]"
        case Mapping():
            inner = ", ".join(f"{key}={text(own)}" for key, own in value.items() if key != "name")
            return f"{value.get('name', '')}({inner})" if inner else str(value.get("name", "{}"))
    return json.dumps(value)


def _safe(told: str) -> str:
    """Only what every file system and shell takes as it is; ``none`` for what has nothing of it, an empty list say."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", told).strip("_")[:VALUE_LENGTH].rstrip("_") or "none"
