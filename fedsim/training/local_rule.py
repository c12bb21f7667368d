"""What a strategy may change in a client's training: three pure functions, called by the local loop."""

from collections.abc import Callable
from typing import NamedTuple

from fedsim.records import Broadcast, Params


class LocalRule(NamedTuple):
    """Client side of a strategy. A *state* is a parameter dict that stays with the client between rounds.

    init: (global params) -> state of a client that never took part. {} if the rule keeps none.
    correct: (grads, local params, broadcast, state) -> grads, before every optimizer step.
    finish: (local params, broadcast, state, number of steps) -> state, after the last step.
    """

    init: Callable[[Params], Params]
    correct: Callable[[Params, Params, Broadcast, Params], Params]
    finish: Callable[[Params, Broadcast, Params, int], Params]


def no_state(params: Params) -> Params:
    """``init`` of a rule that keeps none."""
    return {}


def same_grads(grads: Params, local: Params, broadcast: Broadcast, state: Params) -> Params:
    """``correct`` of a rule that corrects nothing."""
    return grads


def same_state(local: Params, broadcast: Broadcast, state: Params, num_steps: int) -> Params:
    """``finish`` of a rule whose state does not change."""
    return state
