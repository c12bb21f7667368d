"""Pruning in a federation: between rounds, with what the method may ask of a round's cohort."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from fedsim import rng
from fedsim.errors import RunError
from fedsim.federation.server import broadcast
from fedsim.federation.setup import Federation, cohort, input_shape, round_key
from fedsim.params import scale
from fedsim.pruning.pruning import Moment, Probe, Product
from fedsim.records import Broadcast, CohortUpdate, Examples, Params, ServerState
from fedsim.training import kept
from fedsim.training.client import directed

RESTARTED = "restarted"  # in what pruning remembers: round in which training began anew
RunCohort = Callable[[Broadcast, Sequence[int], Mapping[int, Params], int], CohortUpdate]  # of ``Cohorts``


class Probing:
    """Asks the cohort of a round for derivatives before it trains, and counts what that costs.

    All probes of a round have one key: the same batches and draws, so that they are derivatives of one function.
    """

    def __init__(self, federation: Federation, ask: RunCohort, state: ServerState, round: int) -> None:
        self.federation, self.ask, self.state, self.round = federation, ask, state, round
        self.chosen: list[int] = cohort(federation, round).tolist()
        self.up, self.down = 0, 0

    def gradient(self, at: Params) -> Params:
        """Of the mean loss of the cohort's examples at these parameters."""
        return self._asked(at, {})

    def product(self, at: Params, direction: Params) -> Params:
        """Hessian of that loss at these parameters times a direction."""
        return self._asked(at, directed(kept.shared(direction, self.federation.work.kept)))

    def _asked(self, at: Params, extra: Params) -> Params:
        key = rng.fold(round_key(self.federation, self.round), "probe")
        sent, own = kept.shared(at, self.federation.work.kept), self.state.clients
        whole = broadcast(self.federation, self.state, self.round, self.chosen)
        probe = replace(whole, params=sent, extra=extra, masks=None, probe=True)
        result = self.ask(probe, self.chosen, {client: own[client] for client in self.chosen if client in own}, key)
        self.up, self.down = self.up + result.bytes_up, self.down + result.bytes_down
        if result.update is None:
            raise RunError(f"round {self.round}: pruning needs gradients, and no client has given any")
        return scale(result.update, -1.0)

    def counted(self, result: CohortUpdate) -> CohortUpdate:
        """The round's result with the bytes of the probes."""
        return replace(result, bytes_up=result.bytes_up + self.up, bytes_down=result.bytes_down + self.down)


def pruned(federation: Federation, state: ServerState, round: int, probe: Probe, product: Product) -> ServerState:
    """The state with what pruning does before this round; the same object if that is nothing.

    probe: gradient of the mean loss of the round's cohort, at any parameters. product: its Hessian, times a direction.
    """
    if federation.pruning is None:
        return state
    key, fresh = rng.fold(round_key(federation, round), "pruning"), federation.fresh or _not_drawn
    moment = Moment(
        round,
        federation.rounds,
        state.params,
        state.buffers,
        state.pruning,
        key,
        probe,
        product,
        fresh,
        federation.work.model,
        input_shape(federation),
        partial(_examples, federation, round, key),
    )
    change = federation.pruning.before(moment)
    if change is None:
        return state
    changed = replace(state, params=change.params, buffers=change.buffers, pruning={**state.pruning, **change.memory})
    if not change.restarted:
        return changed
    sent = kept.shared(change.params, federation.work.kept)
    memory = {**changed.pruning, RESTARTED: torch.tensor(round)}
    return replace(changed, server=federation.strategy.server.init(sent), clients={}, pruning=memory)


def since(state: ServerState) -> int:
    """The round in which training last began anew; 0 if it never did. What clients kept before counts no more."""
    return int(state.pruning[RESTARTED]) if RESTARTED in state.pruning else 0


def _examples(federation: Federation, round: int, key: int, count: int) -> Examples:
    """About ``count`` training examples of the round's cohort, as many of each client, drawn by the key."""
    chosen, parts = cohort(federation, round).tolist(), []
    for client in chosen:
        own = federation.data.client(client)
        some = min(len(own), -(-count // len(chosen)))
        parts.append(own.take(rng.choice(rng.fold(key, "examples", client), len(own), some)))
    return Examples(torch.cat([own.inputs for own in parts]), torch.cat([own.labels for own in parts]))


def _not_drawn(key: int) -> tuple[Params, Params]:
    raise RunError("pruning asks for newly drawn weights, and this federation was made without a way to draw them")
