"""What a pruning method is: what it does to the model before training, and to the global model between rounds."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fedsim.records import Masks, Params
from fedsim.training.objective import Objective

KEPT, VERSION = "kept/", "version"  # what a memory calls its masks and their version

Probe = Callable[[Params], Params]
Fresh = Callable[[int], tuple[Params, Params]]  # key -> parameters and buffers, drawn as the model's first ones were


@dataclass(frozen=True)
class Moment:
    """What a method sees just before a round.

    round: about to begin, 1, 2, ...; of ``rounds``.
    params, buffers: the global model. Not to be changed.
    memory: what the method left there the last time.
    key: of this moment, for its draws.
    probe: gradient of the mean loss of this round's cohort at any parameters, dense; costs the cohort a pass over its
        data, and the messages.
    fresh: draws other first parameters and buffers of the model.
    """

    round: int
    rounds: int
    params: Params
    buffers: Params
    memory: Params
    key: int
    probe: Probe
    fresh: Fresh


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


def no_memory(params: Params, buffers: Params) -> Params:
    """``start`` of a method that remembers nothing."""
    return {}


@dataclass(frozen=True)
class Pruning:
    """What ``pruning`` in a config makes. Everything happens at the server, which owns the masks.

    before: moment -> what changes, None for nothing. What it puts into the memory under ``kept/`` are masks: from then
        on pruned entries are 0 for everybody.
    start: (first parameters, first buffers) -> memory.
    bind: of the model, as a regulariser's; once, before anything is trained.
    probes: whether ``before`` ever asks for a gradient.
    """

    before: Callable[[Moment], Change | None]
    start: Callable[[Params, Params], Params] = no_memory
    bind: Callable[[nn.Module, Objective], Objective] = field(default=unbound)
    probes: bool = False


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


def due(round: int, rounds: int, every: int, first: int = 1) -> bool:
    """Whether to prune before ``round``: after every so many rounds, and never without any round left.

    >>> [round for round in range(1, 13) if due(round, 12, every=5)]
    [6, 11]
    """
    return first < round <= rounds and (round - first) % every == 0
