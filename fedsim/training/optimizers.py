"""Client optimizers as pairs of pure functions; state is a parameter dict, so it can be stacked, saved and sent."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt

from fedsim.records import Params


class Optimizer(NamedTuple):
    """``init(params) -> state``; ``step(params, grads, state) -> (params, state)``. Both pure."""

    init: Callable[[Params], Params]
    step: Callable[[Params, Params, Params], tuple[Params, Params]]


def sgd(
    *,
    lr: Annotated[float, Gt(0)] = 0.1,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.0,
    weight_decay: Annotated[float, Ge(0)] = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent, with momentum, Nesterov and weight decay as in torch.

    ``d = g + weight_decay * w``; ``v <- momentum * v + d``; ``w <- w - lr * v``.
    Nesterov: ``w <- w - lr * (d + momentum * v)``.

    Args:
        lr: step size, > 0.
        momentum: in [0, 1); 0 keeps no state. A client starts every round from v = 0.
        weight_decay: L2 strength, >= 0, in units of 1 / (loss * parameter^2).
        nesterov: look ahead; needs momentum > 0.

    Returns:
        The optimizer.

    Raises:
        ValueError: nesterov without momentum.

    Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
        Differs: torch's form, in which lr multiplies the whole velocity (the same for a constant lr).
    """
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs momentum > 0, got momentum 0")

    return Optimizer(
        partial(_sgd_init, momentum=momentum),
        partial(_sgd_step, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov),
    )


def _sgd_init(params: Params, *, momentum: float) -> Params:
    return {n: torch.zeros_like(p) for n, p in params.items()} if momentum else {}


def _sgd_step(
    params: Params, grads: Params, state: Params, *, lr: float, momentum: float, weight_decay: float, nesterov: bool
) -> tuple[Params, Params]:
    direction = grads
    if weight_decay:
        direction = {n: torch.add(grads[n], p, alpha=weight_decay) for n, p in params.items()}
    if momentum:
        state = {n: torch.add(direction[n], v, alpha=momentum) for n, v in state.items()}
        direction = {n: torch.add(direction[n], v, alpha=momentum) for n, v in state.items()} if nesterov else state
    return {n: torch.add(p, direction[n], alpha=-lr) for n, p in params.items()}, state


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": sgd}
