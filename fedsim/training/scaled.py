"""An optimizer that takes smaller or larger steps for some parameters."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedsim.records import Params
from fedsim.training.optimizers import Optimizer, OptimizerState, Stepping, SteppingInPlace


def scaled(optimizer: Optimizer, factors: Mapping[str, float]) -> Optimizer:
    """The same optimizer, with the steps of some parameters times a factor: ``w' = w + factor * (step(w) - w)``.

    For SGD, Adam and AdamW, with any weight decay, that is a factor on the lr of these parameters.

    A strategy's rule that works back from a client's move to its gradients, as SCAFFOLD's second option does with
    ``(w_global - w_local) / (steps * lr)``, needs ``factor * lr`` for these parameters. With lr it finds gradients that
    are too small by the factor, and corrects by a part of what it should.

    Args:
        optimizer: of any kind.
        factors: parameter name -> factor, >= 0. The others are stepped as before, bit for bit.

    Returns:
        An optimizer that is not ``folded``; ``optimizer`` itself where there are no factors.

    Raises:
        ValueError: a factor is negative.
    """
    if wrong := [f"{name}: {factor}" for name, factor in factors.items() if not factor >= 0]:
        raise ValueError(f"factors must be >= 0, got {wrong[0]}")
    if not factors:
        return optimizer
    own = dict(factors)
    return Optimizer(
        optimizer.init,
        partial(_step, inner=optimizer.step, factors=own),
        partial(_step_, inner=optimizer.step_, factors=own),
    )


def _step(
    params: Params,
    grads: Params,
    state: OptimizerState,
    t: int,
    factor: float,
    *,
    inner: Stepping,
    factors: dict[str, float],
) -> tuple[Params, OptimizerState]:
    stepped, state = inner(params, grads, state, t, factor)
    return {n: _part(params[n], w, factors[n]) if n in factors else w for n, w in stepped.items()}, state


def _step_(
    params: Params,
    grads: Params,
    state: OptimizerState,
    t: int,
    factor: float,
    *,
    inner: SteppingInPlace,
    factors: dict[str, float],
) -> None:
    before = {name: params[name].clone() for name in factors if name in params}
    inner(params, grads, state, t, factor)
    for name, w in before.items():
        params[name].copy_(_part(w, params[name], factors[name]))


def _part(w: Tensor, stepped: Tensor, factor: float) -> Tensor:
    """A part of the way from w to where a step leads."""
    return torch.add(w, stepped - w, alpha=factor)
