"""The round loop: choose a cohort, train it, move the global model, evaluate, tell whoever listens."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Cohorts, Engine, Job, OnNan
from fedsim.errors import RunError
from fedsim.models.drawing import UNTOLD, Draws
from fedsim.params import all_finite, masked, of, scale
from fedsim.pruning import masks as m
from fedsim.pruning.pruning import Fresh, Moment, Pruning, masks_of
from fedsim.records import (
    Broadcast,
    ClientEvaluation,
    CohortUpdate,
    Indices,
    Params,
    RoundRecord,
    ServerState,
)
from fedsim.strategies.strategy import Strategy
from fedsim.training import kept
from fedsim.training.client import LocalWork
from fedsim.training.evaluate import Floats, Scores, by_owner

Sampling = Literal["fixed", "poisson"]

INFORMED = "informed"  # in what pruning remembers: version of the masks that each client was sent last
LISTED_CLIENTS = 2000  # with more clients only the last round's evaluation lists every one of them


@dataclass(frozen=True)
class Federation:
    """One federation, ready to run. Everything but the server's state, which changes from round to round.

    clients_per_round: cohort size (fixed), or its expectation (poisson).
    eval_every: evaluate after every so many rounds, and after the last.
    draws: of the model, to be told.
    pooled: names of running means and variances, in pairs, of which the variances are pooled and not averaged.
    pruning: what the server prunes between rounds. fresh: draws other first parameters and buffers, for it.
    """

    seed: int
    data: FederatedData
    work: LocalWork
    strategy: Strategy
    rounds: int
    clients_per_round: int
    sampling: Sampling
    eval_every: int
    on_nan: OnNan
    draws: Draws = UNTOLD
    pooled: tuple[tuple[str, str], ...] = ()
    pruning: Pruning | None = None
    fresh: Fresh | None = None


@dataclass(frozen=True)
class RoundResult:
    """What one round leaves behind."""

    state: ServerState
    record: RoundRecord
    evaluations: tuple[ClientEvaluation, ...]


def job(federation: Federation) -> Job:
    """What an engine needs of a federation."""
    f = federation
    return Job(f.work, f.data, f.strategy, f.on_nan, f.clients_per_round, f.rounds, f.pooled)


def start(federation: Federation) -> ServerState:
    """State before the first round: the model's own parameters and buffers, and the server rule's first state.

    Tensors that stay with clients are among them, and never change here.
    """
    params, buffers = of(federation.work.model)
    sent = kept.shared(params, federation.work.kept)
    memory = {} if federation.pruning is None else federation.pruning.start(params, buffers)
    return ServerState(0, params, buffers, federation.strategy.server.init(sent), {}, memory)


def cohort(federation: Federation, round: int) -> Indices:
    """Clients of a round, ascending: int64 (m,). A function of the seed and the round alone.

    fixed: exactly ``clients_per_round``, without replacement, all sets equally likely.
    poisson: each client by itself with probability ``clients_per_round / clients``; may be empty.
    """
    key, n = rng.fold(federation.seed, "round", round, "cohort"), federation.data.num_clients
    if federation.sampling == "fixed":
        return rng.choice(key, n, federation.clients_per_round).numpy()
    draws = rng.uniform(key, n, dtype=torch.float64)  # float32 is too coarse for one client out of a million
    return np.flatnonzero((draws < federation.clients_per_round / n).numpy())


def run(
    federation: Federation, state: ServerState, engine: Engine, on_round: Callable[[RoundResult], None]
) -> ServerState:
    """Run the rounds after ``state.round`` up to ``federation.rounds``.

    Args:
        federation: what to run.
        state: from :func:`start`, or of the last whole round of an earlier run.
        engine: where clients run.
        on_round: called with every finished round, in order; a fresh run first reports round 0, the initial model.

    Returns:
        State after the last round.

    Raises:
        ClientError: a client diverged and ``on_nan`` is "fail".
        RunError: the global model is no longer finite.
    """
    final = [state]

    def loop(cohorts: Cohorts) -> None:
        if state.round == 0:
            on_round(_initial(federation, cohorts, state))
        for round in range(state.round + 1, federation.rounds + 1):
            result = _round(federation, cohorts, final[0], round)
            final[0] = result.state
            on_round(result)

    engine.drive(job(federation), loop)
    return final[0]


def _initial(federation: Federation, cohorts: Cohorts, state: ServerState) -> RoundResult:
    began = time.perf_counter()
    nothing = CohortUpdate(None, None, (), (), (), {}, {}, 0, 0)
    return _evaluated(federation, cohorts, state, nothing, began)


def _round(federation: Federation, cohorts: Cohorts, state: ServerState, round: int) -> RoundResult:
    began = time.perf_counter()
    chosen: list[int] = cohort(federation, round).tolist()
    probing = _Probing(federation, cohorts, state, round, chosen)
    state = pruned(federation, state, round, probing.gradient)
    states = {client: state.clients[client] for client in chosen if client in state.clients}
    sent = broadcast(federation, state, round, chosen)
    result = probing.counted(cohorts.run_cohort(sent, chosen, states, round_key(federation, round)))
    return _evaluated(federation, cohorts, step(federation, state, result, round), result, began)


class _Probing:
    """Asks the cohort of a round for gradients before it trains, and counts what that costs."""

    def __init__(
        self, federation: Federation, cohorts: Cohorts, state: ServerState, round: int, chosen: Sequence[int]
    ) -> None:
        self.federation, self.cohorts, self.round, self.chosen = federation, cohorts, round, chosen
        self.sent = broadcast(federation, state, round, chosen)
        self.states = {client: state.clients[client] for client in chosen if client in state.clients}
        self.asked, self.up, self.down = 0, 0, 0

    def gradient(self, at: Params) -> Params:
        """Of the mean loss of the cohort's examples at these parameters."""
        key = rng.fold(round_key(self.federation, self.round), "probe", self.asked)
        probe = replace(self.sent, params=kept.shared(at, self.federation.work.kept), masks=None, probe=True)
        result = self.cohorts.run_cohort(probe, self.chosen, self.states, key)
        self.asked, self.up, self.down = self.asked + 1, self.up + result.bytes_up, self.down + result.bytes_down
        if result.update is None:
            raise RunError(f"round {self.round}: pruning needs gradients, and no client has given any")
        return scale(result.update, -1.0)

    def counted(self, result: CohortUpdate) -> CohortUpdate:
        """The round's result with the bytes of the probes."""
        return replace(result, bytes_up=result.bytes_up + self.up, bytes_down=result.bytes_down + self.down)


def pruned(federation: Federation, state: ServerState, round: int, probe: Callable[[Params], Params]) -> ServerState:
    """The state with what pruning does before this round; the same object if that is nothing.

    probe: gradient of the mean loss of the round's cohort, at any parameters.
    """
    if federation.pruning is None:
        return state
    key, fresh = rng.fold(round_key(federation, round), "pruning"), federation.fresh or _not_drawn
    moment = Moment(round, federation.rounds, state.params, state.buffers, state.pruning, key, probe, fresh)
    change = federation.pruning.before(moment)
    if change is None:
        return state
    changed = replace(state, params=change.params, buffers=change.buffers, pruning={**state.pruning, **change.memory})
    if not change.restarted:
        return changed
    sent = kept.shared(change.params, federation.work.kept)
    return replace(changed, server=federation.strategy.server.init(sent), clients={})


def round_key(federation: Federation, round: int) -> int:
    """Key of a round, below which all its clients draw."""
    return rng.fold(federation.seed, "round", round)


def _not_drawn(key: int) -> tuple[Params, Params]:
    raise RunError("pruning asks for newly drawn weights, and this federation was made without a way to draw them")


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
    told = state.pruning[INFORMED]
    return tuple(client for client in clients if int(told[client]) != version)


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


def _evaluated(
    federation: Federation, cohorts: Cohorts, state: ServerState, result: CohortUpdate, began: float
) -> RoundResult:
    """The round's record; with held-out loss and accuracy when it is a round of evaluation."""
    round, record = state.round, unevaluated(state, result)
    if not evaluates(federation, round):
        return RoundResult(state, replace(record, seconds=time.perf_counter() - began), ())
    data = federation.data
    scores, on_clients = _scores(federation, cohorts, state)
    own = by_owner(on_clients, data.test_partition)
    loss, accuracy = scores.mean()
    record = with_spread(replace(record, loss=loss, accuracy=accuracy), own.accuracy)
    listed = data.test_partition.num_clients <= LISTED_CLIENTS or round == federation.rounds
    return RoundResult(state, replace(record, seconds=time.perf_counter() - began), own.lines(round) if listed else ())


def _scores(federation: Federation, cohorts: Cohorts, state: ServerState) -> tuple[Scores, Scores]:
    """Of the held-out examples, and of the same as the clients have them.

    Where clients keep a part of the model, the global one is no model alone: both are of the clients' own.
    """
    data, model = federation.data, broadcast(federation, state, state.round)
    if federation.work.kept:
        own = _own_scores(federation, cohorts, state)
        return own, own
    scores = cohorts.evaluate(model, data.test)
    return scores, scores if data.client_test is data.test else cohorts.evaluate(model, data.client_test)


def _own_scores(federation: Federation, cohorts: Cohorts, state: ServerState) -> Scores:
    """Of each client's held-out examples by the global model with what that client keeps; 0 for those of nobody.

    A client that never took part has what the model began with.
    """
    data, work, model = federation.data, federation.work, broadcast(federation, state, state.round)
    held, trained = data.test_partition, sorted(state.clients)
    fresh = np.setdiff1d(np.arange(data.num_clients), trained).tolist()
    scores = Scores(*(torch.zeros(len(data.client_test), dtype=torch.float64) for _ in range(3)))
    for clients in [*([fresh] if fresh else []), *([k] for k in trained)]:
        rows = torch.from_numpy(np.concatenate([held.client(k) for k in clients]))
        if len(rows):
            own = kept.own(work.model, work.kept, state.clients.get(clients[0], {}))
            whole = replace(model, params={**model.params, **own.params}, buffers={**model.buffers, **own.buffers})
            found = cohorts.evaluate(whole, data.client_test.take(rows))
            for name, column in vars(scores).items():
                column[rows] = getattr(found, name)
    return scores


def evaluates(federation: Federation, round: int) -> bool:
    """Whether the model is evaluated after this round."""
    return round % federation.eval_every == 0 or round == federation.rounds


def unevaluated(state: ServerState, result: CohortUpdate) -> RoundRecord:
    """What a round's record says of its clients, before the model is evaluated and the time is taken.

    state: after the round.
    """
    masks = masks_of(state.pruning)
    return RoundRecord(
        round=state.round,
        sparsity=None if masks is None else 1.0 - m.remaining(masks.kept),
        remaining={} if masks is None else m.by_layer(masks.kept),
        loss=None,
        accuracy=None,
        train_loss=result.metrics.get("train_loss"),
        clients=len(result.clients),
        seconds=0.0,
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        cohort=result.clients,
        skipped=result.skipped,
        epochs=result.metrics.get("epochs"),
    )


def with_spread(record: RoundRecord, accuracies: Floats) -> RoundRecord:
    """Add mean, population standard deviation and mean of the worst tenth (rounded up) over clients, if any."""
    if not len(accuracies):
        return record
    ordered = np.sort(accuracies)
    return replace(
        record,
        client_accuracy_mean=float(ordered.mean()),
        client_accuracy_std=float(ordered.std()),
        client_accuracy_worst_tenth=float(ordered[: math.ceil(len(ordered) / 10)].mean()),
    )
