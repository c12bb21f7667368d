"""The round loop of separate machines, on a grid in this process: the numbers of ``reference``, and what goes wrong."""

import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import CASES, CLIENTS, PLAINLY, federation, result, tensors
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedsim import params as p
from fedsim.deploy import contents, participation, serving
from fedsim.deploy.members import Members, Post
from fedsim.deploy.states import States
from fedsim.engines.flower import messages as m
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import quiet_log, task_identity
from fedsim.engines.reference import reference
from fedsim.errors import RunError
from fedsim.federation import run, start
from fedsim.pruning.magnitude import magnitude
from fedsim.pruning.pruning import masks_of
from fedsim.pruning.saliency import snip
from fedsim.records import Partition
from fedsim.transforms.outgoing import reading

RUN = "0123456789abcdef" * 2
RULES = serving.Rules(clients=1, min_clients=1, wait_s=0.5, round_timeout_s=5, max_norm_ratio=30)
PRUNED = ("sparsity", "remaining", "overlap")
SETTINGS = {"seed": 5, "train.optimizer.lr": 0.1}


class Tampered(InProcessGrid):
    """A grid some of whose nodes are away, or whose replies somebody has changed."""

    away: frozenset[int] = frozenset()
    change = staticmethod(lambda message, reply: reply)

    def get_node_ids(self):
        return [node for i, node in enumerate(self.nodes) if i not in self.away]

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for message, key in zip(messages, ids, strict=True):
            self._replies[key] = self.change(message, self._replies[key])
            if self._replies[key] is None:
                del self._replies[key]
        return ids


def participant(made, client, folder, /, **changes):
    data = made.data
    test = data.client_test.take(torch.from_numpy(data.test_partition.client(client)))
    states = States(folder / str(client))
    who = participation.Participant(
        client, made.work, data.client(client), test, False, SETTINGS, states, lambda _: None, made.compression
    )
    return replace(who, **changes)


@contextmanager
def members_of(made, folder, said=None, registered=None, **changes):
    people = [participant(made, client, folder, **changes.get(f"client{client}", {})) for client in range(CLIENTS)]
    app = participation.client_app(lambda context: people[context.node_config["partition-id"]])
    with quiet_log(), task_identity():
        grid = Tampered(app, CLIENTS)
        facts = contents.RunFacts(RUN, '{"seed": 5, "train.optimizer.lr": 0.1}')
        post = Post(grid, lambda: None)
        say = [].append if said is None else said.append
        yield Members(post, facts, CLIENTS, registered or {}, made.data.partition.sizes().tolist(), say)


def served(made, members, rules=RULES, state=None):
    lines = []
    final = serving.serve(made, state or start(made), members, rules, lines.append)
    return final, lines


def with_test_parts(made):
    """Test examples dealt out to the first clients; the last has none."""
    held = np.arange(30)
    offsets = np.minimum(np.arange(CLIENTS + 1) * 2, 30)
    return replace(made, data=replace(made.data, test_partition=Partition(offsets, held)))


@pytest.mark.parametrize("case", [*CASES, *PLAINLY])
def test_numbers_are_those_of_reference(case, tmp_path):
    made = with_test_parts(federation(case))
    final, records, _ = result(made, reference())
    with members_of(made, tmp_path) as members:
        found, lines = served(made, members)
    assert all(torch.equal(t, tensors(replace(found, clients=final.clients))[n]) for n, t in tensors(final).items())
    assert not found.clients  # what clients keep stays with them
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        ours = line.record
        held_out = () if made.work.personal else ("loss", "accuracy")  # then of those who answered
        for field in (*held_out, "round", "train_loss", "clients", "cohort", "skipped", "failed", *PRUNED):
            assert getattr(ours, field) == getattr(record, field), field
        assert record.bytes_up <= ours.bytes_up and record.bytes_down <= ours.bytes_down


def test_clients_say_how_the_model_does_and_the_round_is_recorded_with_it(tmp_path):
    made = replace(with_test_parts(federation("plain")), eval_every=1, clients_per_round=CLIENTS)
    expected = []
    run(made, start(made), reference(), expected.append)
    with members_of(made, tmp_path) as members:
        _, lines = served(made, members)
    for ours, theirs in zip(lines[1:], expected[1:], strict=True):
        assert [one.client for one in ours.evaluations] == list(range(15))
        for a, b in zip(ours.evaluations, theirs.evaluations, strict=True):
            assert (a.round, a.client, a.num_examples, a.accuracy) == (b.round, b.client, b.num_examples, b.accuracy)
            assert a.loss == pytest.approx(b.loss, rel=1e-6)  # another number of rows in one product
        assert ours.record.client_accuracy_std == pytest.approx(theirs.record.client_accuracy_std)


@pytest.mark.parametrize("case", ["own batch norm", "own tickets"])
def test_where_clients_have_models_of_their_own_the_loss_is_that_of_theirs(case, tmp_path):
    """Everybody is asked and has test examples here, so they are the simulation's; after a resume, too."""
    made = replace(federation(case), eval_every=1, clients_per_round=CLIENTS)
    lost = made.data.test_partition.indices
    held = np.concatenate([lost, np.setdiff1d(np.arange(30), lost)])  # those of nobody go to the last client
    own = Partition(np.array([*range(CLIENTS), 30]), held)
    made = replace(made, data=replace(made.data, test_partition=own))
    expected = []
    run(made, start(made), reference(), expected.append)
    with members_of(made, tmp_path) as members:
        _, lines = served(made, members)
        _, again = served(made, members, state=lines[1].state)
    for ours, theirs in zip([*lines, *again], [*expected, *expected[2:]], strict=True):
        assert ours.record.accuracy == pytest.approx(theirs.record.accuracy)
        assert ours.record.loss == pytest.approx(theirs.record.loss, rel=1e-6)
        assert [one.client for one in ours.evaluations] == (list(range(CLIENTS)) if ours.state.round else [])
        for a, b in zip(ours.evaluations, theirs.evaluations, strict=ours.state.round > 0):
            assert (a.client, a.num_examples, a.accuracy) == (b.client, b.num_examples, b.accuracy)
            assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_only_the_cohort_of_the_next_round_is_asked_and_everybody_at_the_end(tmp_path):
    made = replace(with_test_parts(federation("plain")), eval_every=2)
    with members_of(made, tmp_path) as members:
        _, lines = served(made, members)
    by_round = {line.record.round: {one.client for one in line.evaluations} for line in lines}
    cohort = {k for k in lines[3].record.cohort if k < 15}
    assert by_round == {0: set(), 1: set(), 2: cohort, 3: set(range(15))}


def test_a_resumed_server_gets_the_same_numbers_although_clients_have_gone_on(tmp_path):
    made = federation("states")
    with members_of(made, tmp_path) as members:
        final, lines = served(made, members)
        again, _ = served(made, members, state=lines[1].state)  # clients still hold states of rounds 2 and 3
    assert all(torch.equal(t, tensors(again)[n]) for n, t in tensors(final).items())


def tampering(client, change):
    """Change the update in what this client's node replies to ``train``."""

    def changed(message, reply):
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != client + 2:
            return reply
        broadcast = m.read_train(message.content)[0]
        update = m.read_update(reply.content, broadcast, client)
        reply.content[m._TENSORS] = m.update_content(change(update))[m._TENSORS]
        return reply

    return changed


def times(factor):
    return lambda u: replace(u, update={n: factor * t for n, t in u.update.items()})


WRONG = {
    "nan": (times(float("nan")), "is not finite"),
    "shape": (lambda u: replace(u, update={n: t[..., None] for n, t in u.update.items()}), "shape"),
    "names": (lambda u: replace(u, update={f"x{n}": t for n, t in u.update.items()}), "x0.weight"),
    "more examples": (lambda u: replace(u, num_examples=10**9), "says it has 1000000000 examples, having joined with"),
    "no examples": (lambda u: replace(u, num_examples=0), "num_examples must be >= 1, got 0"),
    "another client": (lambda u: replace(u, client=0), "the update is of client 0"),
    "loss": (lambda u: replace(u, metrics={"train_loss": float("inf")}), "train_loss is not finite"),
    "metrics": (lambda u: replace(u, metrics={}), "metrics have no train_loss"),
    "100 times": (times(-100.0), "times the cohort's median (limit 30)"),
}


@pytest.fixture
def everybody():
    return replace(federation("plain"), clients_per_round=CLIENTS)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_update_is_left_out_and_named(wrong, everybody, tmp_path):
    change, reason = WRONG[wrong]
    with members_of(everybody, tmp_path / "a") as members:
        members.post.grid.change = tampering(3, change)
        final, lines = served(everybody, members)
    assert all(list(line.record.failed) == [3] and reason in line.record.failed[3] for line in lines[1:])
    assert all(line.record.clients == CLIENTS - 1 and 3 not in line.record.cohort for line in lines[1:])
    with members_of(everybody, tmp_path / "b") as members:  # the same as if it had not been there
        members.post.grid.away = frozenset({3})
        without, _ = served(everybody, members)
    assert all(torch.equal(t, without.params[name]) for name, t in final.params.items())


@pytest.mark.parametrize("wrong", ["cut", "plain"])
def test_a_coded_update_that_cannot_be_read_is_left_out_and_named(wrong, tmp_path):
    made = replace(federation("top-k"), clients_per_round=CLIENTS, rounds=1)

    def change(message, reply):
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 3 + 2:
            return reply
        broadcast, client, key = m.read_train(message.content)
        update = m.read_update(reply.content, broadcast, client, reading=reading(made.compression, broadcast, key))
        update = replace(update, coded=b"" if wrong == "plain" else b"12345678")
        reply.content[m._TENSORS] = m.update_content(update)[m._TENSORS]
        return reply

    with members_of(made, tmp_path) as members:
        members.post.grid.change = change
        _, lines = served(made, members)
    reason = {"cut": "written for other names", "plain": "the update must be coded"}[wrong]
    assert list(lines[1].record.failed) == [3] and reason in lines[1].record.failed[3]
    assert lines[1].record.clients == CLIENTS - 1


def test_a_client_that_diverged_once_takes_part_again_with_what_it_remembered_before(tmp_path):
    made = replace(federation("top-k"), clients_per_round=CLIENTS)
    work = replace(made.work, schedule=lambda round: 1e38 if round == 2 else 1.0)
    with members_of(made, tmp_path, client3={"work": work}) as members:
        _, lines = served(made, members)
    assert [list(line.record.failed) for line in lines] == [[], [], [3], []]
    held = States(tmp_path / "3")
    before, after = held.before(RUN, 3), held.before(RUN, 4)
    assert p.all_finite(before) and p.all_finite(after) and not p.same_bits(before, after)


def test_rubbish_instead_of_a_reply(everybody, tmp_path):
    from flwr.app import RecordDict

    with members_of(everybody, tmp_path) as members:
        members.post.grid.change = lambda message, reply: (
            Message(RecordDict(), reply_to=message) if message.metadata.message_type == "train" else reply
        )
        final, lines = served(replace(everybody, rounds=1), members)
    assert set(lines[1].record.failed) == set(range(CLIENTS)) and lines[1].record.clients == 0
    assert all(torch.equal(t, start(everybody).params[name]) for name, t in final.params.items())


@pytest.mark.parametrize("scores", [{"num_examples": 0}, {"loss": float("nan")}, {"accuracy": 1.5}, {"accuracy": 1}])
def test_a_wrong_evaluation_is_left_out_with_its_update(scores, everybody, tmp_path):
    def change(message, reply):
        if message.metadata.dst_node_id == 5 and reply.has_content() and contents._SCORES in reply.content:
            record = reply.content[contents._SCORES]
            record.update(scores)
        return reply

    made = replace(with_test_parts(everybody), eval_every=1)
    with members_of(made, tmp_path) as members:
        members.post.grid.change = change
        _, lines = served(made, members)
    assert [list(line.record.failed) for line in lines] == [[], [], [3], [3]]
    assert all(one.client != 3 for line in lines for one in line.evaluations)


def test_silence_and_errors_of_flower(everybody, tmp_path):
    def change(message, reply):
        if message.metadata.message_type != "train":
            return reply
        if message.metadata.dst_node_id == 4:
            return None
        return (
            Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
            if message.metadata.dst_node_id == 5
            else reply
        )

    said = []
    with members_of(everybody, tmp_path, said) as members:
        members.post.grid.change = change
        _, lines = served(replace(everybody, rounds=1), members, replace(RULES, round_timeout_s=0.2))
    assert lines[1].record.failed == {2: "no reply within 0.2 s", 3: "gone"}
    assert "round 1: without client 2: no reply within 0.2 s" in said


def test_a_node_that_was_away_is_not_waited_for_to_the_end(everybody, tmp_path, monkeypatch):
    from fedsim.deploy import members as places

    monkeypatch.setattr(places, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(places, "LOST_S", 0.2)

    def change(message, reply):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 4:
            members.post.grid.away = frozenset({2})  # its message is lost, and it will not answer when it is back
            threading.Timer(0.1, lambda: setattr(members.post.grid, "away", frozenset())).start()
            return None
        return reply

    with members_of(everybody, tmp_path) as members:
        members.post.grid.change = change
        _, lines = served(replace(everybody, rounds=1), members, replace(RULES, round_timeout_s=60))
    assert lines[1].record.failed == {2: "went away without a reply"} and lines[1].record.seconds < 30


def test_a_client_that_raises_is_left_out(everybody, tmp_path):
    broken = replace(everybody.data.client(6), labels=torch.full_like(everybody.data.client(6).labels, 77))
    with members_of(everybody, tmp_path, client6={"train": broken}) as members:
        _, lines = served(replace(everybody, rounds=1), members)
    assert list(lines[1].record.failed) == [6] and "IndexError" in lines[1].record.failed[6]


def test_too_few_clients(everybody, tmp_path):
    said = []
    with members_of(everybody, tmp_path, said) as members:
        members.post.grid.away = frozenset({1, 20})
        with pytest.raises(
            RunError, match=r"gave up after 0.5 s, still missing clients 1, 20: 22 of 24 needed are here"
        ):
            served(everybody, members, replace(RULES, clients=CLIENTS))
    assert "waiting for clients 1, 20: 22 of 24 needed are here" in said
    assert said.count("waiting for clients 1, 20: 22 of 24 needed are here") == 1


def test_too_few_of_a_cohort_in_a_later_round(everybody, tmp_path):
    with members_of(everybody, tmp_path) as members:
        grid, lines = members.post.grid, []

        def leave(line):
            lines.append(line)
            grid.away = frozenset(range(CLIENTS - 2)) if line.record.round == 1 else frozenset()

        with pytest.raises(RunError, match="2 of 12 needed are here"):
            serving.serve(everybody, start(everybody), members, replace(RULES, min_clients=12), leave)
    assert [line.record.round for line in lines] == [0, 1]


def test_a_client_comes_back(everybody, tmp_path):
    with members_of(everybody, tmp_path) as members:
        grid, lines = members.post.grid, []

        def leave(line):
            lines.append(line)
            grid.away = frozenset({8}) if line.record.round == 0 else frozenset()

        serving.serve(everybody, start(everybody), members, RULES, leave)
    assert [line.record.failed for line in lines] == [{}, {8: "not connected"}, {8: "not connected"}, {}]


REFUSED = {
    "settings": (
        {"settings": {**SETTINGS, "train.optimizer.lr": 0.2}},
        "train.optimizer.lr is 0.2 here, 0.1 at the server",
    ),
    "examples": ({"train": None}, "has 2 examples where the split gives it"),
    "number": ({"client": 99}, "the federation has clients 0 to 23"),
    "twice": ({"client": 0, "own_data": True}, "node 2 from now on: another is client 0"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_who_cannot_take_part_is_refused_once(reason, everybody, tmp_path):
    changes, expected = REFUSED[reason]
    if "train" in changes:
        changes = {"train": everybody.data.train.take(torch.arange(2))}
    said = []
    with members_of(everybody, tmp_path, said, client5=changes) as members:
        served(replace(everybody, rounds=1), members)
        here = members.here()
    assert 5 not in here and len(here) == CLIENTS - 1
    assert sum(expected in line for line in said) == 1


def test_own_data_need_not_be_what_the_split_says(everybody, tmp_path):
    own = {"train": everybody.data.train.take(torch.arange(2)), "own_data": True, "settings": {**SETTINGS, "seed": 99}}
    with members_of(everybody, tmp_path, client5=own) as members:
        _, lines = served(replace(everybody, rounds=1), members)
    assert lines[1].record.clients == CLIENTS


def test_a_key_is_good_for_its_own_client_only(everybody, tmp_path):
    said, registered = [], {k: k + 2 for k in range(CLIENTS)}
    registered[3], registered[4] = registered[4], registered[3]
    with members_of(everybody, tmp_path, said, registered) as members:
        assert sorted(members.here()) == [k for k in range(CLIENTS) if k not in (3, 4)]
    assert "refused client 3: its key is that of client 4" in said


def test_all_are_told_that_it_is_over(everybody, tmp_path):
    people = []
    with members_of(everybody, tmp_path) as members:
        app = participation.client_app(lambda context: people[context.node_config["partition-id"]])
        people += [participant(everybody, client, tmp_path) for client in range(CLIENTS)]
        members.post.grid._client_app = app
        served(replace(everybody, rounds=1), members)
        assert not any(who.over.is_set() for who in people)
        serving.end(members, 5)
    assert all(who.over.is_set() for who in people)


@pytest.mark.parametrize("wrong", ["nan", "silent"])
def test_whose_gradient_is_wrong_or_missing_is_not_in_it_but_trains(wrong, everybody, tmp_path):
    made, said, kept = replace(everybody, pruning=snip(sparsity=0.6), rounds=1), [], []

    def change(message, reply):
        if message.metadata.message_type != "train" or not m.read_train(message.content)[0].probe:
            return reply
        kept.extend(tmp_path.rglob("*.safetensors"))
        if wrong == "silent":
            return reply if message.metadata.dst_node_id != 5 else None
        return tampering(3, times(float("nan")))(message, reply)

    with members_of(made, tmp_path, said) as members:
        members.post.grid.change = change
        final, lines = served(made, members, replace(RULES, round_timeout_s=0.3))
    others = np.setdiff1d(np.arange(len(made.data.train)), made.data.partition.client(3))
    params = {n: t.clone().requires_grad_() for n, t in start(made).params.items()}
    logits = torch.func.functional_call(made.work.model, params, (made.data.train.inputs[others],))
    loss = torch.nn.functional.cross_entropy(logits, made.data.train.labels[others])
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    products = {n: (params[n] * grads[n]).abs().detach() for n in params if params[n].dim() > 1}
    edge = torch.cat([product.flatten() for product in products.values()]).sort().values[round(0.6 * 48)]
    found = masks_of(final.pruning).kept
    assert all(torch.equal(found[n], product >= edge) for n, product in products.items())
    assert lines[1].record.failed == {} and lines[1].record.clients == CLIENTS
    assert sum(line.startswith("round 1, gradients: without client 3: ") for line in said) == 1
    assert not kept  # clients keep nothing of a probe


def test_gradients_count_in_the_bytes_of_a_round(everybody, tmp_path):
    made = replace(everybody, pruning=snip(sparsity=0.6))
    with members_of(made, tmp_path / "a") as members:
        _, pruned = served(made, members)
    with members_of(everybody, tmp_path / "b") as members:
        _, dense = served(everybody, members)
    first, second, whole = pruned[1].record, pruned[2].record, dense[1].record
    assert first.bytes_up == second.bytes_up + whole.bytes_up
    assert first.bytes_down > second.bytes_down + whole.bytes_down


def scored(made, tmp_path):
    """Rounds as served and as simulated, of everybody, with test examples."""
    expected = []
    run(made, start(made), reference(), expected.append)
    with members_of(made, tmp_path) as members:
        return served(made, members)[1], expected


def test_clients_score_the_model_that_was_trained_and_not_the_rewound_one(tmp_path):
    made = replace(with_test_parts(federation("tickets")), eval_every=1, clients_per_round=CLIENTS)
    lines, expected = scored(made, tmp_path)
    first = start(made)
    for ours, theirs in zip(lines[1:], expected[1:], strict=True):
        assert [one.client for one in ours.evaluations] == list(range(15))
        assert [one.loss for one in ours.evaluations] == pytest.approx([o.loss for o in theirs.evaluations], rel=1e-6)
        assert ours.record.sparsity == theirs.record.sparsity and ours.record.remaining == theirs.record.remaining
        assert not any(torch.equal(ours.state.params[n], t) for n, t in first.params.items())


def test_rounds_without_evaluation_ask_nobody_whether_or_not_the_server_prunes_after_them(tmp_path):
    """It prunes after every round here; the second is of evaluation, and the last."""
    lines, expected = scored(replace(with_test_parts(federation("tickets")), eval_every=2), tmp_path)
    assert [len(line.evaluations) for line in lines] == [0, 0, 15, 15]
    spread = [line.record.client_accuracy_mean for line in lines]
    assert spread == pytest.approx([None, None, *(line.record.client_accuracy_mean for line in expected[2:])])


@pytest.mark.parametrize("case", ["tickets", "pruned", "pruned states"])
@pytest.mark.parametrize("done", [1, 2])
def test_a_server_that_prunes_is_resumed_with_the_same_numbers(case, done, tmp_path):
    made = federation(case)
    with members_of(made, tmp_path) as members:
        final, lines = served(made, members)
        again, later = served(made, members, state=lines[done].state)
    assert all(torch.equal(t, tensors(again)[n]) for n, t in tensors(final).items())
    assert [one.record.bytes_down for one in later] == [one.record.bytes_down for one in lines[done + 1 :]]


def test_a_client_that_has_lost_its_files_misses_a_round_and_is_told_the_masks_again(tmp_path):
    pruning = magnitude(sparsity=0.6, start=1, end=1)
    made = replace(federation("plain"), pruning=pruning, rounds=6, clients_per_round=CLIENTS)
    with members_of(made, tmp_path) as members:
        states = []

        def on_round(line):
            states.append(line)
            if line.record.round == 2:  # said once round 3 is over, so lost before round 4
                shutil.rmtree(tmp_path / "3")

        serving.serve(made, start(made), members, RULES, on_round)
    failed = [dict(line.record.failed) for line in states]
    assert [sorted(one) for one in failed] == [[], [], [], [], [3], [], []]
    assert "needs masks of version 1, this client has none" in failed[4][3]
    down = [line.record.bytes_down for line in states]
    assert down[2] > down[5] > max(down[3], down[4], down[6])  # all are told, one again, nobody


def test_a_client_that_did_not_answer_is_told_the_masks_again(tmp_path):
    pruning = magnitude(sparsity=0.6, start=1, end=1)
    made = replace(federation("plain"), pruning=pruning, rounds=4, clients_per_round=CLIENTS)
    with members_of(made, tmp_path) as members:

        def silent(message, reply):
            return None if message.metadata.dst_node_id == 5 + 2 and message.metadata.group_id == "2" else reply

        members.post.grid.change = silent
        _, lines = served(made, members, replace(RULES, round_timeout_s=0.3))
    assert [sorted(line.record.failed) for line in lines] == [[], [], [5], [], []]
    told = [int(line.state.pruning["informed"][5]) for line in lines[2:]]
    assert told == [0, 1, 1] and lines[2].record.bytes_down > lines[3].record.bytes_down > lines[4].record.bytes_down
