"""What a pruning method is: what it does to the model before training, and to the global model between rounds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fedsim.pruning import masks
from fedsim.records import Examples, Masks, Params
from fedsim.training.masking import Tickets
from fedsim.training.objective import Objective

KEPT, VERSION = "kept/", "version"  # what a memory calls its masks and their version,
ENTRIES = "entries/"  # and numbers of entries of parameters before channels were removed

Probe = Callable[[Params], Params]
Product = Callable[[Params, Params], Params]  # (parameters, direction) -> the Hessian there times the direction
Fresh = Callable[[int], tuple[Params, Params]]  # key -> parameters and buffers, drawn as the model's first ones were


@dataclass(frozen=True)
class Moment:
    """What a method sees just before a round.

    round: about to begin, 1, 2, ...; of ``rounds``.
    params, buffers: the global model. Not to be changed.
    memory: what the method left there the last time.
    key: of this moment, for its draws.
    probe: gradient of the mean loss of this round's cohort at any parameters, dense; costs the cohort a pass over its
        data, and the messages. product: Hessian of the same loss at any parameters times a direction, exactly; costs
        about two passes, and the direction in the messages.
    fresh: draws other first parameters and buffers of the model, as it was built.
    model: that these parameters belong to; only its structure counts. input_shape: of one example.
    examples: about so many training examples of the cohort, as the clients have them. In a simulation the server can
        see them; on separate machines it cannot.
    """

    round: int
    rounds: int
    params: Params
    buffers: Params
    memory: Params
    key: int
    probe: Probe
    product: Product
    fresh: Fresh
    model: nn.Module
    input_shape: tuple[int, ...]
    examples: Callable[[int], Examples]


@dataclass(frozen=True)
class Change:
    """What a method makes of a moment. ``restarted``: training begins anew, so strategies forget what they kept."""

    params: Params
    buffers: Params
    memory: Params
    restarted: bool = False


def unbound(model: nn.Module, objective: Objective) -> Objective:
    """``bind`` of a method that leaves model and objective alone."""
    return objective


def anything(model: nn.Module, input_shape: tuple[int, ...]) -> None:
    """``check`` of a method that takes any model."""


def no_memory(params: Params, buffers: Params) -> Params:
    """``start`` of a method that remembers nothing."""
    return {}


@dataclass(frozen=True)
class Pruning:
    """What ``pruning`` in a config makes. All but tickets happens at the server, which owns the masks.

    before: moment -> what changes, None for nothing. What it puts into the memory under ``kept/`` are masks: from then
        on pruned entries are 0 for everybody.
    start: (first parameters, first buffers) -> memory.
    bind: of the model, as a regulariser's; once, before anything is trained.
    check: of the built model and the shape of one example, before anything is trained; raises ``ValueError`` where the
        method will find nothing to prune.
    probes: whether ``before`` ever asks for a gradient or a product. looks: whether it ever asks for examples.
    removes: whether it removes channels.
    tickets: how clients come by masks of their own; None: they have none.
    """

    before: Callable[[Moment], Change | None]
    start: Callable[[Params, Params], Params] = no_memory
    bind: Callable[[nn.Module, Objective], Objective] = unbound
    check: Callable[[nn.Module, tuple[int, ...]], None] = anything
    probes: bool = False
    looks: bool = False
    removes: bool = False
    tickets: Tickets | None = None


def masks_of(memory: Params) -> Masks | None:
    """The masks in a memory; None if nothing has been pruned yet."""
    if VERSION not in memory:
        return None
    kept = {name.removeprefix(KEPT): tensor for name, tensor in memory.items() if name.startswith(KEPT)}
    return Masks(kept, int(memory[VERSION]))


def with_masks(memory: Params, kept: Params) -> Params:
    """The memory with these masks as its next version."""
    before = masks_of(memory)
    version = 1 if before is None else before.version + 1
    return {**memory, **{KEPT + name: mask for name, mask in kept.items()}, VERSION: torch.tensor(version)}


class Remaining(NamedTuple):
    """What is left after pruning. sparsity: share of prunable entries that is gone. by_layer: share that is not."""

    sparsity: float
    by_layer: dict[str, float]


def with_entries(memory: Params, params: Params) -> Params:
    """The memory with how large the prunable parameters are before the first channel goes."""
    found = {ENTRIES + name: torch.tensor(params[name].numel()) for name in masks.prunable(params)}
    return {**found, **memory}


def remaining_of(params: Params, memory: Params) -> Remaining | None:
    """What masks have left, or the removal of channels; None if nothing has been pruned."""
    found = masks_of(memory)
    if found is not None:
        return Remaining(1.0 - masks.remaining(found.kept), masks.by_layer(found.kept))
    before = {name.removeprefix(ENTRIES): int(n) for name, n in memory.items() if name.startswith(ENTRIES)}
    if not before:
        return None
    left = {name: params[name].numel() for name in before}
    return Remaining(1.0 - sum(left.values()) / sum(before.values()), {n: left[n] / before[n] for n in before})


def due(round: int, rounds: int, every: int, first: int = 1) -> bool:
    """Whether to prune before ``round``: after every so many rounds, and never without any round left.

    >>> [round for round in range(1, 13) if due(round, 12, every=5)]
    [6, 11]
    """
    return first < round <= rounds and (round - first) % every == 0
