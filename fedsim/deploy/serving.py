"""The round loop of a federation on separate machines.

It differs from the simulated one in three things. Not everybody of a cohort answers, and what somebody answers may be
wrong: a round goes on with the rest, and its record says why each of the others is missing. A client trains and says
how the model it is sent does in the same reply, so what clients say of the model after round r comes with round r + 1,
and round r is recorded then; the last one is asked for by itself. And what a client keeps stays with the client.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from flwr.app import Message, RecordDict

from fedsim import federation as rounds
from fedsim.deploy import contents as c
from fedsim.deploy.members import Members
from fedsim.engines.engine import client_key
from fedsim.engines.flower import messages as m
from fedsim.engines.folding import alone, blocks, fold, join
from fedsim.errors import RunError
from fedsim.federation import Federation, RoundResult
from fedsim.records import Broadcast, ClientEvaluation, ClientUpdate, CohortUpdate, Params, ServerState, StackedUpdate
from fedsim.training.evaluate import score
from fedsim.transforms.outgoing import reading


@dataclass(frozen=True)
class Rules:
    """What a server puts up with.

    clients: that must be there before the first round. min_clients: of a cohort, that must be there before any round.
    wait_s: for clients that must be there, before giving up. round_timeout_s: for the replies of a round.
    max_norm_ratio: an update whose norm is more than so many times the cohort's (lower) median is left out.
    """

    clients: int
    min_clients: int
    wait_s: float
    round_timeout_s: float
    max_norm_ratio: float


@dataclass(frozen=True)
class Replies:
    """What came of the messages of a round. Bytes are of message contents, of those sent and those received."""

    updates: Mapping[int, ClientUpdate]
    sizes: Mapping[int, int]  # of the replies, in bytes
    evaluations: tuple[ClientEvaluation, ...]
    failed: Mapping[int, str]
    bytes_down: int


def serve(
    federation: Federation,
    state: ServerState,
    members: Members,
    rules: Rules,
    on_round: Callable[[RoundResult], None],
) -> ServerState:
    """Run the rounds after ``state.round`` with whoever is there.

    on_round: called with every whole round, in order; a fresh run first reports round 0.

    Returns:
        State after the last round.

    Raises:
        RunError: too few clients came, or the global model is no longer finite.
    """
    members.wait(rules.clients, rules.wait_s)
    if state.round == 0:
        nothing = CohortUpdate(None, None, (), (), (), {}, {}, 0, 0)
        on_round(_scored(federation, state, nothing, Replies({}, {}, (), {}, 0), time.perf_counter()))
    pending: RoundResult | None = None
    for round in range(state.round + 1, federation.rounds + 1):
        began = time.perf_counter()
        cohort: list[int] = rounds.cohort(federation, round).tolist()
        here = members.wait(min(rules.min_clients, len(cohort)), rules.wait_s, cohort)
        nodes = {client: here.get(client) for client in cohort}
        stage = rounds.fitted(federation, state.params)
        probing = rounds.Probing(stage, _asking(stage, nodes, members, rules, since=rounds.since(state)), state, round)
        changed = rounds.pruned(stage, state, round, probing.gradient, probing.product)
        due = rounds.evaluates(federation, round - 1)
        if pending is not None and changed is not state:  # what comes next is not the model that clients are to score
            scores = _ask_all(federation, state, members, rules) if due else ()
            on_round(_with_clients(federation, pending, scores))
            pending = None
        state = changed
        broadcast = rounds.broadcast(federation, state, round, cohort)
        asked = pending is not None and due
        key = rounds.round_key(federation, round)
        replies = _train(
            federation, broadcast, nodes, members, rules, key=key, evaluate=asked, since=rounds.since(state)
        )
        if pending is not None:
            on_round(_with_clients(federation, pending, replies.evaluations))
        result = probing.counted(_aggregate(federation, broadcast, replies, members))
        state = rounds.step(federation, state, result, round)
        pending = _scored(federation, state, result, replies, began)
    if pending is not None:
        on_round(_with_clients(federation, pending, _ask_all(federation, state, members, rules)))
    return state


def _asking(
    federation: Federation, nodes: Mapping[int, int | None], members: Members, rules: Rules, *, since: int
) -> rounds.RunCohort:
    """How gradients are asked for: of whoever of the cohort is there, and with those of whoever answers."""

    def ask(broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int) -> CohortUpdate:
        replies = _train(federation, broadcast, nodes, members, rules, key=key, evaluate=False, since=since)
        return _aggregate(federation, broadcast, replies, members)

    return ask


def _train(
    federation: Federation,
    broadcast: Broadcast,
    nodes: Mapping[int, int | None],
    members: Members,
    rules: Rules,
    *,
    key: int,
    evaluate: bool,
    since: int,
) -> Replies:
    """Send the model to the cohort, and read and check what comes back. ``nodes``: None for a client that is away."""
    packed, round = m.packed_for(broadcast, [k for k, node in nodes.items() if node is not None]), broadcast.round
    facts = replace(members.facts, evaluate=evaluate, since=since)
    here = {client: node for client, node in nodes.items() if node is not None}
    contents = {
        node: c.with_facts(m.train_content(packed[k], k, client_key(key, k)), facts) for k, node in here.items()
    }
    replies = members.post.exchange(contents, c.TRAIN, rules.round_timeout_s, str(round))
    failed = {client: "not connected" for client in nodes if client not in here}
    updates, sizes, evaluations = {}, {}, []
    for client, node in here.items():
        try:
            content = _content(replies[node])
            coded = reading(federation.compression, broadcast, client_key(key, client))
            tickets = federation.work.tickets is not None
            read = m.read_update(content, broadcast, client, tickets=tickets, reading=coded)
            updates[client] = _checked(read, members.size(client))
            scores = c.read_scores(content, client, round - 1) if evaluate else None
        except ValueError as error:
            updates.pop(client, None)
            failed[client] = str(error)
            continue
        sizes[client] = m.content_bytes(content)
        evaluations += [scores] if scores else []
    failed |= _out_of_proportion(updates, rules.max_norm_ratio)
    what = f"round {round}, gradients" if broadcast.probe else f"round {round}"
    for client, reason in sorted(failed.items()):
        members.say(f"{what}: without client {client}: {reason}")
    kept = {client: update for client, update in updates.items() if client not in failed}
    down = sum(m.content_bytes(content) for content in contents.values())
    return Replies(kept, sizes, tuple(evaluations), dict(sorted(failed.items())), down)


def _content(reply: Message | str) -> RecordDict:
    if isinstance(reply, str):
        raise ValueError(reply)
    if reply.has_error():
        raise ValueError(str(reply.error.reason) or f"Flower's error {reply.error.code}")
    return reply.content


def _checked(update: ClientUpdate, num_examples: int) -> ClientUpdate:
    """The update, if its numbers can be true."""
    if update.num_examples != num_examples:
        raise ValueError(f"says it has {update.num_examples} examples, having joined with {num_examples}")
    wrong = [name for name, value in update.metrics.items() if not math.isfinite(value)]
    tensors = {**update.update, **update.buffers}
    wrong += [name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if wrong:
        raise ValueError(f"{wrong[0]} is not finite")
    return update


def _out_of_proportion(updates: Mapping[int, ClientUpdate], limit: float) -> dict[int, str]:
    """Updates too long for their cohort, in words; a median cannot be moved by fewer than half of them."""
    norms = {client: _norm(update) for client, update in updates.items()}
    if len(norms) < 2:
        return {}
    median = statistics.median_low(norms.values())
    return {
        client: f"its update has norm {norm:.3g}, {norm / median:.0f} times the cohort's median (limit {limit:g})"
        for client, norm in norms.items()
        if median > 0 and norm > limit * median
    }


def _norm(update: ClientUpdate) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in update.update.values()))


def _aggregate(federation: Federation, broadcast: Broadcast, replies: Replies, members: Members) -> CohortUpdate:
    """Fold the updates in the order in which every engine does."""
    job = rounds.job(federation)
    lengths = np.zeros(federation.data.num_clients, dtype=np.int64)
    for client in replies.updates:
        lengths[client] = members.size(client)
    cohort = blocks(np.concatenate([[0], np.cumsum(lengths)]), list(replies.updates))

    def stacked(block: Sequence[int]) -> list[StackedUpdate]:
        return [alone(replies.updates[client], replies.sizes[client]) for client in block]

    parts = (fold(job, broadcast, stacked(block)) for block in cohort)
    return join(job, broadcast, parts, bytes_down=replies.bytes_down)


def _scored(
    federation: Federation, state: ServerState, result: CohortUpdate, replies: Replies, began: float
) -> RoundResult:
    """A round without what its clients say of its model: that comes later.

    Where clients have models of their own, the server has none to test after the first round.
    """
    record = replace(rounds.unevaluated(state, result), failed=replies.failed)
    record = rounds.with_tickets(record, {client: replies.updates[client].kept for client in result.clients})
    if rounds.evaluates(federation, state.round) and not (federation.work.personal and state.round):
        model = rounds.fitted(federation, state.params).work.model
        loss, accuracy = score(model, state.params, state.buffers, federation.data.test).mean()
        record = replace(record, loss=loss, accuracy=accuracy)
    return RoundResult(state, replace(record, seconds=time.perf_counter() - began), ())


def _with_clients(federation: Federation, result: RoundResult, evaluations: Sequence[ClientEvaluation]) -> RoundResult:
    """The round with what clients say; where they have models of their own, its loss and accuracy are theirs, too."""
    accuracies = np.array([one.accuracy for one in evaluations], dtype=np.float64)
    record = rounds.with_spread(result.record, accuracies)
    if federation.work.personal and evaluations:
        weights = [one.num_examples for one in evaluations]
        loss = float(np.average([one.loss for one in evaluations], weights=weights))
        record = replace(record, loss=loss, accuracy=float(np.average(accuracies, weights=weights)))
    return replace(result, record=record, evaluations=tuple(sorted(evaluations, key=lambda one: one.client)))


def _ask_all(
    federation: Federation, state: ServerState, members: Members, rules: Rules
) -> tuple[ClientEvaluation, ...]:
    """How the final model does at every client that is there; one that does not answer is left out."""
    packed = m.pack_broadcast(rounds.broadcast(federation, state, state.round))
    here = members.here()
    facts = replace(members.facts, since=rounds.since(state))
    contents = {node: c.with_facts(m.train_content(packed, client, 0), facts) for client, node in here.items()}
    replies = members.post.exchange(contents, c.EVALUATE, rules.round_timeout_s, "evaluate")
    found = []
    for client, node in here.items():
        try:
            scores = c.read_scores(_content(replies[node]), client, state.round)
        except ValueError as error:
            members.say(f"client {client} does not say how the final model does: {error}")
            continue
        found += [scores] if scores else []
    return tuple(found)


def end(members: Members, timeout_s: float) -> None:
    """Tell every client that is there that the run is over. Whoever does not answer will notice by itself."""
    here = members.here()
    contents = {node: c.with_facts(RecordDict(), members.facts) for node in here.values()}
    try:
        members.post.exchange(contents, c.END, timeout_s)
    except RunError:
        return
