"""A small valid config, and a way to see what is wrong with a changed one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from fedsim.config.load import load
from fedsim.errors import ConfigError

_VALID: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "data": {"dataset": "digits", "clients": 6, "split": {"name": "dirichlet", "alpha": 0.5}},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 2, "clients_per_round": 3, "optimizer": {"name": "sgd", "lr": 0.1}},
    "strategy": {"name": "fedavg"},
}


@pytest.fixture
def valid() -> dict[str, Any]:
    """A config that passes."""
    return copy.deepcopy(_VALID)


@pytest.fixture
def problems(valid) -> Callable[..., list[str]]:
    """The problems of the valid config with values at dotted keys changed; [] if there are none."""

    def found(changes: dict[str, Any]) -> list[str]:
        try:
            load(valid, changes)
        except ConfigError as error:
            return error.problems
        return []

    return found
