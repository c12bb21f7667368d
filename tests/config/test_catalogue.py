import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.config.catalogue import common_keys, entries, json_schema
from fedsim.config.tables import KINDS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_entry_is_listed_with_a_line_that_reads_alone(kind):
    listed = entries(kind)
    assert [entry.name for entry in listed] == list(KINDS[kind].table)
    for entry in listed:
        assert len(entry.summary) > 15
        assert entry.summary.endswith((".", ").", "``)."))
        assert all(allowed and default for _, allowed, default in entry.keys)


def test_keys_are_listed_with_type_range_and_default():
    splits = {entry.name: entry.keys for entry in entries("splits")}
    assert splits["shards"][0] == ("shards_per_client", "int >= 1", "default 2")
    assert ("examples_per_client", "int | null", "default null") in splits["iid"]
    assert ("sigma", "float > 0 <= 100", "needed") in splits["quantity"]
    models = {entry.name: entry.keys for entry in entries("models")}
    assert models["mlp"] == (
        ("hidden", "list of int", "default [64, 64]"),
        ("dropout", "float >= 0 < 1", "default 0.0"),
        ("norm", "none | batch | group | layer", "default none"),
    )
    assert ("norm", "none | batch | group | layer", "default none") in models["cnn"]
    assert [key for key, *_ in common_keys("models")] == ["init", "regularizers"]
    assert common_keys("splits") == ()


_TYPES: dict[str, Any] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "array": list,
    "object": dict,
    "null": type(None),
}


def _allows(schema: dict[str, Any], node: dict[str, Any], value: Any) -> bool:
    """Whether a part of JSON Schema allows the keys of a value, at any depth."""
    if "$ref" in node:
        return _allows(schema, schema["$defs"][node["$ref"].removeprefix("#/$defs/")], value)
    options = node.get("anyOf") or node.get("oneOf")
    if options:
        return any(_allows(schema, option, value) for option in options)
    if "const" in node or "enum" in node:
        return value in node.get("enum", [node.get("const")])
    if "type" in node and not isinstance(value, _TYPES[node["type"]]):
        return False
    return _allows_keys(schema, node, value) if isinstance(value, dict) else _matches(node.get("pattern", ""), value)


def _matches(pattern: str, value: Any) -> bool:
    return not pattern or re.search(pattern, value) is not None


def _allows_keys(schema: dict[str, Any], node: dict[str, Any], value: dict[str, Any]) -> bool:
    known = node.get("properties", {})
    if node.get("additionalProperties") is False and not set(value) <= set(known):
        return False
    required = set(node.get("required", [])) <= set(value)
    return required and all(_allows(schema, known[key], inner) for key, inner in value.items() if key in known)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_json_schema_allows_every_shipped_config(path):
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].endswith("2020-12/schema")
    config = yaml.safe_load(path.read_text())
    assert _allows(schema, schema, config)
    assert not _allows(schema, schema, {**config, "zzz": 1})
    assert not _allows(schema, schema, {**config, "train": {"zzz": 1}})
    assert not _allows(schema, schema, {**config, "strategy": {"name": "fedavg", "zzz": 1}})


def test_every_reference_of_the_json_schema_leads_somewhere():
    text = json.dumps(json_schema())
    for part in text.split('"$ref": "#/$defs/')[1:]:
        assert part.split('"')[0] in json_schema()["$defs"]
