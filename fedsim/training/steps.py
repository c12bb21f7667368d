"""One step of local training for clients stacked on a leading axis, in place: three ways to do the same arithmetic.

``sequential`` is the plain loop's autograd, for one client. ``vectorised`` maps it over clients with
``torch.func.vmap``. ``fused`` is written by hand for chains of standard layers (:mod:`fedsim.training.chain`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedsim import params as p
from fedsim.records import Broadcast, Examples, Params
from fedsim.training import masking
from fedsim.training.chain import Chain, chain_of
from fedsim.training.client import LocalWork, corrected, gradient, layer_inputs, objective_at
from fedsim.training.local_rule import same_grads
from fedsim.training.objective import Start
from fedsim.training.optimizers import OptimizerState

Path = Literal["sequential", "vectorised", "fused"]
Gradient = Callable[..., tuple[Params, Tensor]]  # (local, buffers, batch, layer keys, *, start)


@dataclass(frozen=True)
class Lanes:
    """What clients hold while they train: tensors (clients, *shape), changed in place by every step.

    remains: bits of what is not pruned, as ``masking.stacked`` makes them; {} if nothing is. Never changed.
    """

    local: Params
    buffers: Params
    optimizer: OptimizerState
    states: Params
    remains: Params

    def first(self, n: int) -> "Lanes":
        """The first n clients (views)."""
        own = (self.local, self.buffers, self.states, self.remains)
        local, buffers, states, remains = (p.lanes(tensors, slice(n)) for tensors in own)
        optimizer = {part: p.lanes(tensors, slice(n)) for part, tensors in self.optimizer.items()}
        return Lanes(local, buffers, optimizer, states, remains)


@dataclass(frozen=True)
class Now:
    """What all lanes are given for one step.

    batch: inputs and labels (clients, batch, ...); labels of padding are -100.
    keys: int64 (clients,). t: 1, 2, ... since the round began. sizes: examples of each client, int64 (clients,).
    """

    batch: Examples
    keys: Tensor
    t: int
    broadcast: Broadcast
    sizes: Tensor

    def inputs(self, work: LocalWork) -> Params:
        """What stochastic layers are given, tensors (clients,)."""
        return layer_inputs(work, self.keys, self.broadcast.round)


class Step(NamedTuple):
    """copies: (global params, clients) -> local params (clients, *shape), in the memory layout that ``take`` likes.

    take: makes one step in place; mean losses (clients,) before it.
    """

    copies: Callable[[Params, int], Params]
    take: Callable[[Lanes, Now], Tensor]


def copies(params: Params, clients: int) -> Params:
    """A copy for each client: (clients, *shape)."""
    return {name: tensor.expand(clients, *tensor.shape).clone() for name, tensor in params.items()}


def step_of(work: LocalWork, path: Path, *, compiled: bool = False) -> Step:
    """The step of a path.

    compiled: let ``torch.compile`` make code of the vectorised gradient, for one client too. The first step of every
        shape of batch takes tens of seconds.

    Raises:
        ValueError: the path cannot take this model.
    """
    if work.stopping is not None and (path != "sequential" or compiled):
        raise ValueError(f"clients that stop early train in the plain loop, not {'compiled' if compiled else path}")
    if compiled and path != "fused":
        return Step(copies, partial(_by_gradient, work, torch.compile(partial(_mapped, work))))
    match path:
        case "sequential":
            return Step(copies, partial(_by_gradient, work, partial(_alone, work)))
        case "vectorised":
            return Step(copies, partial(_by_gradient, work, partial(_mapped, work)))
    chain = chain_of(work.model)
    if chain is None:
        raise ValueError("the model is not a chain of layers that can be fused")
    if not work.objective.plain:
        raise ValueError("fused steps minimise the plain cross-entropy only")
    if work.kept:
        raise ValueError("fused steps start all clients from the same parameters")
    if work.optimizer.folded is not None and not _changes_gradients(work):
        return Step(chain.stacked, partial(_folded, work, chain))
    return Step(chain.stacked, partial(_by_gradient, work, partial(_chained, chain)))


def _by_gradient(work: LocalWork, find: Gradient, lanes: Lanes, now: Now) -> Tensor:
    start = Start(now.broadcast.params, now.sizes)
    grads, losses = find(lanes.local, lanes.buffers, now.batch, now.inputs(work), start=start)
    grads = _corrected(work, grads, lanes, now.broadcast)
    work.optimizer.step_(lanes.local, grads, lanes.optimizer, now.t, work.schedule(now.broadcast.round))
    masking.zero_(lanes.local, lanes.remains)
    return losses


def _folded(work: LocalWork, chain: Chain, lanes: Lanes, now: Now) -> Tensor:
    folded = work.optimizer.folded
    assert folded is not None  # as step_of saw
    lr, batch, decay = folded.lr * work.schedule(now.broadcast.round), now.batch, folded.weight_decay
    losses = chain.step_(lanes.local, batch.inputs, batch.labels, now.inputs(work), lr=lr, weight_decay=decay)
    masking.zero_(lanes.local, lanes.remains)  # from 0, plain SGD goes where the gradient says, and nowhere without one
    return losses


def _changes_gradients(work: LocalWork) -> bool:
    """Whether anything comes between gradients and optimizer."""
    return work.rule.correct is not same_grads or work.max_grad_norm is not None


def _corrected(work: LocalWork, grads: Params, lanes: Lanes, broadcast: Broadcast) -> Params:
    """What the optimizer is given for each client."""
    if not _changes_gradients(work):
        return masking.zeroed(grads, lanes.remains)

    def one(grads: Params, local: Params, state: Params, remains: Params) -> Params:
        return corrected(work, grads, local, broadcast, state, remains=remains)

    lanewise = (grads, lanes.local, lanes.states, lanes.remains)
    if next(iter(grads.values())).shape[0] == 1:
        return p.as_stack(one(*(p.lanes(tensors, 0) for tensors in lanewise)))
    mapped: Params = vmap(one)(*lanewise)
    return mapped


def _alone(
    work: LocalWork, local: Params, buffers: Params, batch: Examples, keys: Params, *, start: Start
) -> tuple[Params, Tensor]:
    one = Examples(batch.inputs[0], batch.labels[0])
    start = Start(start.params, torch.as_tensor(start.num_examples)[0])
    grads, loss = gradient(work, p.lanes(local, 0), p.lanes(buffers, 0), one, p.lanes(keys, 0), start=start)
    return p.as_stack(grads), loss[None]


def _mapped(
    work: LocalWork, local: Params, buffers: Params, batch: Examples, keys: Params, *, start: Start
) -> tuple[Params, Tensor]:
    def whole(
        local: Params, buffers: Params, batch: tuple[Tensor, Tensor], keys: Params, size: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Params]]:
        own = {name: buffer.clone() for name, buffer in buffers.items()}  # vmap forbids changing what it maps over
        here = Start(start.params, size)
        objective, loss = objective_at(work, local, own, Examples(*batch), keys, start=here)
        return objective, (loss, own)

    mapped, sizes = vmap(grad_and_value(whole, has_aux=True)), torch.as_tensor(start.num_examples)
    grads, (_, (losses, moved)) = mapped(local, buffers, (batch.inputs, batch.labels), keys, sizes)
    for name, buffer in buffers.items():
        buffer.copy_(moved[name])
    return grads, losses


def _chained(
    chain: Chain, local: Params, buffers: Params, batch: Examples, keys: Params, *, start: Start
) -> tuple[Params, Tensor]:
    return chain.gradient(local, batch.inputs, batch.labels, keys)
