"""Masks in local training: what is pruned is 0 when a client starts, and after every step.

A client has its own masks, a *ticket*, in its state, or else the server's, which come with the broadcast. A mask is
passed on here as bits: ``remains`` has ones where an entry remains, zeros where it is pruned. Gradients are zeroed
before the optimizer sees them, so that no momentum remembers a pruned entry, and parameters after it, whatever it did.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedsim import params as p
from fedsim.records import Broadcast, Examples, Masks, Params

TICKET = "ticket/"  # prefixes in a client's state, beside ``kept.PREFIX``: its own masks,
KNOWN = "masks/"  # and what it knows of the server's, for messages that do not repeat them

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by the bytes of a number


class Opening(NamedTuple):
    """How a client's turn begins: its state, with its ticket, and the parameters that it starts from.

    start: as sent, the very object, or others with the same names; of the whole model, before any mask.
    """

    state: Params
    start: Params


@dataclass(frozen=True)
class Tickets:
    """How clients come by masks of their own.

    validation: share of a client's examples that it does not train on, but is judged by, in [0, 1).
    opened: (model, names of what stays with clients, broadcast, examples to judge by, state) -> opening. Pure, and can
        be pickled; the model holds its first values. Every client has a ticket from its first turn on, for the same
        parameters as all others, if only one that keeps everything.
    """

    validation: float
    opened: Callable[[nn.Module, Sequence[str], Broadcast, Examples, Params], Opening]


def ticket(state: Mapping[str, Tensor]) -> Params:
    """The client's own masks, bool by parameter name; {} if it has none."""
    return {name.removeprefix(TICKET): tensor for name, tensor in state.items() if name.startswith(TICKET)}


def as_state(kept: Params) -> Params:
    """What a client's state holds of its own masks."""
    return {TICKET + name: tensor for name, tensor in kept.items()}


def remains(broadcast: Broadcast, state: Params) -> Params:
    """What is 0 for a client with this state, by parameter name, for :func:`zeroed`; {} where nothing is pruned."""
    kept = ticket(state) or (broadcast.masks.kept if broadcast.masks is not None else {})
    return {name: bits(mask, broadcast.params[name].dtype) for name, mask in kept.items()}


def stacked(broadcast: Broadcast, states: Sequence[Params]) -> Params:
    """The same for several clients: (clients, *shape). Masks of the server are not copied."""
    if any(ticket(state) for state in states):
        return p.stack([remains(broadcast, state) for state in states])
    shared = remains(broadcast, {})
    return {name: mask.expand(len(states), *mask.shape) for name, mask in shared.items()}


def bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as integers that are as wide as numbers of ``dtype``: all bits are 1 where it is true, 0 elsewhere.

    ``and`` with a number's bits leaves it or makes it +0, twenty times as fast as ``masked_fill_`` on a CPU.
    """
    return -mask.to(_INTEGERS[dtype.itemsize])


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


def zeroed(tensors: Params, remains: Params) -> Params:
    """``tensors`` with +0 where they are pruned; the others keep their bits."""
    return {name: _and(t, remains[name]) if name in remains else t for name, t in tensors.items()}


def _and(tensor: Tensor, mask: Tensor) -> Tensor:
    return (tensor.view(mask.dtype) & mask).view(tensor.dtype)


def zero_(tensors: Params, remains: Params) -> None:
    """The same in place."""
    for name, mask in remains.items():
        tensors[name].view(mask.dtype).bitwise_and_(mask)


def version(broadcast: Broadcast) -> int:
    """Of the server's masks; 0 if there are none."""
    return 0 if broadcast.masks is None else broadcast.masks.version
