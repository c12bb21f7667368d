"""Client sides of strategies. Functions of modules, not closures, so that a strategy can be sent to another process."""

from fedsim.records import Broadcast, Params
from fedsim.training.local_rule import LocalRule


def plain() -> LocalRule:
    """Change nothing and keep nothing: the optimizer alone decides."""
    return LocalRule(_no_state, _same_grads, _same_state)


def _no_state(params: Params) -> Params:
    return {}


def _same_grads(grads: Params, local: Params, broadcast: Broadcast, state: Params) -> Params:
    return grads


def _same_state(local: Params, broadcast: Broadcast, state: Params, num_steps: int) -> Params:
    return state
