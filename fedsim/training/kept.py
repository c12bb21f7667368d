"""Tensors of the model that stay with a client: each trains its own, and neither server nor other clients see them.

Their names are in ``LocalWork.kept``. A broadcast and an update are without them; between rounds they lie in the
client's state, beside what the strategy's local rule keeps, under names that begin with ``kept/``.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fedsim import params as p
from fedsim.records import Params
from fedsim.training.masking import KNOWN, TICKET, ticket

PREFIX = "kept/"  # no parameter's name begins like this unless a module's name has a slash in it
RESIDUAL = "residual/"  # another prefix in a client's state: what its compressed updates have lost so far
_NOT_THE_RULES = (PREFIX, RESIDUAL, TICKET, KNOWN)


class Own(NamedTuple):
    """What a client has of its own: parameters that it trains, and all else."""

    params: Params
    buffers: Params


def shared(tensors: Params, kept: Collection[str]) -> Params:
    """What is sent: the tensors without those that stay with a client."""
    return {name: tensor for name, tensor in tensors.items() if name not in kept} if kept else tensors


def own(model: nn.Module, kept: Sequence[str], state: Params) -> Own:
    """The tensors that a client keeps, as it left them; the model's first ones if it never took part. No copies."""
    if not kept:
        return Own({}, {})
    parameters = dict(model.named_parameters())
    first: dict[str, Tensor] = {**parameters, **dict(model.named_buffers())}
    found = {name: state.get(PREFIX + name, first[name].detach()) for name in kept}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    return Own(
        {name: tensor for name, tensor in found.items() if name in trained},
        {name: tensor for name, tensor in found.items() if name not in trained},
    )


def whole(model: nn.Module, kept: Sequence[str], sent: Own, state: Params) -> Own:
    """The model of a client with this state: what it is sent, with what it keeps, under its own masks if it has any.

    sent: from the server, without what stays with clients.
    """
    had = own(model, kept, state)
    params = p.masked({**sent.params, **had.params}, ticket(state))
    return Own(params, {**sent.buffers, **had.buffers})


def as_state(tensors: Params, kept: Sequence[str]) -> Params:
    """What a client's state holds of these tensors."""
    return {PREFIX + name: tensors[name] for name in kept}


def rule_state(state: Params) -> Params:
    """What the strategy's local rule has in a client's state."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_NOT_THE_RULES)}
