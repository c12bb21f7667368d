"""The server's part of a round: what it sends, and what it makes of what comes back."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedsim.errors import RunError
from fedsim.federation.setup import Federation, cohort
from fedsim.params import all_finite, masked
from fedsim.pruning.pruning import masks_of
from fedsim.records import Broadcast, CohortUpdate, Params, ServerState
from fedsim.training import kept

INFORMED = "informed"  # in what pruning remembers: version of the masks that each client was sent last


def broadcast(federation: Federation, state: ServerState, round: int, clients: Sequence[int] = ()) -> Broadcast:
    """What the server sends in this round: the state's model, what the server rule adds, and masks.

    clients: to whom; those that have not been sent these masks are told them.
    """
    params, buffers = (kept.shared(tensors, federation.work.kept) for tensors in (state.params, state.buffers))
    masks, extra = masks_of(state.pruning), federation.strategy.server.extra(state.server)
    unaware = () if masks is None else _unaware(state, masks.version, clients)
    return Broadcast(params, buffers, extra, round, masks, unaware)


def _unaware(state: ServerState, version: int, clients: Sequence[int]) -> tuple[int, ...]:
    if INFORMED not in state.pruning:
        return tuple(clients)
    told = state.pruning[INFORMED].tolist()
    return tuple(client for client in clients if told[client] != version)


def _informed(federation: Federation, state: ServerState, result: CohortUpdate, round: int) -> Params:
    """What pruning remembers, with who knows the masks by now. Whoever did not answer is sent them again."""
    masks = masks_of(state.pruning)
    if masks is None:
        return state.pruning
    told = state.pruning.get(INFORMED, torch.zeros(federation.data.num_clients, dtype=torch.int64)).clone()
    told[torch.from_numpy(cohort(federation, round))] = 0
    told[torch.tensor(result.clients, dtype=torch.int64)] = masks.version
    return {**state.pruning, INFORMED: told}


def step(federation: Federation, state: ServerState, result: CohortUpdate, round: int) -> ServerState:
    """The server's part of a round. Without any update the global model stays as it is.

    Raises:
        RunError: the global model is no longer finite.
    """
    pruning = _informed(federation, state, result, round)
    if result.update is None:
        return replace(state, round=round, pruning=pruning)
    sent = kept.shared(state.params, federation.work.kept)
    params, server = federation.strategy.server.step(sent, result.update, state.server)
    if not all_finite(params):
        steps = "smaller steps (train.optimizer.lr, strategy.server_lr) may help"
        raise RunError(f"round {round}: the global model is no longer finite; {steps}")
    buffers = {**state.buffers, **(result.buffers or {})}
    masks, clients = masks_of(state.pruning), {**state.clients, **result.states}
    params = params if masks is None else masked(params, masks.kept)  # a server rule's momentum may move what is pruned
    return ServerState(round, {**state.params, **params}, buffers, server, clients, pruning)
