"""What a config asks of the two parties, and what comes of it: regularisers, pruning, heads, sources, early ends."""

import hashlib
import itertools
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transfer_runs import AGREED, ONLY_A, PEOPLE, Watched, furthest, party, same, small, transfer

import fedsim
from fedsim.config import load, parties
from fedsim.errors import ConfigError, DataError
from fedsim.pruning.lottery import lottery_ticket
from fedsim.pruning.magnitude import magnitude
from fedsim.training.optimizers import sgd
from fedsim.transfer import protocols
from fedsim.transfer.nets import rows

SHARING = replace(AGREED, protocol="secret-sharing")
MLP = {"name": "mlp", "hidden": [6]}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "workers", lambda: 1)  # no processes: quicker for so few numbers
    return small(tmp_path / "runs")


def nets(run):
    return [load_file(run.folder / f"party-{role}.safetensors") for role in "ab"]


def made(config, overrides, **changes):
    """Both parties of a config, and what they agreed on."""
    checked = load.load(config, overrides)
    found = parties.sides(checked)
    a, b = (replace(parties.party(checked, role, found), **changes) for role in "ab")
    return a, b, parties.agreed(checked)


# ---------------------------------------------------------------- the loss, by hand


@pytest.mark.parametrize("alignment", ["distance", "inner-product"])
@pytest.mark.parametrize(("overlap", "labelled"), [(12, 7), (12, 12), (5, 1), (None, 4), (None, None)])
@pytest.mark.parametrize("protocol", ["plain", "secret-sharing"])
def test_the_first_loss_is_that_of_the_formula_row_by_row(protocol, overlap, labelled, alignment):
    """By loops over people, found by their ids; the order of common people is that of a hash of their ids."""
    agreed = replace(AGREED, protocol=protocol, overlap=overlap, labelled=labelled, alignment=alignment)
    a, b = party("a"), party("b")
    done = transfer(a, b, agreed)
    u_a, u_b = (rows(one.net, one.params, one.inputs, key=None).values.numpy() for one in (a, b))
    common = [text for text in a.ids if text in b.ids]
    common.sort(key=lambda text: hashlib.sha256(b"fedsim ids, their order\0" + text.encode()).digest())
    common = common[:overlap]
    count = len(common) if labelled is None else labelled
    labels = dict(zip(a.ids, a.labels.tolist(), strict=True))
    phi = sum(labels[text] * u for text, u in zip(a.ids, u_a, strict=True)) / len(a.ids)
    pairs = [(u_a[list(a.ids).index(text)], u_b[list(b.ids).index(text)]) for text in common]
    expected = 0.0
    for text, (_, ours) in zip(common[:count], pairs, strict=False):
        margin = labels[text] * float(phi @ ours)
        expected += (math.log(2) - margin / 2 + margin**2 / 8) / count
    for one, two in pairs:
        value = ((one - two) ** 2).sum() if alignment == "distance" else -(one * two).sum()
        expected += agreed.gamma * float(value) / len(pairs)
    for one in (a, b):
        expected += agreed.l2 / 2 * sum(float((tensor**2).sum()) for tensor in one.params.values())
    assert done.ends.a.losses == pytest.approx([expected], abs=1e-6)
    assert done.ends.a.overlap == done.ends.b.overlap == len(common)


def test_which_people_are_common_is_all_that_ids_say():
    """Other ids in another order of rows: the same nets, if the order of common people is the same."""
    a, b = party("a"), party("b")
    order = torch.arange(PEOPLE + ONLY_A).flip(0)
    turned = replace(a, ids=[a.ids[row] for row in order], inputs=a.inputs[order], labels=a.labels[order])
    one, two = transfer(a, b, SHARING), transfer(turned, b, SHARING)
    assert furthest(one.nets[0], two.nets[0]) < 1e-8  # sums over rows of A's in another order
    assert furthest(one.nets[1], two.nets[1]) < 1e-8


# ---------------------------------------------------------------- regularisers


def test_penalties_add_their_own_derivatives_at_both_parties(config):
    """Theory: ``strength w`` for l2, ``strength sign(w)`` for l1, of weights; and so much more loss."""
    penalised = [{"name": "l2", "strength": 0.3}, {"name": "l1", "strength": 0.02}]
    found = []
    for regularizers in ([], penalised):
        watched = Watched(), Watched()
        overrides = {"model": {**MLP, "regularizers": regularizers}, "transfer.protocol": "secret-sharing"}
        a, b, agreed = made(config, {**overrides, "transfer.iterations": 1})
        a, b = (replace(one, optimizer=w.optimizer) for one, w in zip((a, b), watched, strict=True))
        found.append((a, b, watched, transfer(a, b, agreed)))
    (a, b, without, plain), (_, _, with_it, done) = found
    more = 0.0
    for at, one in enumerate((a, b)):
        assert same(one.params, found[1][at].params)
        for name, weight in one.params.items():
            extra = 0.3 * weight + 0.02 * weight.sign() if weight.dim() > 1 else torch.zeros_like(weight)
            difference = with_it[at].gradients[0][name] - without[at].gradients[0][name]
            torch.testing.assert_close(difference, extra, rtol=0, atol=1e-7)
            if weight.dim() > 1:
                more += float(0.15 * weight.square().sum() + 0.02 * weight.abs().sum())
    assert done.ends.a.losses[0] - plain.ends.a.losses[0] == pytest.approx(more, abs=1e-6)


@pytest.mark.parametrize(
    "regularizers",
    [[{"name": "l2", "strength": 0.1}], [{"name": "l1", "strength": 0.1}], [{"name": "dropout", "p": 0.5}]],
    ids=["l2", "l1", "dropout"],
)
def test_regularised_nets_are_bit_equal_under_both_protocols_and_others_than_without(regularizers, config):
    model = {**MLP, "regularizers": regularizers}
    runs = [
        nets(fedsim.run(config, {"transfer.protocol": protocol, "model": one}))
        for protocol, one in (("paillier", model), ("secret-sharing", model), ("secret-sharing", MLP), ("plain", model))
    ]
    for at in range(2):
        assert same(runs[0][at], runs[1][at])
        assert furthest(runs[1][at], runs[2][at]) > 1e-3
        assert furthest(runs[1][at], runs[3][at]) < 1e-6


# ---------------------------------------------------------------- pruning

HALF = {
    "magnitude": {"name": "magnitude", "sparsity": 0.5, "start": 2, "end": 4},
    "lottery-ticket": {"name": "lottery-ticket", "rate": 0.5, "output_rate": 0.5, "every": 3, "levels": 1},
}


def weights(net):
    return {name: tensor for name, tensor in net.items() if tensor.dim() > 1}


@pytest.mark.parametrize("how", HALF)
def test_pruned_entries_are_positive_zeros_and_half_of_each_weight(how, config):
    overrides = {"model": MLP, "transfer.protocol": "secret-sharing", "transfer.iterations": 8}
    pruned = fedsim.run(config, {**overrides, "pruning": HALF[how]})
    whole = fedsim.run(config, overrides)
    for net, full in zip(nets(pruned), nets(whole), strict=True):
        for name, tensor in weights(net).items():
            zeros = tensor == 0
            assert int(zeros.sum()) == round(0.5 * tensor.numel())
            assert bool((tensor[zeros].view(torch.int64) == 0).all())  # not -0.0
            assert not bool((full[name] == 0).any())
        for name in net.keys() - weights(net).keys():
            assert not bool((net[name] == 0).any())
    for key in ("sent_by_a", "sent_by_b"):
        assert pruned.summary["transfer"][key] == whole.summary["transfer"][key]
    assert pruned.summary["status"] == "finished"


@pytest.mark.parametrize("protocol", ["plain", "paillier", "secret-sharing"])
def test_the_other_party_does_not_hear_of_pruning(protocol):
    """One party prunes, the other does not: which messages are sent, and how long they are, stays the same."""
    agreed = replace(AGREED, protocol=protocol, iterations=5)
    pruning = magnitude(sparsity=0.7, start=1, end=2)
    whole = transfer(party("a", "mlp"), party("b", "mlp"), agreed)
    pruned = transfer(party("a", "mlp", pruning=pruning), party("b", "mlp"), agreed)
    for one, other in zip(whole.heard, pruned.heard, strict=True):
        assert [(way, kind, len(payload)) for way, kind, payload in one.messages] == [
            (way, kind, len(payload)) for way, kind, payload in other.messages
        ]
    assert any(bool((tensor == 0).any()) for tensor in pruned.nets[0].values())
    assert not any(bool((tensor == 0).any()) for tensor in pruned.nets[1].values())


def test_a_ticket_begins_again_at_its_first_weights():
    """After two iterations half of each weight goes; the third is a step of the first parameters under the mask.

    It is a first step for the optimizer, too: no momentum is left of those before.
    """
    watched = Watched(lr=0.2, momentum=0.9)
    pruning = lottery_ticket(rate=0.5, output_rate=0.5, every=2, levels=1)
    a = party("a", "mlp", pruning=pruning, optimizer=watched.optimizer)
    done = transfer(a, party("b"), replace(SHARING, iterations=4))
    second, third = done.iterations[1].a, done.iterations[2].a
    for name, first in a.params.items():
        kept = torch.ones_like(first, dtype=torch.bool)
        if first.dim() > 1:
            lowest = second[name].abs().flatten().argsort()[: first.numel() // 2]
            kept.view(-1)[lowest] = False
        gradient = watched.gradients[2][name]
        assert bool((gradient[~kept] == 0).all())
        torch.testing.assert_close(third[name], (first - 0.2 * gradient) * kept, rtol=0, atol=1e-15)


def test_momentum_does_not_bring_pruned_entries_back():
    optimizer = sgd(lr=0.1, momentum=0.9, weight_decay=0.01)
    a = party("a", "mlp", pruning=magnitude(sparsity=0.5, start=2, end=2), optimizer=optimizer)
    done = transfer(a, party("b"), replace(SHARING, iterations=6))
    for name, tensor in weights(done.nets[0]).items():
        for iteration in done.iterations[2:]:
            assert torch.equal(iteration.a[name] == 0, tensor == 0)
        assert int((tensor == 0).sum()) == tensor.numel() // 2


def test_pruning_that_asks_clients_for_gradients_is_refused(config):
    with pytest.raises(ConfigError, match=r"pruning: snip asks for .*, which two parties cannot do"):
        fedsim.run(config, {"model": MLP, "pruning": {"name": "snip"}})


# ---------------------------------------------------------------- only the last layer


@pytest.mark.parametrize("protocol", ["plain", "paillier", "secret-sharing"])
def test_with_trains_head_the_rest_stays_bit_for_bit(protocol, config):
    overrides = {"model": MLP, "transfer.trains": "head", "transfer.protocol": protocol}
    a, b, _ = made(config, overrides)
    for one, net in zip((a, b), nets(fedsim.run(config, overrides)), strict=True):
        assert net.keys() == one.params.keys()
        for name, tensor in one.params.items():
            if name in one.net.head_names:
                assert float((net[name] - tensor).abs().max()) > 1e-3
            else:
                assert torch.equal(net[name].view(torch.int64), tensor.view(torch.int64))


# ---------------------------------------------------------------- a source run

DIGITS = {"name": "digits"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small federation on party A's columns of the digits."""
    config = {
        "name": "source",
        "data": {"dataset": {"name": "columns", "of": "digits", "side": "a"}, "clients": 4},
        "model": MLP,
        "train": {"rounds": 1, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.1}},
        "engine": {"name": "local", "mode": "sequential", "workers": 1},
        "output": str(tmp_path_factory.mktemp("sources")),
    }
    return fedsim.run(config)


def digits(config, folder):
    config = {**config, "data": {"dataset": DIGITS}, "model": MLP}
    config["transfer"] = {**config["transfer"], "source_run": str(folder), "trains": "head", "iterations": 2}
    return config


def test_party_a_starts_from_the_body_of_its_source(source, config):
    whole = {name: tensor.double() for name, tensor in source.model().state_dict().items()}
    a, b, _ = made(digits(config, source.folder), {})
    plain_a, plain_b, _ = made(digits(config, source.folder), {"transfer.source_run": None})
    body = set(a.params) - set(a.net.head_names)
    assert body
    for name in a.params:
        assert torch.equal(a.params[name], whole[name] if name in body else plain_a.params[name])
    assert not any(torch.equal(a.params[name], plain_a.params[name]) for name in body)
    assert same(b.params, plain_b.params)
    assert a.params[a.net.head_names[0]].shape != whole[a.net.head_names[0]].shape  # 4 hidden values, 10 classes


def test_with_trains_head_it_keeps_that_body_to_the_end(source, config):
    whole = source.model().state_dict()
    run = fedsim.run(digits(config, source.folder), {"transfer.protocol": "secret-sharing"})
    a, b = nets(run)
    heads = {name for name in a if a[name].shape[0] == 4}
    assert len(heads) == 2
    for name in a.keys() - heads:
        assert torch.equal(a[name], whole[name].double())
        assert not torch.equal(b[name], a[name])


def test_with_trains_all_it_moves_away_from_it(source, config):
    run = fedsim.run(digits(config, source.folder), {"transfer.trains": "all"})
    for name, tensor in nets(run)[0].items():
        if tensor.shape[0] != 4:
            assert not torch.equal(tensor, source.model().state_dict()[name].double())


def _unfinished(folder):
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "failed"}))


def _nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


WRONG = {
    "unfinished": (_unfinished, {}, r"transfer\.source_run: .* is not finished"),
    "an empty folder": (_nothing, {}, "spoilt"),
    "no folder": (shutil.rmtree, {}, "spoilt"),
    "other layers": (
        None,
        {"model": {"name": "mlp", "hidden": [7]}},
        r"\(7, 32\), as .* net has it; it has shape \(6, 32\)",
    ),
    "more layers": (None, {"model": {"name": "mlp", "hidden": [6, 6]}}, r"source_run: .* must have .*; it has "),
    "other columns": (None, {"transfer.share": 0.25}, r"of shape \(6, 16\), as party A's net has it"),
    "nothing to take": (None, {"model": {"name": "linear"}}, r"source_run: needs a model with layers before the last"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_source_is_refused_before_anything_is_written(how, source, config, tmp_path):
    spoil, overrides, text = WRONG[how]
    folder = tmp_path / "spoilt"
    shutil.copytree(source.folder, folder)
    if spoil is not None:
        spoil(folder)
    with pytest.raises(DataError if spoil else ConfigError, match=text):
        fedsim.run(digits(config, folder), overrides)
    assert not (tmp_path / "runs").exists()


def test_a_transfer_is_no_source(config):
    run = fedsim.run(config, {"model": MLP})
    with pytest.raises((ConfigError, DataError), match="has no one model"):
        fedsim.run(config, {"model": MLP, "transfer.source_run": str(run.folder)})


# ---------------------------------------------------------------- early ends, and learning


def test_a_tolerance_ends_training_at_both_after_the_same_iteration():
    a, b = party("a"), party("b")
    whole = transfer(a, b, replace(SHARING, iterations=6))
    losses = whole.ends.a.losses
    falls = [before - after for before, after in itertools.pairwise(losses)]
    assert falls == sorted(falls, reverse=True)  # ever smaller: a tolerance between two ends after one of them
    assert min(falls) > 0
    for last in (1, 3):
        tolerance = (falls[last - 1] + falls[last]) / 2
        done = transfer(a, b, replace(SHARING, iterations=6, tolerance=tolerance))
        assert len(done.ends.a.losses) == len(done.iterations) == last + 2
        assert done.ends.a.losses == losses[: last + 2]
        assert same(done.nets[0], whole.iterations[last + 1].a)
        assert same(done.nets[1], whole.iterations[last + 1].b)
        assert done.ends.b.predicted is not None
    never = transfer(a, b, replace(SHARING, iterations=6, tolerance=falls[-1] / 2))
    assert same(never.nets[1], whole.nets[1])


@pytest.mark.parametrize("protocol", ["plain", "secret-sharing"])
def test_a_run_that_ends_early_says_so(protocol, config):
    run = fedsim.run(config, {"transfer.protocol": protocol, "transfer.tolerance": 1e9, "transfer.iterations": 9})
    assert run.summary["status"] == "finished"
    assert run.summary["rounds_done"] == len(run.rounds) == 2


def test_it_learns_as_well_where_few_have_a_label(config):
    overrides = {"data.dataset.rows_a": 300, "data.dataset.rows_b": 300, "data.dataset.overlap": 100}
    overrides |= {"data.dataset.held_out": 200, "transfer.overlap": 100, "transfer.labelled": 20}
    overrides |= {"transfer.iterations": 40, "train.optimizer": {"name": "adam", "lr": 0.05}}
    run = fedsim.run(config, {**overrides, "transfer.protocol": "secret-sharing"})
    assert run.summary["accuracy"] > 0.7
    losses = [one.train_loss for one in run.rounds]
    assert losses[-1] < losses[0] - 0.1


def test_accuracy_on_breast_cancer_after_fifty_iterations(config):
    agreed = {"overlap": 200, "labelled": 100, "hidden": 16, "iterations": 50}
    data = {"data": {"dataset": "breast-cancer"}, "transfer": {**config["transfer"], **agreed}}
    run = fedsim.run({**config, **data}, {"train.optimizer": {"name": "adam", "lr": 0.02}, "train.eval_every": 10})
    losses = np.array([one.train_loss for one in run.rounds])
    assert run.summary["accuracy"] >= 0.9
    assert losses[-1] < 0.7 * losses[0]
    assert (np.diff(losses) < 0).mean() > 0.9
    assert run.rounds[-1].accuracy == run.summary["accuracy"]  # what B is told is what its net and A's say
