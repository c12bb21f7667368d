"""A round's record: what the clients said, and how the model does on held-out examples."""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from fedsim.engines.engine import Cohorts
from fedsim.federation.server import broadcast
from fedsim.federation.setup import Federation, RoundResult
from fedsim.pruning.pruning import remaining_of
from fedsim.pruning.tickets import drawn
from fedsim.records import CohortUpdate, Params, RoundRecord, ServerState
from fedsim.training import kept, masking
from fedsim.training.evaluate import Floats, Scores, by_owner

LISTED_CLIENTS = 2000  # with more clients only the last round's evaluation lists every one of them


def evaluated(
    federation: Federation, cohorts: Cohorts, state: ServerState, result: CohortUpdate, began: float
) -> RoundResult:
    """The round's record; with held-out loss and accuracy when it is a round of evaluation."""
    tickets = {client: masking.ticket(own) for client, own in result.states.items()}
    round, record = state.round, with_tickets(unevaluated(state, result), tickets)
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

    Where clients have models of their own, of which the global one is but a part, both are of those.
    """
    data, model = federation.data, broadcast(federation, state, state.round)
    if federation.work.personal:
        own = _own_scores(federation, cohorts, state)
        return own, own
    scores = cohorts.evaluate(model, data.test)
    return scores, scores if data.client_test is data.test else cohorts.evaluate(model, data.client_test)


def _own_scores(federation: Federation, cohorts: Cohorts, state: ServerState) -> Scores:
    """Of each client's held-out examples by that client's own model; 0 for those of nobody.

    A client that never took part has the global model, with what it began with of what it would keep.
    """
    data, work, model = federation.data, federation.work, broadcast(federation, state, state.round)
    held, trained = data.test_partition, sorted(state.clients)
    fresh = np.setdiff1d(np.arange(data.num_clients), trained).tolist()
    scores = Scores(*(torch.zeros(len(data.client_test), dtype=torch.float64) for _ in range(3)))
    for clients in [*([fresh] if fresh else []), *([k] for k in trained)]:
        rows = torch.from_numpy(np.concatenate([held.client(k) for k in clients]))
        if len(rows):
            sent, held_back = kept.Own(model.params, model.buffers), state.clients.get(clients[0], {})
            own = kept.whole(work.model, work.kept, sent, held_back)
            whole = replace(model, params=own.params, buffers=own.buffers)
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
    left = remaining_of(state.params, state.pruning)
    return RoundRecord(
        round=state.round,
        sparsity=None if left is None else left.sparsity,
        remaining={} if left is None else left.by_layer,
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


def with_tickets(record: RoundRecord, tickets: Mapping[int, Params]) -> RoundRecord:
    """Add what the masks of its clients' own come to, by client, if they have any."""
    found = drawn(tickets)
    if found is None:
        return record
    return replace(record, sparsity=found.sparsity, remaining=found.by_layer, overlap=found.overlap)


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
