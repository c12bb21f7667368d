"""Personal tickets against loops written out entry by entry, and whole runs of them."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import federation, result, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import fedsim
from fedsim import params as p
from fedsim import recording, rng, runs, wire
from fedsim.config import build
from fedsim.config.foreign import importable
from fedsim.config.load import load
from fedsim.engines.folding import alone, fold, join
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.errors import ConfigError
from fedsim.federation import job
from fedsim.models import batch_norm
from fedsim.pruning import masks
from fedsim.pruning.tickets import PAIRS, drawn, personal_tickets
from fedsim.records import Broadcast, ClientUpdate, Examples, Partition
from fedsim.strategies.local_rules import plain
from fedsim.training import masking
from fedsim.training.client import LocalWork, batches, train_client
from fedsim.training.optimizers import sgd
from fedsim.training.stopping import parted

DTYPES = [torch.float32, torch.float64]
N = 13
DATA = Examples(2 * rng.normal(1, N, 4, dtype=torch.float64), (rng.uniform(2, N) * 3).long())
BASE = {
    "data": {"dataset": "digits", "clients": 6, "split": {"name": "shards", "shards_per_client": 2}},
    "model": {"name": "mlp", "hidden": [12]},
    "train": {"rounds": 4, "clients_per_round": 4},
    "pruning": {"name": "personal-tickets", "rate": 0.4, "target": 0.55, "threshold": 0.3},
    "engine": {"name": "local", "mode": "sequential", "workers": 1},
}


def work(*, dtype=torch.float64, epochs=2, **keys):
    """A linear model, whose gradients a loop can follow."""
    with rng.torch_seeded(3):
        model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    tickets = personal_tickets(**keys).tickets
    return LocalWork(model, (), sgd(lr=0.3), plain(), epochs, 5, tickets=tickets)


def sent(dtype=torch.float64):
    """A model that is not the first one; its entries have both signs."""
    return Broadcast(
        {"0.weight": rng.normal(13, 3, 4, dtype=dtype), "0.bias": rng.normal(6, 3, dtype=dtype)}, {}, {}, 7
    )


def opened(made, broadcast, state, judged=DATA):
    return made.tickets.opened(made.model, made.kept, broadcast, judged, state)


def accuracy(weight, bias, data):
    """Of a linear model, example by example."""
    hits = 0
    for x, label in zip(data.inputs.tolist(), data.labels.tolist(), strict=True):
        scores = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        hits += scores.index(max(scores)) == label
    return hits / len(data)


def without_lowest(values, kept, count):
    """Flat lists: the mask without the ``count`` kept entries of lowest magnitude."""
    held = sorted((abs(v), i) for i, (v, k) in enumerate(zip(values, kept, strict=True)) if k)
    gone = {i for _, i in held[:count]}
    return [k and i not in gone for i, k in enumerate(kept)]


TICKET = {"0.weight": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)}


@pytest.mark.parametrize("above", [True, False])
def test_the_model_under_its_masks_decides_whether_the_lowest_of_what_remains_go(above):
    broadcast = sent()
    under = p.masked(broadcast.params, TICKET)
    reached = accuracy(under["0.weight"].tolist(), under["0.bias"].tolist(), DATA)
    whole = accuracy(broadcast.params["0.weight"].tolist(), broadcast.params["0.bias"].tolist(), DATA)
    assert abs(reached - whole) > 0.05  # or it would not matter which of the two is judged
    made = work(rate=0.5, target=0.9, threshold=reached if above else reached + 1e-9)
    state, start = opened(made, broadcast, masking.as_state(TICKET))
    if not above:
        assert start is broadcast.params and p.same_bits(masking.ticket(state), TICKET)
        return
    expected = without_lowest(broadcast.params["0.weight"].flatten().tolist(), TICKET["0.weight"].flatten().tolist(), 4)
    assert masking.ticket(state)["0.weight"].flatten().tolist() == expected  # round(9 / 2) is 4, to the even one
    assert p.same_bits(start, p.of(made.model)[0]) and start.keys() == broadcast.params.keys()


def test_a_client_that_never_took_part_has_a_ticket_that_keeps_everything_and_other_states_stay():
    state, start = opened(work(threshold=1.0), sent(), {"control": torch.ones(2)})
    assert start is not None and state["control"].tolist() == [1, 1]
    assert masking.ticket(state).keys() == {"0.weight"} and bool(masking.ticket(state)["0.weight"].all())


def test_an_accuracy_of_nothing_prunes_nothing():
    nothing = Examples(DATA.inputs, torch.full_like(DATA.labels, -100))
    state, _ = opened(work(threshold=0.0), sent(), {}, nothing)
    assert bool(masking.ticket(state)["0.weight"].all())


@settings(max_examples=30)
@given(st.floats(0.05, 0.9), st.floats(0.05, 0.95), st.integers(0, 2**30))
def test_tickets_are_nested_and_stop_exactly_at_the_target(rate, target, key):
    with rng.torch_seeded(1):
        model = nn.Sequential(nn.Linear(4, 11), nn.Linear(11, 3))
    made = replace(work(rate=rate, target=target, threshold=0.0), model=model)
    judged, state, sizes = Examples(DATA.inputs.float(), DATA.labels), {}, {"0.weight": 44, "1.weight": 33}
    for turn in range(25):
        params = {n: rng.normal(rng.fold(key, turn, n), *t.shape) for n, t in p.of(model)[0].items()}
        before = masking.ticket(state) or {n: torch.ones_like(params[n], dtype=torch.bool) for n in sizes}
        broadcast = Broadcast(params, {}, {}, turn + 1)
        state, start = opened(made, broadcast, state, judged)
        ticket = masking.ticket(state)
        assert masks.is_subset(ticket, before)
        gone = {n: sizes[n] - int(ticket[n].sum()) for n in sizes}
        for n, had in before.items():
            left = int(had.sum())
            limit = min(round(target * sizes[n]), sizes[n] - 1)
            assert gone[n] == min(sizes[n] - left + min(round(rate * left), left - 1), limit)
        assert (start is broadcast.params) == p.same_bits(ticket, before)  # whoever has pruned rewinds, nobody else
    if rate > 0.2:  # 25 turns are enough, then
        for n, size in sizes.items():
            assert gone[n] == min(round(target * size), size - 1) or round(rate * (size - gone[n])) == 0


def by_hand(made, start, kept, trained, key):
    """SGD on the cross-entropy of a linear model, entry by entry: weights and biases as nested lists."""
    mask = kept["0.weight"].tolist()
    weight = [[w * k for w, k in zip(r, m, strict=True)] for r, m in zip(start["0.weight"].tolist(), mask, strict=True)]
    bias = start["0.bias"].tolist()
    for batch in batches(len(trained), 5, made.local_epochs, key):
        grads, own = [[0.0] * 4 for _ in range(3)], [0.0] * 3
        for i in batch.tolist():
            x, label = trained.inputs[i].tolist(), int(trained.labels[i])
            scores = [math.exp(sum(w * v for w, v in zip(weight[c], x, strict=True)) + bias[c]) for c in range(3)]
            for c in range(3):
                slope = (scores[c] / sum(scores) - (c == label)) / len(batch)
                own[c] += slope
                for j in range(4):
                    grads[c][j] += slope * x[j]
        for c, j in itertools.product(range(3), range(4)):
            weight[c][j] -= 0.3 * grads[c][j] * mask[c][j]
        bias = [b - 0.3 * g for b, g in zip(bias, own, strict=True)]
    return weight, bias


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("validation", [0.0, 0.3])
def test_training_starts_from_the_rewound_ticket_or_the_model_as_sent_and_the_update_leads_to_the_clients_model(
    threshold, validation
):
    made, broadcast = work(rate=0.3, threshold=threshold, validation=validation), sent()
    found = train_client(made, broadcast, 4, DATA, state=masking.as_state(TICKET), key=9)
    trained, judged = parted(validation, DATA, 4)
    assert (len(trained), len(judged)) == ((13, 13) if validation == 0 else (10, 3))
    kept = TICKET["0.weight"].flatten().tolist()
    if threshold == 0:  # round(0.3 * 9) of the model as sent go; 3 of 12 had gone, and 6 is the target
        kept = without_lowest(broadcast.params["0.weight"].flatten().tolist(), kept, 3)
    assert found.kept["0.weight"].flatten().tolist() == kept
    assert p.same_bits(masking.ticket(found.state), found.kept)
    start = p.of(made.model)[0] if threshold == 0 else broadcast.params
    weight, bias = by_hand(made, start, found.kept, trained, 9)
    for c, j in itertools.product(range(3), range(4)):
        led = float(broadcast.params["0.weight"][c, j] + found.update["0.weight"][c, j])
        if found.kept["0.weight"][c, j]:
            assert led == pytest.approx(weight[c][j], abs=1e-12)
        else:
            assert found.update["0.weight"][c, j] == 0
    assert (broadcast.params["0.bias"] + found.update["0.bias"]).tolist() == pytest.approx(bias, abs=1e-12)
    assert found.num_examples == N  # those held out are the client's, too


def joined(params, models, kept, sizes, cut=1):
    """The aggregate of clients that end at these models, in blocks of ``cut``."""
    made = job(federation("plain"))
    broadcast = Broadcast(params, {}, {}, 1)
    updates = [
        ClientUpdate(k, p.masked(p.sub(model, params), own), {}, n, {"train_loss": 0.0}, {}, 0, own)
        for k, (model, own, n) in enumerate(zip(models, kept, sizes, strict=True))
    ]
    parts = [
        fold(made, broadcast, (alone(one, 0) for one in updates[start : start + cut]))
        for start in range(0, len(updates), cut)
    ]
    return join(made, broadcast, parts, bytes_down=0).update


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.lists(st.tuples(st.integers(1, 900), st.lists(st.booleans(), min_size=6, max_size=6)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 2**30),
)
def test_each_entry_is_the_mean_over_those_who_hold_it_and_one_that_nobody_holds_stays(dtype, clients, cut, key):
    """``sum_k n_k m_k w_k / sum_k n_k m_k``, entry by entry, of models with both signs and unequal sizes."""
    before = {"w": rng.normal(key, 2, 3, dtype=dtype), "b": rng.normal(rng.fold(key, 1), 2, dtype=dtype)}
    models = [{n: rng.normal(rng.fold(key, k, n), *t.shape, dtype=dtype) for n, t in before.items()} for k in range(7)]
    models, sizes = models[: len(clients)], [n for n, _ in clients]
    kept = [{"w": torch.tensor(row).view(2, 3)} for _, row in clients]
    update = joined(before, models, kept, sizes, cut)
    after, close = p.add(before, update), 1e-5 if dtype is torch.float32 else 1e-13
    for i, j in itertools.product(range(2), range(3)):
        holders = [(n, float(m["w"][i, j])) for n, m, own in zip(sizes, models, kept, strict=True) if own["w"][i, j]]
        if not holders:
            assert update["w"][i, j] == 0
            continue
        mean = sum(n * w for n, w in holders) / sum(n for n, _ in holders)
        assert float(after["w"][i, j]) == pytest.approx(mean, abs=close)
    for i in range(2):
        mean = sum(n * float(m["b"][i]) for n, m in zip(sizes, models, strict=True)) / sum(sizes)
        assert float(after["b"][i]) == pytest.approx(mean, abs=close)


def test_a_rounds_numbers_are_means_over_its_tickets():
    one, two, three = ([0, 2, 3], [1, 2, 3, 4, 5], [0, 5])
    tickets = {k: {"w": torch.tensor([i in own for i in range(6)])} for k, own in ((8, three), (2, one), (5, two))}
    found = drawn(tickets)
    assert found.sparsity == pytest.approx(1 - (3 + 5 + 2) / 18)
    assert found.by_layer == {"w": pytest.approx((3 + 5 + 2) / 18)}
    assert found.overlap == pytest.approx((2 / 6 + 1 / 6) / 2)  # of 2 and 5, and of 5 and 8
    assert drawn({2: tickets[2]}).overlap is None
    assert drawn({}) is None is drawn({1: {}})
    many = {k: {"w": torch.tensor([k <= PAIRS, k > PAIRS])} for k in range(PAIRS + 9)}
    assert drawn(many).overlap == 1  # the first twenty pairs are alike, the next one is not


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fedsim.run(BASE, {"output": str(tmp_path_factory.mktemp("runs"))})


def test_clients_and_rounds_are_scored_by_the_clients_own_models(whole):
    state, opened_run = runs.load_checkpoint(whole.folder), runs.open_run(whole.folder)
    made, record = build.federation(load(BASE))[0], opened_run.rounds()[-1]
    lines = {one.client: one for one in opened_run.clients() if one.round == 4}
    assert len(lines) == 6 and len(state.clients) == 6
    own = {k: masking.ticket(held) for k, held in state.clients.items()}
    assert len({masks.remaining(one) for one in own.values()}) > 1  # some have pruned more often
    for k, line in lines.items():
        mine = made.data.client_test.take(torch.from_numpy(made.data.test_partition.client(k)))
        scores = functional_call(made.work.model, p.masked(state.params, own[k]), (mine.inputs,))
        assert line.accuracy == pytest.approx(float((scores.argmax(1) == mine.labels).double().mean()))
        assert line.loss == pytest.approx(float(nn.functional.cross_entropy(scores, mine.labels)), rel=1e-5)
    held = [line.num_examples for line in lines.values()]
    assert record.accuracy == pytest.approx(np.average([one.accuracy for one in lines.values()], weights=held))
    assert record.client_accuracy_mean == pytest.approx(np.mean([one.accuracy for one in lines.values()]))
    cohort = {k: own[k] for k in record.cohort}
    assert (record.sparsity, record.overlap) == (drawn(cohort).sparsity, drawn(cohort).overlap)
    line = json.loads((whole.folder / "rounds.jsonl").read_text().splitlines()[-1])
    assert line["overlap"] == record.overlap and 0 < record.overlap < 1


def test_before_anybody_took_part_all_have_the_whole_model(tmp_path):
    """Hence the initial evaluation is that of a run without pruning."""
    ours, theirs = (
        fedsim.run({**BASE, "pruning": pruning}, {"train.rounds": 1, "output": str(tmp_path)})
        for pruning in (BASE["pruning"], None)
    )
    first, plain_first = (json.loads((one.folder / "summary.json").read_text())["initial"] for one in (ours, theirs))
    assert first["accuracy"] == pytest.approx(plain_first["accuracy"])
    assert first["loss"] == pytest.approx(plain_first["loss"], rel=1e-6)
    assert ours.rounds[0].overlap is not None and theirs.rounds[0].overlap is theirs.rounds[0].sparsity is None


def test_bytes_are_those_of_the_messages_and_fall_as_tickets_are_drawn(whole):
    made, broadcast = work(rate=0.5, threshold=0.0), sent()
    update = train_client(made, broadcast, 4, DATA, state={}, key=9)
    assert wire.sent_up(update, broadcast) == len(wire.encode_update(update))
    assert p.same_bits(wire.decode_update(wire.encode_update(update)).update, update.update)
    assert p.same_bits(wire.decode_update(wire.encode_update(update)).kept, update.kept)
    assert whole.rounds[-1].bytes_up < whole.rounds[0].bytes_up
    assert len({record.bytes_down for record in whole.rounds}) == 1


@pytest.mark.parametrize("engine", [{"name": "local", "mode": "vectorised", "workers": 1}, "flower", "reference"])
def test_runs_go_on_as_if_unbroken_and_verify(engine, tmp_path):
    changes = {"engine": engine, "output": str(tmp_path)}
    longer = fedsim.resume(fedsim.run(BASE, {**changes, "train.rounds": 2}).folder, rounds=4)
    once = fedsim.run(BASE, changes)
    assert_equal(longer.folder, once.folder)
    found = fedsim.verify(once.folder, "all", {"engine": {"name": "local", "mode": "sequential", "workers": 1}})
    assert found.equal and found.tensors


def test_what_a_killed_run_leaves_goes_on_with_the_tickets_of_its_checkpoint(whole, tmp_path, monkeypatch):
    left, folders = tmp_path / "left", []

    def on_round(record):
        if record.round == 3:
            shutil.copytree(folders[0], left, ignore=shutil.ignore_patterns(".lock"))

    with monkeypatch.context() as patched:
        patched.setattr(recording, "due", lambda last, now: len(runs.RunFolder(folders[0]).rounds()) == 2)
        started = {"on_start": lambda run, federation: folders.append(run.folder), "on_round": on_round}
        fedsim.run(BASE, {"output": str(tmp_path)}, **started)
    saved = runs.load_checkpoint(left)
    assert saved.round == 2 and all(masking.ticket(own) for own in saved.clients.values())
    assert_equal(fedsim.resume(left).folder, whole.folder)


def assert_equal(a, b):
    ours, theirs = (runs.open_run(folder) for folder in (a, b))
    assert [replace(r, seconds=0.0) for r in ours.rounds()] == [replace(r, seconds=0.0) for r in theirs.rounds()]
    assert p.same_bits(*(tensors(runs.load_checkpoint(folder)) for folder in (a, b)))


@pytest.mark.parametrize("mode", ["sequential", "vectorised"])
def test_batch_norm_of_their_own_goes_with_tickets(mode):
    made = federation("own batch norm")
    tickets = personal_tickets(rate=0.3, threshold=0.4, validation=0.25).tickets
    kept = batch_norm.tensors(made.work.model)
    made = replace(made, strategy=federation("plain").strategy)
    made = replace(made, work=replace(made.work, rule=plain(), kept=kept, tickets=tickets))
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": 1 if mode == "sequential" else 4})
    ours, theirs = tensors(result(made, engine)[0]), tensors(result(made, reference())[0])
    assert any("ticket/0.weight" in name for name in theirs) and any("kept/1.weight" in name for name in theirs)
    assert not any("ticket/1.weight" in name for name in theirs)
    if mode == "sequential":
        assert p.same_bits(ours, theirs)
    else:
        assert all(torch.allclose(t, theirs[name], rtol=2e-5, atol=2e-5) for name, t in ours.items())


def test_some_clients_of_the_contracts_federation_prune_and_others_do_not():
    """So that what the tests of engines compare has both in every round after the first."""
    _, records, states = result(federation("own tickets"), reference())
    drawn_by = [
        {k: int(own["ticket/0.weight"].sum()) for k, own in state.clients.items() if k in record.cohort}
        for record, state in zip(records, states, strict=True)
    ]
    assert all(len(set(counts.values())) > 1 for counts in drawn_by[1:])
    assert records[-1].sparsity > records[1].sparsity > 0
    assert {n for state in states[1:] for own in state.clients.values() for n in own} == {
        "ticket/0.weight",
        "ticket/2.weight",
    }


def test_both_baselines_train_whole_models(tmp_path):
    ours, theirs = (
        fedsim.baseline({**BASE, "pruning": pruning}, {"train.rounds": 2, "output": str(tmp_path)})
        for pruning in (BASE["pruning"], None)
    )
    for mine, plain_one in ((ours.centralised, theirs.centralised), (ours.alone, theirs.alone)):
        assert [replace(a, seconds=0.0) for a in mine.rounds] == [replace(b, seconds=0.0) for b in plain_one.rounds]


STRATEGIES = """
from dataclasses import replace
from fedsim import params as p
from fedsim.strategies.strategy import fedavg
def median(): return replace(fedavg(), aggregator=fedavg().aggregator._replace(linear=False))
def control(): return replace(fedavg(), local=fedavg().local._replace(init=p.zeros_like))
"""


@pytest.fixture(scope="module")
def somebodys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    (folder / "own_rules.py").write_text(STRATEGIES)
    return folder


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"strategy": "own_rules:median"}, "needs a strategy that takes means, which own_rules:median does not: each "),
        ({"strategy": "own_rules:control"}, "needs a strategy of which clients keep nothing, unlike own_rules:control"),
        ({"train.early_stopping": {}, "train.local_epochs": 2}, r"goes with no train\.early_stopping: both hold "),
    ],
)
def test_what_cannot_be_joined_is_refused_and_why(changes, rule, somebodys):
    with importable(somebodys), pytest.raises(ConfigError, match=rf"^pruning: personal-tickets {rule}"):
        build.federation(load(BASE, changes))


def test_without_held_out_examples_at_clients_there_is_no_model_to_test(monkeypatch):
    found = build.federated_data
    nobody = Partition(np.zeros(7, dtype=np.int64), np.zeros(0, dtype=np.int64))
    monkeypatch.setattr(build, "federated_data", lambda *args: replace(found(*args), test_partition=nobody))
    with pytest.raises(ConfigError, match=r"^pruning: personal-tickets needs clients with held-out examples"):
        build.federation(load(BASE))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("rate", 1.0, "must be < 1"),
        ("rate", 0.0, "must be > 0"),
        ("target", 1.0, "must be < 1"),
        ("threshold", 1.1, "must be <= 1"),
        ("validation", 0.6, "must be <= 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, rule):
    with pytest.raises(ConfigError, match=rf"^pruning\.{key}: {rule}, got {value}$"):
        load(BASE, {f"pruning.{key}": value})
