"""Masks in local training: what is pruned is 0 when a client starts, and after every step.

A client has its own masks, a *ticket*, in its state, or else the server's, which come with the broadcast. A mask is
passed on here as what it takes away: ``pruned`` is true where an entry is 0. Gradients are zeroed before the optimizer
sees them, so that no momentum remembers a pruned entry, and parameters after it, whatever it did.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsim import params as p
from fedsim.records import Broadcast, Masks, Params

TICKET = "ticket/"  # prefixes in a client's state, beside ``kept.PREFIX``: its own masks,
KNOWN = "masks/"  # and what it knows of the server's, for messages that do not repeat them


def ticket(state: Mapping[str, Tensor]) -> Params:
    """The client's own masks, bool by parameter name; {} if it has none."""
    return {name.removeprefix(TICKET): tensor for name, tensor in state.items() if name.startswith(TICKET)}


def as_state(kept: Params) -> Params:
    """What a client's state holds of its own masks."""
    return {TICKET + name: tensor for name, tensor in kept.items()}


def pruned(broadcast: Broadcast, state: Params) -> Params:
    """Entries that are 0 for a client with this state, bool by parameter name; {} where nothing is pruned."""
    kept = ticket(state) or (broadcast.masks.kept if broadcast.masks is not None else {})
    return {name: ~mask for name, mask in kept.items()}


def stacked(broadcast: Broadcast, states: Sequence[Params]) -> Params:
    """The same for several clients: (clients, *shape). Masks of the server are not copied."""
    if any(ticket(state) for state in states):
        return p.stack([pruned(broadcast, state) for state in states])
    shared = pruned(broadcast, {})
    return {name: mask.expand(len(states), *mask.shape) for name, mask in shared.items()}


def remembered(masks: Masks | None) -> Params:
    """What a client that keeps its state between messages holds of the server's masks."""
    if masks is None:
        return {}
    kept = {KNOWN + name: mask for name, mask in masks.kept.items()}
    return {**kept, KNOWN: torch.tensor(masks.version)}


def known(state: Params) -> Masks | None:
    """The masks in such a state; None if there are none."""
    if KNOWN not in state:
        return None
    kept = {name.removeprefix(KNOWN): mask for name, mask in state.items() if name.startswith(KNOWN) and name != KNOWN}
    return Masks(kept, int(state[KNOWN]))


def without_known(state: Params) -> Params:
    """The state but for what it holds of the server's masks."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(KNOWN)}


def zeroed(tensors: Params, pruned: Params) -> Params:
    """``tensors`` with 0 where they are pruned."""
    return {name: t.masked_fill(pruned[name], 0) if name in pruned else t for name, t in tensors.items()}


def zero_(tensors: Params, pruned: Params) -> None:
    """The same in place."""
    for name, mask in pruned.items():
        tensors[name].masked_fill_(mask, 0)


def version(broadcast: Broadcast) -> int:
    """Of the server's masks; 0 if there are none."""
    return 0 if broadcast.masks is None else broadcast.masks.version
