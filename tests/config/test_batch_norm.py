"""``train.batch_norm``: what it makes of a federation, what it is refused with, and whole runs of it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fedsim
from fedsim import params as p
from fedsim import runs
from fedsim.config import build
from fedsim.config.foreign import importable
from fedsim.config.load import load
from fedsim.errors import ConfigError
from fedsim.records import Partition

BASE = {
    "data": {"dataset": "digits", "clients": 5, "split": {"name": "feature-noise", "std": 0.8}},
    "model": {"name": "mlp", "hidden": [8], "norm": "batch"},
    "train": {"rounds": 4, "clients_per_round": 3, "batch_size": 32},
}
NAMES = tuple(f"fc_norm1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))


def made(policy, **changes):
    return build.federation(load(BASE, {"train.batch_norm": policy, **changes}))[0]


def test_policies_are_handed_to_those_who_follow_them():
    default, average, pooled, local, frozen = (
        build.federation(load(BASE))[0],
        *map(made, ("average", "pooled", "local", "freeze")),
    )
    for one in (default, average, frozen):
        assert (one.pooled, one.work.kept) == ((), ())
    assert (pooled.pooled, pooled.work.kept) == ((("fc_norm1.running_mean", "fc_norm1.running_var"),), ())
    assert (local.pooled, local.work.kept) == ((), NAMES)
    fixed = {n for n, tensor in frozen.work.model.named_parameters() if not tensor.requires_grad}
    assert fixed == {"fc_norm1.weight", "fc_norm1.bias"}
    for one in (average, pooled, local, frozen):
        assert p.same_bits(one.work.model.state_dict(), default.work.model.state_dict())


@pytest.mark.parametrize("policy", ["pooled", "local", "freeze"])
@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_a_model_without_batch_norm_is_refused(policy, norm):
    with pytest.raises(
        ConfigError, match=rf"^train\.batch_norm: {policy} needs batch norm, .* none; mlp, cnn, .* norm: batch$"
    ):
        made(policy, **{"model.norm": norm})
    made("average", **{"model.norm": norm})


def test_an_unknown_policy_is_told_the_known_ones():
    with pytest.raises(ConfigError, match=r"^train\.batch_norm: .*average.*pooled.*local.*freeze.*'locl'"):
        made("locl")


def test_pooling_needs_a_strategy_of_means(tmp_path):
    (tmp_path / "a_median.py").write_text(
        "from dataclasses import replace\n"
        "from fedsim.strategies.strategy import fedavg\n"
        "def median(): return replace(fedavg(), aggregator=fedavg().aggregator._replace(linear=False))\n"
    )
    rule = r"^train\.batch_norm: pooled needs a strategy that takes means, which a_median:median does not$"
    with importable(tmp_path), pytest.raises(ConfigError, match=rule):
        made("pooled", strategy="a_median:median")


def test_without_held_out_examples_at_clients_there_is_no_model_to_test(monkeypatch):
    whole = build.federated_data

    def central(*args):
        nobody = Partition(np.zeros(6, dtype=np.int64), np.zeros(0, dtype=np.int64))
        return replace(whole(*args), test_partition=nobody)

    monkeypatch.setattr(build, "federated_data", central)
    with pytest.raises(ConfigError, match=r"^train\.batch_norm: local needs clients with held-out examples"):
        made("local")
    made("average")


@pytest.mark.parametrize("policy", ["pooled", "local", "freeze"])
@pytest.mark.parametrize("engine", [{"name": "local", "mode": "vectorised", "workers": 1}, "flower"])
def test_runs_go_on_as_if_unbroken_and_verify(policy, engine, tmp_path):
    changes = {"train.batch_norm": policy, "engine": engine, "output": str(tmp_path)}
    whole = fedsim.run(BASE, changes)
    half = fedsim.run(BASE, {**changes, "train.rounds": 2})
    longer = fedsim.resume(half.folder, rounds=4)
    assert [replace(a, seconds=0.0) for a in longer.rounds] == [replace(b, seconds=0.0) for b in whole.rounds]
    ours, theirs = (runs.load_checkpoint(one.folder) for one in (longer, whole))
    assert ours.clients.keys() == theirs.clients.keys()
    for a, b in [
        (ours.params, theirs.params),
        (ours.buffers, theirs.buffers),
        *((ours.clients[k], own) for k, own in theirs.clients.items()),
    ]:
        assert p.same_bits(a, b)
    found = fedsim.verify(whole.folder, "all", {"engine": "reference"})
    assert found.equal and found.tensors
    assert whole.model()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_the_lines_of_clients_are_of_their_own_models_and_make_up_the_rounds(tmp_path):
    run = fedsim.run(BASE, {"train.batch_norm": "local", "output": str(tmp_path)})
    opened = runs.open_run(run.folder)
    held = json.loads((run.folder / "split.json").read_text())["test_sizes"]
    for record in opened.rounds():
        lines = [one for one in opened.clients() if one.round == record.round]
        assert [one.num_examples for one in lines] == held
        assert record.loss == pytest.approx(np.average([one.loss for one in lines], weights=held))
        assert record.accuracy == pytest.approx(np.average([one.accuracy for one in lines], weights=held))
    state = runs.load_checkpoint(run.folder)
    began = made("local").work.model.state_dict()
    for name in NAMES:
        assert torch.equal({**state.params, **state.buffers}[name], began[name])
        assert len(state.clients) == 5 and not torch.equal(state.clients[0][f"kept/{name}"], began[name])


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"name": "local", "workers": 2}, {"name": "ray", "actors": 2}])
def test_other_processes_give_the_same_bits(engine, tmp_path):
    if engine["name"] == "ray":
        pytest.importorskip("ray")
    changes = {"train.batch_norm": "local", "output": str(tmp_path)}
    ours, theirs = (
        fedsim.run(BASE, {**changes, "engine": {"mode": "sequential", **own}})
        for own in (engine, {"name": "local", "workers": 1})
    )
    assert [replace(a, seconds=0.0) for a in ours.rounds] == [replace(b, seconds=0.0) for b in theirs.rounds]
    here, there = (runs.load_checkpoint(one.folder) for one in (ours, theirs))
    assert p.same_bits(here.params, there.params)
    assert all(p.same_bits(here.clients[k], own) for k, own in there.clients.items())


def test_both_baselines_train_whole_models(tmp_path):
    average, local = (
        fedsim.baseline(BASE, {"train.batch_norm": policy, "train.rounds": 2, "output": str(tmp_path)})
        for policy in ("average", "local")
    )
    for ours, theirs in ((local.centralised, average.centralised), (local.alone, average.alone)):
        assert [replace(a, seconds=0.0) for a in ours.rounds] == [replace(b, seconds=0.0) for b in theirs.rounds]
