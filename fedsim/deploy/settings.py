"""What server and clients must agree on: the parts of the config that change what a client computes."""

import json
from collections.abc import Mapping
from typing import Any

from fedsim.config import load as config_files
from fedsim.config.schema import Config

_TRAIN = (
    "rounds",
    "local_epochs",
    "batch_size",
    "optimizer",
    "schedule",
    "batch_norm",
    "max_grad_norm",
    "early_stopping",
)
_DATA = ("dataset", "clients", "split", "test_fraction", "seed")

Settings = dict[str, Any]  # dotted key -> plain value


def shared(config: Config) -> Settings:
    """The settings of a config that server and clients share, under their dotted keys.

    Where files lie, what the server alone does (cohort, evaluation) and where results go are left out.
    """
    whole = config_files.resolved(config)
    parts = {
        "seed": whole["seed"],
        "data": {key: whole["data"][key] for key in _DATA},
        "model": whole["model"],
        "train": {key: whole["train"][key] for key in _TRAIN},
        "strategy": whole["strategy"],
        "pruning": whole["pruning"],
        "transforms": whole["transforms"],
    }
    return dict(_flat("", parts))


def encode(settings: Settings) -> str:
    """As text, for a message."""
    return json.dumps(settings, sort_keys=True)


def decode(text: str) -> Settings:
    """The inverse of :func:`encode`.

    Raises:
        ValueError: not such a text.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"settings must be a JSON object, got {type(found).__name__}")
    return found


def differences(own: Settings, servers: Settings, *, own_data: bool) -> list[str]:
    """Where they differ, a line for each key, in words for the client's user.

    own_data: the client has data of its own, so how the server splits its data does not matter.
    """
    keys = [key for key in sorted({*own, *servers}) if not (own_data and _of_data(key, servers))]
    return [
        f"{key} is {_at(own, key)} here, {_at(servers, key)} at the server"
        for key in keys
        if _differ(own, servers, key)
    ]


def _of_data(key: str, servers: Settings) -> bool:
    """Whether a setting concerns nothing but the server's data and how they are split.

    Of the seed come the model's first values, too, and a client that rewinds to them must have the server's.
    """
    rewinds = servers.get("pruning.name") == "personal-tickets"
    return key.startswith("data.") or (key == "seed" and not rewinds)


def _differ(own: Settings, servers: Settings, key: str) -> bool:
    return own.keys() & {key} != servers.keys() & {key} or bool(own.get(key) != servers.get(key))


def _at(settings: Settings, key: str) -> str:
    return json.dumps(settings[key]) if key in settings else "not set"


def _flat(path: str, value: Any) -> Any:
    """Leaves of nested mappings, with their dotted keys."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(f"{path}.{key}" if path else str(key), inner)
