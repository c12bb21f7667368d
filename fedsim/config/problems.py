"""What is wrong with a config, in lines for people: dotted key, rule, value."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fedsim.config.components import FOREIGN_FORM, call, factory_of, is_foreign, keys_of, model_of
from fedsim.config.read import as_yaml, at
from fedsim.config.schema import Config, Data, EarlyStopping, Train, Transfer, default_name
from fedsim.config.spelling import did_you_mean
from fedsim.config.tables import KINDS, Kind

_SLOTS = {kind.path: kind for kind in KINDS.values() if not kind.many}
_LISTS = {kind.path: kind for kind in KINDS.values() if kind.many}

_SECTION = "must be a section of keys and values"
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
    "model_type": _SECTION,
    "model_attributes_type": _SECTION,
    "dict_type": _SECTION,
    "literal_error": "must be {expected}",
    "string_pattern_mismatch": "must be of the form package.module:name",
    "too_long": "must have at most {max_length} entries",
    "too_short": "must have at least {min_length} entries",
    "recursion_loop": "must not hold itself",
}


def lines(raw: Any, error: ValidationError, above: str = "") -> Iterator[str]:
    """One line per problem; what the members of a union say of one value is one problem.

    Args:
        raw: what was validated.
        error: what pydantic found.
        above: dotted key under which ``raw`` stands in the config.
    """
    prefix = above.split(".") if above else []
    found: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault((*prefix, *_path(raw, detail, named=bool(prefix))), []).append(detail)
    for parts, details in found.items():
        yield _line(raw, list(parts), details, prefix)


def _line(raw: Any, parts: list[str], details: list[ErrorDetails], above: list[str]) -> str:
    kind, value = details[0]["type"], details[0]["input"]
    dotted = ".".join(parts)
    if kind == "missing":
        return f"{dotted}: needed, but not given"
    if dotted == "extends":
        return "extends: only a file can extend another one"
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key{_instead(raw, parts, above)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_name(dotted, value)
    rules = " or ".join(map(_rule, details)).replace(" or must be ", " or ")
    return f"{dotted}: {rules}, got {as_yaml(value)}"


def _rule(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
    message = detail["msg"]
    return _RULES.get(detail["type"], message[:1].lower() + message[1:]).format(**limits)


def _path(raw: Any, detail: ErrorDetails, named: bool) -> list[str]:
    """The keys that lead to the problem.

    pydantic's location also has the component's name after the key of a component, and the member after that of a
    union; whatever is not in the config is left out. ``named``: raw is a component, not a whole config.
    """
    parts: list[str] = []
    value, is_name = raw, False
    for depth, part in enumerate(detail["loc"], 1):
        is_missing = detail["type"] == "missing" and depth == len(detail["loc"])
        if is_name or not (is_missing or _holds(value, part)):
            is_name = False
            continue
        parts.append(str(part))
        value = None if is_missing else value[part]
        is_name = (not named or bool(parts)) and _slot(".".join(parts)) is not None
        if is_name and isinstance(value, str):
            value = {"name": value}
    return parts


def _holds(value: Any, part: int | str) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _unknown_name(dotted: str, value: Any) -> str:
    kind = _slot(dotted)
    assert kind is not None  # only a component's name is looked up in a table
    table = kind.table
    name = value.get("name") if isinstance(value, Mapping) else value
    known = f"known: {', '.join(table)}, or package.module:name"
    if name is None:
        return f"{dotted}.name: needed, but not given; {known}"
    return f"{dotted}.name: unknown name {as_yaml(name)}{did_you_mean(str(name), table)}; {known}"


def _instead(raw: Any, parts: list[str], above: list[str]) -> str:
    """What may be meant by an unknown key, or else what is known there."""
    *section, word = parts
    known = _known(raw, section, above)
    elsewhere = None if above else _everywhere(raw).get(word)
    if elsewhere:
        return f" (did you mean {elsewhere}?)"
    return did_you_mean(word, known) or f"; known: {', '.join(known) or 'none'}"


def _known(raw: Any, section: list[str], above: list[str]) -> list[str]:
    """Keys of a section or of a component; ``above`` is where ``raw`` stands."""
    kind = _slot(".".join(section))
    if kind is not None:
        return keys_of(at(raw, [*section[len(above) :], "name"]), kind)
    found: Any = Config
    for part in section:
        fields = getattr(found, "model_fields", {})
        found = fields[part].annotation if part in fields else None
        found = next((one for one in get_args(found) if hasattr(one, "model_fields")), found)  # of a section or null
    return list(getattr(found, "model_fields", {}))


def _everywhere(raw: Any) -> dict[str, str]:
    """Every key of every section and of the components in use -> its dotted key."""
    found: dict[str, str] = {}
    for path, kind in _SLOTS.items():
        name = at(raw, [*path.split("."), "name"]) or default_name(path)
        if isinstance(name, str) and name in kind.table:
            found |= {key: f"{path}.{key}" for key in keys_of(name, kind)}
    sections = (
        ("train.early_stopping.", EarlyStopping),
        ("data.", Data),
        ("train.", Train),
        ("transfer.", Transfer),
        ("", Config),
    )
    for section, model in sections:
        found |= {key: section + key for key in model.model_fields}
    return found


def _slot(dotted: str) -> Kind | None:
    """The kind of the component at a dotted key, which may be an entry of a list; None if there is none."""
    path, _, number = dotted.rpartition(".")
    return _LISTS.get(path) if number.isdigit() else _SLOTS.get(dotted)


def of_components(raw: Any, kind: Kind) -> Iterator[str]:
    """Problems of the components of a kind that their types alone do not show."""
    if not kind.many:
        yield from of_component(raw, kind, kind.path)
        return
    found = at(raw, kind.path.split("."))
    for number in range(len(found) if isinstance(found, list) else 0):
        yield from of_component(raw, kind, f"{kind.path}.{number}")


def of_component(raw: Any, kind: Kind, path: str) -> Iterator[str]:
    """Problems of one component that its type alone does not show.

    Somebody else's code is imported and the keys are held against its signature. A component that needs nothing but
    its keys is made once, so that what its factory refuses is known before any data is loaded.

    Args:
        raw: the whole config, plain.
        kind: which component.
        path: its dotted key.
    """
    component = at(raw, path.split("."))
    default = None if kind.many else default_name(path)
    given = component if isinstance(component, Mapping) else {"name": component or default}
    name = given.get("name")
    if not isinstance(name, str) or not (name in kind.table or re.fullmatch(FOREIGN_FORM, name)):
        return
    try:
        model = model_of(name, factory_of(name, kind), kind)
        made = model.model_validate_json(json.dumps(given)) if is_foreign(name) else model.model_validate(given)
        if not kind.context and not is_foreign(name):
            call(kind.table[name], made, kind)
    except ValidationError as error:
        if is_foreign(name):
            yield from lines(given, error, path)
    except Exception as error:  # it does not import, has no signature to read, or refuses a value
        yield refused(error, path + (".name" if is_foreign(name) else ""), given)


def refused(error: Exception, path: str, given: Iterable[str]) -> str:
    """A line for what a factory says of its arguments, such as ``alpha must be > 0``.

    Args:
        error: with the message.
        path: dotted key of the component.
        given: keys of the component.
    """
    text = str(error)
    word, _, rest = text.partition(" ")
    if word in given:
        return f"{path}.{word}: {rest}"
    return text if text.startswith(path) else f"{path}: {text}"
