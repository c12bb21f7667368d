"""From a plain mapping to a checked config; every problem is reported at once, with dotted key, rule and value."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedsim.config import read
from fedsim.config.components import Component, CustomComponent, factory_of, model_of
from fedsim.config.schema import Config, ModelComponent, cross_problems
from fedsim.config.tables import KINDS
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
    if isinstance(source, Mapping):
        raw: dict[str, Any] = read.merge({}, source)
    else:
        raw = {"name": Path(source).stem, **read.read(Path(source))}
    return check(read.override(raw, overrides or {}))


def check(raw: Mapping[str, Any]) -> Config:
    """Check a plain mapping against the schema and the rules between keys."""
    problems: list[str] = []
    config = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        problems += [_line(raw, detail) for detail in error.errors()]
    problems += cross_problems(lambda dotted: _value(raw if config is None else resolved(config), dotted.split(".")))
    if config is not None:
        problems += _custom_problems(config)
    if problems or config is None:
        raise ConfigError(sorted(set(problems), key=problems.index))
    return config


def resolved(config: Config) -> dict[str, Any]:
    """The config as plain values, complete; loading it again gives the same config."""
    plain = config.model_dump()
    components = {
        kind.path: component for kind in KINDS.values() if (component := component_at(config, kind.path)) is not None
    }
    for path, component in components.items():
        *above, last = path.split(".")
        section = plain
        for part in above:
            section = section[part]
        section[last] = component.model_dump()
    return plain


def component_at(config: Config, path: str) -> Component:
    """The component at a dotted key."""
    found: Any = config
    for part in path.split("."):
        found = getattr(found, part)
    assert isinstance(found, Component)
    return found


def _custom_problems(config: Config) -> Iterable[str]:
    """Problems of components that name somebody else's code: imports that fail, keys that do not fit."""
    for kind in KINDS.values():
        component = component_at(config, kind.path)
        if not isinstance(component, CustomComponent):
            continue
        try:
            factory = factory_of(component, kind)
            base = ModelComponent if kind.path == "model" else Component
            given = component.model_dump()
            model_of(component.name, factory, kind, base).model_validate(given)
        except ValidationError as error:
            yield from (
                _line({"here": given}, {**detail, "loc": ("here", *detail["loc"])}, kind.path)
                for detail in error.errors()
            )
        except Exception as error:  # a signature that cannot be read, or a module that raises
            yield f"{kind.path}.name: {error}"


_SLOTS = {kind.path: kind for kind in KINDS.values()}
_UNION_MEMBERS = ("int", "float", "str", "bool", "literal[", "function-", "list[", "constrained-")


def _line(raw: Mapping[str, Any], detail: ErrorDetails, at: str = "") -> str:
    """One problem as ``dotted.key: rule, got value``."""
    parts = _path(detail["loc"])
    dotted = ".".join([at, *parts[1:]] if at else parts) or "config"
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "missing":
        return f"{dotted}: needed, but not given"
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key{_hint(parts[-1], _known_keys(raw, detail['loc'], at))}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_name(dotted, value)
    return f"{dotted}: {_rule(kind, context, detail['msg'])}, got {_short(value)}"


_RULES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "none_required": "must be null, this version has none yet",
    "model_type": "must be a section of keys and values",
    "model_attributes_type": "must be a section of keys and values",
    "dict_type": "must be a section of keys and values",
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must match {pattern}",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
}


def _rule(kind: str, context: Mapping[str, Any], message: str) -> str:
    return _RULES[kind].format(**context) if kind in _RULES else message[:1].lower() + message[1:]


def _path(location: tuple[int | str, ...]) -> list[str]:
    """The dotted key: without the component's name that follows a slot, and without the members of a union."""
    parts: list[str] = []
    name_follows = False
    for part in location:
        if not name_follows and not str(part).startswith(_UNION_MEMBERS):
            parts.append(str(part))
        name_follows = not name_follows and ".".join(parts) in _SLOTS
    return parts


def _unknown_name(dotted: str, value: Any) -> str:
    table = _SLOTS[dotted].table
    name = value.get("name") if isinstance(value, Mapping) else value
    names = f"; known: {', '.join(table)}, or package.module:name"
    if name is None:
        return f"{dotted}.name: needed, but not given{names}"
    return f"{dotted}.name: unknown name {_short(name)}{_hint(str(name), table)}{names}"


def _hint(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else f"; known: {', '.join(known)}" if known else ""


def _known_keys(raw: Mapping[str, Any], location: tuple[int | str, ...], at: str) -> list[str]:
    """Keys of the section or component in which an unknown key was found."""
    parts = (at.split(".") if at else []) + _path(location)[1 if at else 0 : -1]
    kind = _SLOTS.get(".".join(parts))
    if kind is None:
        model: Any = Config
        for part in parts:
            model = model.model_fields[part].annotation
        return list(model.model_fields) if issubclass(model, BaseModel) else []
    value = _value(raw, ["here"] if at else parts)
    name = value.get("name") if isinstance(value, Mapping) else value
    base = ModelComponent if kind.path == "model" else Component
    factory = factory_of(CustomComponent(name=str(name)), kind) if ":" in str(name) else kind.table[str(name)]
    return [key for key in model_of(str(name), factory, kind, base).model_fields if key != "name"]


def _value(raw: Any, parts: list[str]) -> Any:
    for part in parts:
        if isinstance(raw, str) and part == "name":
            return raw
        raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
