"""From a YAML file to one plain mapping: strict YAML, ``extends``, overrides. Nothing is checked against the schema."""

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import ConfigError

MAX_EXTENDS = 10  # files in one chain


class _Loader(yaml.SafeLoader):
    """YAML with duplicate keys refused, ``1e-3`` a number, and only true and false booleans."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


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
        if "\\t" in str(error.problem):
            raise ConfigError(f"{where}: a tab character; YAML indents with spaces") from error
        raise ConfigError(f"{where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML ({error})") from error


def read(path: Path) -> dict[str, Any]:
    """The mapping in a config file, with the file that it ``extends`` underneath.

    Raises:
        ConfigError: a file is missing, is not a YAML mapping, or extends itself.
    """
    return _read(path, ())


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain or len(chain) >= MAX_EXTENDS:
        raise ConfigError(f"extends: {path} is extended by itself, or over {MAX_EXTENDS} files deep")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    own = parse_yaml(text, str(path))
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found {type(own).__name__}")
    below = own.pop("extends", None)
    if below is None:
        return own
    if not isinstance(below, str):
        raise ConfigError(f"extends: must be the path of a config file, got {below!r}")
    return merge(_read(path.parent / below, (*chain, path.resolve())), own)


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

    ``{"train.rounds": 5}``; a missing section is made; a component given by its bare name becomes a mapping.

    Raises:
        ConfigError: a dotted key is empty or leads through a value that is not a section.
    """
    result = dict(config)
    for dotted, value in changes.items():
        nested: Any = value
        parts = dotted.split(".")
        if not all(parts):
            raise ConfigError(f"override {dotted!r}: not a dotted key such as train.rounds")
        for depth in range(len(parts) - 1, 0, -1):
            above = _at(result, parts[:depth])
            if above is not None and not isinstance(above, Mapping | str):
                raise ConfigError(f"override {dotted}: {'.'.join(parts[:depth])} is {above!r}, not a section")
            nested = {parts[depth]: nested}
        result = _replace(result, parts[0], nested, depth=len(parts))
    return result


def _replace(config: dict[str, Any], key: str, nested: Any, depth: int) -> dict[str, Any]:
    """Merge along the path only; the value at its end replaces what was there, mapping or not."""
    if depth == 1:
        return {**config, key: nested}
    old = config.get(key)
    old = {"name": old} if isinstance(old, str) else dict(old or {})
    ((inner, value),) = nested.items()
    if inner == "name" and depth == 2 and value != old.get("name"):
        return {**config, key: {"name": value}}  # another component: the old one's parameters mean nothing to it
    return {**config, key: _replace(old, inner, value, depth - 1)}


def _at(config: Mapping[str, Any], parts: list[str]) -> Any:
    value: Any = config
    for part in parts:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["train.rounds=5", "data.split={name: iid}"]`` as a mapping; values are YAML.

    Raises:
        ConfigError: an argument without ``=``, or whose value is not YAML.
    """
    changes: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: an override is written key.path=value")
        changes[key.strip()] = parse_yaml(value, f"override {key}")
    return changes
