"""Client sides of strategies."""

from fedsim.records import Broadcast, Params
from fedsim.training.local_rule import LocalRule


def plain() -> LocalRule:
    """Change nothing and keep nothing: the optimizer alone decides."""

    def init(params: Params) -> Params:
        return {}

    def correct(grads: Params, local: Params, broadcast: Broadcast, state: Params) -> Params:
        return grads

    def finish(local: Params, broadcast: Broadcast, state: Params, num_steps: int) -> Params:
        return state

    return LocalRule(init, correct, finish)
