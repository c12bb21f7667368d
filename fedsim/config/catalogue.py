"""What there is to choose from: every component with its first docstring line and its keys, and the JSON Schema."""

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from fedsim.config.components import Slot, base_of, model_of
from fedsim.config.read import as_yaml
from fedsim.config.schema import Config, Data, Section, Train, Transfer
from fedsim.config.tables import KINDS


@dataclass(frozen=True)
class Entry:
    """One component. keys: (name, type and range, "default ..." or "needed")."""

    name: str
    summary: str
    keys: tuple[tuple[str, str, str], ...]


def entries(kind: str) -> list[Entry]:
    """The components of a kind, in the order of their table."""
    slot = KINDS[kind]
    shared = base_of(slot).not_params()
    return [
        Entry(name, _first_line(factory), _keys(model_of(name, factory, slot).model_fields, but=shared))
        for name, factory in slot.table.items()
    ]


def common_keys(kind: str) -> tuple[tuple[str, str, str], ...]:
    """Keys that every component of a kind takes beside its own."""
    return _keys(base_of(KINDS[kind]).model_fields, but=frozenset({"name"}))


def sections() -> list[Entry]:
    """The keys of a config that name no component: of the whole, of ``data``, ``train`` and ``transfer``."""
    return [
        Entry(name, _first_line(model), _told_keys(model))
        for name, model in (("(top)", Config), ("data", Data), ("train", Train), ("transfer", Transfer))
    ]


def _told_keys(model: type[Section]) -> tuple[tuple[str, str, str], ...]:
    """Keys with what their description adds; sections and empty rooms are left out."""
    rooms = ("data", "train", "pruning", "transforms", "transfer")
    return tuple(
        (name, _type(field), _default(field.default) + (f"; {field.description}" if field.description else ""))
        for name, field in model.model_fields.items()
        if name not in rooms and not any(isinstance(m, Slot) for m in field.metadata)
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors. No section is required: it may come from the file that is extended."""
    schema = Config.model_json_schema()
    for section in (schema, schema["$defs"]["Data"]):
        del section["required"]
    schema["properties"]["extends"] = {"type": "string", "description": "config file underneath this one"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fedsim config"}


def _first_line(factory: Any) -> str:
    return (inspect.getdoc(factory) or "").partition("\n")[0]


def _keys(fields: dict[str, Any], but: frozenset[str]) -> tuple[tuple[str, str, str], ...]:
    return tuple((name, _type(field), _default(field.default)) for name, field in fields.items() if name not in but)


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "needed"
    return f"default {value if isinstance(value, str) else as_yaml(value)}"


_SIGNS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def _type(field: Any) -> str:
    limits = ((sign, getattr(m, key, None)) for m in field.metadata for key, sign in _SIGNS)
    bounds = [f"{sign} {limit}" for sign, limit in limits if limit is not None]
    return " ".join([_type_name(field.annotation), *bounds])


def _type_name(annotation: Any) -> str:
    if annotation in (None, type(None), Any):
        return "any" if annotation is Any else "null"
    if get_origin(annotation) is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if isinstance(annotation, type) and not get_args(annotation):
        return {"str": "text", "bool": "true | false"}.get(annotation.__name__, annotation.__name__)
    inner = [_type_name(part) for part in get_args(annotation) if hasattr(part, "__name__") or get_args(part)]
    return f"list of {inner[0]}" if get_origin(annotation) is list else " | ".join(inner)
