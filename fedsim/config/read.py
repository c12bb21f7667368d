"""From a YAML file to one plain mapping: strict YAML, ``extends``, overrides. Nothing is checked against the schema."""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import ConfigError

MAX_EXTENDS = 10  # files in one chain


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """YAML whose keys are text and not twice there, and whose plain values mean what they look like (see below)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # ``<<: *other``
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"key {as_yaml(key)} is not text"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.2 instead of 1.1: 1e-3 is a number; no, off, 12:30, 010, 1_000 and 2024-01-31 are text.
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]{0,29})", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _type, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_type}", re.compile(f"^({_pattern})$"), _first)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        ConfigError: it is not YAML, with the line; says so plainly for tabs and duplicate keys.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark else source
        problem = str(error.problem or error.context)
        if "\\t" in problem:
            raise ConfigError(f"{where}: a tab character; YAML indents with spaces") from error
        if problem.startswith("but"):
            problem = f"{error.context}, {problem}"
        raise ConfigError(f"{where}: {problem}") from error
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}: not text, character {error.position} has code {error.character}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: nested too deeply") from error


def as_yaml(value: object) -> str:
    """A value for people, as YAML has it, cut to 80 characters."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = f".{value}".replace(".-", "-.") if isinstance(value, float) and not math.isfinite(value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(value: Any, key: str, problems: list[str]) -> Any:
    """The value in YAML's own types: numpy's numbers, paths and tuples from Python become numbers, text and lists.

    Args:
        value: of anything.
        key: its dotted key, for messages.
        problems: gets a line for all that YAML has no type for.
    """
    match value:
        case None | bool():
            return value
        case Real():
            return int(value) if isinstance(value, Integral) else float(value)
        case str() | Path():
            if str(value).encode(errors="replace").decode() != str(value):
                problems.append(f"{key}: must be text that UTF-8 can hold, got {as_yaml(value)}")
            return str(value)
        case Mapping():
            return {str(name): plain(inner, f"{key}.{name}".strip("."), problems) for name, inner in value.items()}
        case list() | tuple():
            return [plain(inner, f"{key}.{n}", problems) for n, inner in enumerate(value)]
    problems.append(f"{key}: must be a number, text, true, false, null, a list or a section, got {as_yaml(value)}")
    return None


def read(path: Path) -> dict[str, Any]:
    """The mapping in a config file, with the file that it ``extends`` underneath.

    Raises:
        ConfigError: a file is missing, is not a YAML mapping, or extends itself.
    """
    return _read(path, ())


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    text = _text(path, f"{chain[-1]}: extends: " if chain else "")
    if path.resolve() in [one.resolve() for one in chain]:
        raise ConfigError(f"{chain[-1]}: extends: the files extend each other in a circle, got {path}")
    if len(chain) > MAX_EXTENDS:
        raise ConfigError(f"{chain[-1]}: extends: must be at most {MAX_EXTENDS} files deep")
    own = parse_yaml(text, str(path))
    if own is None:
        raise ConfigError(f"{path}: the file is empty")
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: must hold keys and values, found {as_yaml(own)}")
    below = own.pop("extends", None)
    if below is None:
        return own
    if not isinstance(below, str) or not below:
        raise ConfigError(f"{path}: extends: must be the path of a config file, got {as_yaml(below)}")
    return merge(_read(path.parent / below, (*chain, path)), own)


def _text(path: Path, why: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{why}{path}: not a text file in UTF-8") from error
    except FileNotFoundError as error:
        raise ConfigError(f"{why}{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"{why}{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merged key by key, other values replaced. A component with another ``name`` replaces the whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, str) and isinstance(value, Mapping) and "name" not in value:
            old = {"name": old}  # ``split: dirichlet`` below, ``split: {alpha: 1}`` above
        keeps = isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("name") in (None, old.get("name"))
        merged[key] = merge(old, value) if keeps else value  # type: ignore[arg-type]
    return merged


def override(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with values at dotted keys replaced.

    ``{"train.rounds": 5}``; a section given as a mapping is merged in, a component given with its name replaces the
    old one; a missing section is made; a component given by its bare name becomes a mapping. The
    order of the changes is of no matter: whole sections come first, then names of components, then their parameters.

    Raises:
        ConfigError: a dotted key is empty or leads through a value that is not a section.
    """
    result = dict(config)
    paths = {key: key.split(".") for key in changes}
    problems = [f"override {key!r}: must be a dotted key such as train.rounds" for key in paths if not all(paths[key])]
    if problems:
        raise ConfigError(problems)
    for key, parts in sorted(paths.items(), key=lambda item: (len(item[1]), item[1][-1] != "name")):
        nested = changes[key]
        for depth in range(len(parts) - 1, 0, -1):
            above = at(result, parts[:depth])
            if above is not None and not isinstance(above, Mapping | str):
                raise ConfigError(f"override {key}: {'.'.join(parts[:depth])} is {as_yaml(above)}, not a section")
            nested = {parts[depth]: nested}
        result = _replace(result, parts[0], nested, depth=len(parts))
    return result


def _replace(config: dict[str, Any], key: str, nested: Any, depth: int) -> dict[str, Any]:
    """Merge along the path. At its end a component replaces the old one whole; a section replaces the keys it has."""
    if depth == 1:
        old = config.get(key)
        is_section = isinstance(old, Mapping) and isinstance(nested, Mapping) and "name" not in nested
        return {**config, key: merge(old, nested) if is_section else nested}  # type: ignore[arg-type]
    old = config.get(key)
    old = {"name": old} if isinstance(old, str) else dict(old or {})
    ((inner, value),) = nested.items()
    if inner == "name" and depth == 2 and value != old.get("name"):
        return {**config, key: {"name": value}}  # another component: the old one's parameters mean nothing to it
    return {**config, key: _replace(old, inner, value, depth - 1)}


def at(config: Any, parts: Sequence[str]) -> Any:
    """The value under nested keys, or None; a component given by its bare name has that under ``name``.

    A number is the place of an entry in a list, from 0.
    """
    for part in parts:
        if isinstance(config, str) and part == "name":
            return config
        if isinstance(config, list) and part.isdigit():
            config = config[int(part)] if int(part) < len(config) else None
        else:
            config = config.get(part) if isinstance(config, Mapping) else None
    return config


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["train.rounds=5", "data.split={name: iid}"]`` as a mapping; values are YAML.

    Raises:
        ConfigError: an argument without ``=``, or whose value is not YAML.
    """
    changes: dict[str, Any] = {}
    problems: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        try:
            changes[key.strip()] = parse_yaml(value, f"override {key}")
        except ConfigError as error:
            problems += error.problems
        if not equals:
            problems.append(f"override {argument}: must be written key.path=value")
    if problems:
        raise ConfigError(problems)
    return changes
