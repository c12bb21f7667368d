"""How the aggregate moves the global model."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from fedsim import params as p
from fedsim.records import Params


class ServerRule(NamedTuple):
    """Server side of a strategy. A *state* is a parameter dict, saved with the checkpoint.

    init: (global params) -> state.
    step: (global params, aggregate update, state) -> (global params, state).
    extra: (state) -> what every client is sent beside the parameters; {} for most.
    """

    init: Callable[[Params], Params]
    step: Callable[[Params, Params, Params], tuple[Params, Params]]
    extra: Callable[[Params], Params]


def sgd(*, lr: float) -> ServerRule:
    """``w <- w + lr * update``; lr = 1 adopts the clients' mean."""
    return ServerRule(_nothing, partial(_sgd_step, lr=lr), _nothing)


def _nothing(_: Params) -> Params:
    return {}


def _sgd_step(params: Params, update: Params, state: Params, *, lr: float) -> tuple[Params, Params]:
    return p.add_scaled(params, update, lr), state
