"""Client sides of strategies. Functions of modules, not closures, so that a strategy can be sent to another process."""

from fedsim.training.local_rule import LocalRule, no_state, same_grads, same_state


def plain() -> LocalRule:
    """Change nothing and keep nothing: the optimizer alone decides."""
    return LocalRule(no_state, same_grads, same_state)
