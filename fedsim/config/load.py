"""From a plain mapping to a checked config; every problem is reported at once, with dotted key, rule and value."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedsim.config import read
from fedsim.config.components import Component
from fedsim.config.problems import lines, of_components
from fedsim.config.schema import Config, cross_problems, default_name
from fedsim.config.tables import KINDS, Kind
from fedsim.errors import ConfigError


def load(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and check a config.

    Args:
        source: path of a YAML file, or the mapping itself.
        overrides: dotted key -> value.

    Returns:
        The checked config, complete with all defaults. A file without ``name`` is named after itself.

    Raises:
        ConfigError: with every problem found.
    """
    raw = source if isinstance(source, Mapping) else {"name": _name_from(Path(source)), **read.read(Path(source))}
    return check(_overridden(raw, overrides or {}))


def _name_from(path: Path) -> str:
    """The file's name with what a folder's name should not have left out."""
    return re.sub(r"[^A-Za-z0-9._-]+|^[._-]+", "-", path.stem).strip("-")[:100] or "run"


def _overridden(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """With ``changes``; one of a parameter (``train.optimizer.lr``) is of the default component if none is given."""
    for path in (kind.path for kind in KINDS.values() if not kind.many):
        is_changed = any(key.startswith(f"{path}.") for key in changes)
        if is_changed and read.at(raw, path.split(".")) is None and default_name(path) is not None:
            raw = read.override(raw, {path: default_name(path)})
    return read.override(raw, changes)


def check(raw: Mapping[str, Any]) -> Config:
    """Check a plain mapping against the schema, the tables of components and the rules between keys.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    try:
        given = read.plain(raw, "", problems)
    except RecursionError as error:  # a YAML alias inside what it names, say
        raise ConfigError("config: nested too deeply") from error
    config = None
    try:
        config = Config.model_validate(given)
    except ValidationError as error:
        problems += lines(given, error)
    for kind in KINDS.values():
        problems += of_components(given, kind)
    values = given if config is None else resolved(config)  # defaults, too, may break a rule
    problems += cross_problems(lambda dotted: _value(values, dotted))
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return config


def _value(given: Mapping[str, Any], dotted: str) -> Any:
    """The value at a dotted key; of a component that is not given, the default's name."""
    value = read.at(given, dotted.split("."))
    return default_name(dotted.removesuffix(".name")) if value is None and dotted.endswith(".name") else value


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain values, complete; loading it again gives the same config."""
    return config.model_dump(serialize_as_any=True)


def components_at(config: Config, kind: Kind) -> list[Component]:
    """The components of a kind: those of its list, or its one, if there is one."""
    found: Any = config
    for part in kind.path.split("."):
        found = getattr(found, part)
    if kind.many:
        return list(found.root)
    return [] if found is None else [found]


def component_at(config: Config, path: str) -> Component:
    """The component at a dotted key."""
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Component)
    return found
