"""Client optimizers as pure functions, each with a form in place that gives the same bits on a CPU.

All is elementwise, so every function also works on tensors stacked over clients, (clients, *shape). A client starts
every round with a fresh state: no velocity, no moments, and t = 1, so that Adam's bias correction starts again too.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fedsim import params as p
from fedsim.records import Params

OptimizerState = dict[str, Params]  # {} for plain SGD, {"momentum": {...}}, {"mean": {...}, "square": {...}}
Stepping = Callable[[Params, Params, OptimizerState, int, float], tuple[Params, OptimizerState]]
SteppingInPlace = Callable[[Params, Params, OptimizerState, int, float], None]


class Folded(NamedTuple):
    """An optimizer that is just ``w <- (1 - lr * weight_decay) * w - lr * g``.

    A fused backward pass may fold it into its matrix products.
    """

    lr: float
    weight_decay: float


class Optimizer(NamedTuple):
    """How a client's parameters follow its gradients.

    init: (params) -> state at the start of a round.
    step: (params, grads, state, t, factor) -> (params, state). Pure. t = 1, 2, ... counts this client's steps of this
        round; factor, from the schedule, multiplies lr.
    step_: the same in place on params and state, bit for bit on a CPU; may overwrite grads.
    folded: for plain SGD.
    """

    init: Callable[[Params], OptimizerState]
    step: Stepping
    step_: SteppingInPlace
    folded: Folded | None = None


def in_place(step: Stepping) -> SteppingInPlace:
    """``step_`` of an optimizer that has only a pure ``step``: compute, then copy."""
    return partial(_copied_back, step=step)


def _copied_back(
    params: Params, grads: Params, state: OptimizerState, t: int, factor: float, *, step: Stepping
) -> None:
    stepped, next_state = step(params, grads, state, t, factor)
    pairs = [(params, stepped), *((state[part], next_state[part]) for part in state)]
    # all cloned before any is written: a pure step may hand on what it was given, in another place
    copies = [(old[name], new[name].clone()) for old, new in pairs for name in old]
    for tensor, copy in copies:
        tensor.copy_(copy)


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
        lr: step size, > 0; times the schedule's factor.
        momentum: in [0, 1); 0 keeps no state. A client starts every round from v = 0.
        weight_decay: L2 strength, >= 0, in units of loss / parameter^2.
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
    options = _Sgd(lr, momentum, weight_decay, nesterov)
    return Optimizer(
        init=partial(_sgd_init, momentum=momentum),
        step=partial(_sgd_step, options=options),
        step_=partial(_sgd_step_, options=options),
        folded=None if momentum else Folded(lr, weight_decay),
    )


class _Sgd(NamedTuple):
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool


def _sgd_init(params: Params, *, momentum: float) -> OptimizerState:
    return {"momentum": p.zeros_like(params)} if momentum else {}


def _sgd_step(
    params: Params, grads: Params, state: OptimizerState, t: int, factor: float, *, options: _Sgd
) -> tuple[Params, OptimizerState]:
    lr, momentum, weight_decay, nesterov = options
    direction = grads
    if weight_decay:
        direction = {n: torch.add(grads[n], w, alpha=weight_decay) for n, w in params.items()}
    if momentum:
        velocity = {n: v * momentum + direction[n] for n, v in state["momentum"].items()}
        ahead = {n: torch.add(direction[n], v, alpha=momentum) for n, v in velocity.items()} if nesterov else velocity
        direction, state = ahead, {"momentum": velocity}
    return {n: torch.add(w, direction[n], alpha=-lr * factor) for n, w in params.items()}, state


def _sgd_step_(params: Params, grads: Params, state: OptimizerState, t: int, factor: float, *, options: _Sgd) -> None:
    lr, momentum, weight_decay, nesterov = options
    weights, direction = _listed(params, params), _listed(params, grads)
    if weight_decay:
        direction = _plus(direction, weights, weight_decay)
    if momentum:
        velocity = _listed(params, state["momentum"])
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, direction)
        direction = _plus(direction, velocity, momentum) if nesterov else velocity
    torch._foreach_add_(weights, direction, alpha=-lr * factor)


def _listed(params: Params, tensors: Params) -> list[Tensor]:
    """Tensors in the order of the parameters."""
    return [tensors[name] for name in params]


def _plus(a: list[Tensor], b: list[Tensor], alpha: float) -> list[Tensor]:
    """``a + alpha * b`` as new tensors.

    Gradients are never written to: autograd may hand out one tensor for two parameters, vmap one that is expanded.
    """
    return list(torch._foreach_add(a, b, alpha=alpha))


def adam(
    *,
    lr: Annotated[float, Gt(0)] = 1e-3,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
    weight_decay: Annotated[float, Ge(0)] = 0.0,
) -> Optimizer:
    """Adam, with L2 weight decay as in torch; moments and bias correction start anew every round.

    ``d = g + weight_decay * w``; ``m <- beta1 * m + (1 - beta1) * d``; ``v <- beta2 * v + (1 - beta2) * d^2``;
    ``w <- w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)``.

    Args:
        lr: step size, > 0; times the schedule's factor.
        beta1: decay of the mean of gradients, in [0, 1).
        beta2: decay of the mean of their squares, in [0, 1).
        eps: > 0, in units of a gradient.
        weight_decay: L2 strength, >= 0, in units of loss / parameter^2; goes through the moments.

    Returns:
        The optimizer.

    Source: Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1. Differs: weight_decay.
    """
    return _adam(_Adam(lr, beta1, beta2, eps, weight_decay, decoupled=False))


def adamw(
    *,
    lr: Annotated[float, Gt(0)] = 1e-3,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999,
    eps: Annotated[float, Gt(0)] = 1e-8,
    weight_decay: Annotated[float, Ge(0)] = 0.01,
) -> Optimizer:
    """Adam with decoupled weight decay; moments and bias correction start anew every round.

    ``w <- (1 - lr * weight_decay) * w``, then a step of :func:`adam` without weight decay, at the same gradient.

    Args:
        lr, beta1, beta2, eps: as in :func:`adam`.
        weight_decay: >= 0; with lr the share of a parameter that a step takes away.

    Returns:
        The optimizer.

    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2. Differs: torch's form,
        in which lr multiplies the decay too.
    """
    return _adam(_Adam(lr, beta1, beta2, eps, weight_decay, decoupled=True))


class _Adam(NamedTuple):
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool

    def at(self, t: int, factor: float) -> tuple[float, float, float]:
        """Of step t: lr times factor, the same over the first bias correction, the root of the second."""
        lr = self.lr * factor
        return lr, lr / (1 - self.beta1**t), (1 - self.beta2**t) ** 0.5


def _adam(options: _Adam) -> Optimizer:
    return Optimizer(_moments, partial(_adam_step, options=options), partial(_adam_step_, options=options))


def _moments(params: Params) -> OptimizerState:
    return {"mean": p.zeros_like(params), "square": p.zeros_like(params)}


def _adam_step(
    params: Params, grads: Params, state: OptimizerState, t: int, factor: float, *, options: _Adam
) -> tuple[Params, OptimizerState]:
    o, (lr, size, root) = options, options.at(t, factor)
    if o.weight_decay and o.decoupled:
        params = {n: w * (1 - lr * o.weight_decay) for n, w in params.items()}
    elif o.weight_decay:
        grads = {n: torch.add(grads[n], w, alpha=o.weight_decay) for n, w in params.items()}
    mean = {n: torch.lerp(m, grads[n], 1 - o.beta1) for n, m in state["mean"].items()}
    square = {n: torch.addcmul(v * o.beta2, grads[n], grads[n], value=1 - o.beta2) for n, v in state["square"].items()}
    scale = {n: v.sqrt() / root + o.eps for n, v in square.items()}
    stepped = {n: torch.addcdiv(w, mean[n], scale[n], value=-size) for n, w in params.items()}
    return stepped, {"mean": mean, "square": square}


def _adam_step_(params: Params, grads: Params, state: OptimizerState, t: int, factor: float, *, options: _Adam) -> None:
    o, (lr, size, root) = options, options.at(t, factor)
    weights, direction = _listed(params, params), _listed(params, grads)
    mean, square = _listed(params, state["mean"]), _listed(params, state["square"])
    if o.weight_decay and o.decoupled:
        torch._foreach_mul_(weights, 1 - lr * o.weight_decay)
    elif o.weight_decay:
        direction = _plus(direction, weights, o.weight_decay)
    torch._foreach_lerp_(mean, direction, 1 - o.beta1)
    torch._foreach_mul_(square, o.beta2)
    torch._foreach_addcmul_(square, direction, direction, value=1 - o.beta2)
    scale = torch._foreach_sqrt(square)
    torch._foreach_div_(scale, root)
    torch._foreach_add_(scale, o.eps)
    torch._foreach_addcdiv_(weights, mean, scale, value=-size)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": sgd, "adam": adam, "adamw": adamw}
