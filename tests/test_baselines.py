"""Both baselines train on the federation's own examples, and say what they are said to say."""

import copy

import numpy as np
import pytest
import torch

import fedsim
from fedsim.baselines import Alone, centralised, each_alone, merged, train_centralised
from fedsim.config import build, load
from fedsim.errors import ConfigError, DataError
from fedsim.federation import start
from fedsim.records import Broadcast, RoundRecord
from fedsim.rng import fold
from fedsim.runs import open_run
from fedsim.training.client import train_client
from fedsim.training.evaluate import score

CONFIG = {
    "name": "small",
    "seed": 5,
    "data": {"dataset": "digits", "clients": 5, "split": {"name": "feature-noise", "std": 0.5}},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 3, "clients_per_round": 2, "batch_size": "all", "optimizer": {"name": "sgd", "lr": 0.3}},
}


def made(**data):
    config = copy.deepcopy(CONFIG)
    config["data"] |= data
    return build.federation(load.load(config))


def test_centralised_is_gradient_descent_on_exactly_the_examples_that_clients_hold():
    federation, engine = made(split={"name": "iid", "examples_per_client": 20})
    lines, final = train_centralised(federation, engine, lambda record: None)
    held = torch.from_numpy(np.sort(federation.data.partition.indices))
    assert len(held) == 100 < len(federation.data.train)
    model = copy.deepcopy(federation.work.model)
    optimizer, pooled = torch.optim.SGD(model.parameters(), lr=0.3), federation.data.train.take(held)
    for record, _ in lines:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pooled.inputs), pooled.labels)
        loss.backward()
        optimizer.step()
        assert record.train_loss == pytest.approx(loss.item(), abs=1e-5)
        test = federation.data.test
        assert record.loss == pytest.approx(
            torch.nn.functional.cross_entropy(model(test.inputs), test.labels).item(), abs=1e-5
        )
        assert (record.clients, record.bytes_up, record.bytes_down) == (1, 0, 0)
    for name, parameter in model.named_parameters():
        assert torch.allclose(final.params[name], parameter, atol=1e-5)


def test_centralised_is_tested_on_each_clients_own_held_out_examples():
    federation, engine = made()
    (*_, (record, evaluations)), _ = train_centralised(federation, engine, lambda record: None)
    sizes = federation.data.test_partition.sizes()
    assert [e.num_examples for e in evaluations] == sizes[sizes > 0].tolist()
    assert record.client_accuracy_std > 0
    assert centralised(federation).data.client_test is federation.data.client_test  # with the clients' noise


def test_a_client_alone_trains_on_its_own_examples_in_every_round():
    federation, engine = made(split={"name": "dirichlet", "alpha": 0.5})
    found = list(each_alone(federation, engine))
    assert [one.client for one in found] == [0, 1, 2, 3, 4]
    client, state = 3, start(federation)
    seed = fold(federation.seed, "alone", client)
    for record in found[client].records:
        from_here = Broadcast(state.params, {}, {}, record.round)
        key = fold(seed, "round", record.round, "client", 0)
        update = train_client(federation.work, from_here, 0, federation.data.client(client), state={}, key=key)
        params = {n: p + update.update[n] for n, p in state.params.items()}
        state = type(state)(record.round, params, {})
        loss, accuracy = score(federation.work.model, params, {}, federation.data.test).mean()
        assert (record.loss, record.accuracy) == (pytest.approx(loss, abs=1e-6), pytest.approx(accuracy, abs=1e-12))


def test_the_lines_of_all_alone_are_means_over_clients():
    federation, engine = made(split={"name": "dirichlet", "alpha": 0.5})
    found = list(each_alone(federation, engine))
    for round, (record, evaluations) in enumerate(merged(found), 1):
        assert record.round == round and record.clients == 5
        assert record.accuracy == pytest.approx(np.mean([one.records[round - 1].accuracy for one in found]))
        own = [e.accuracy for e in evaluations]
        assert {e.client for e in evaluations} <= set(range(5)) and len(own) == len({e.client for e in evaluations})
        assert record.client_accuracy_mean == pytest.approx(np.mean(own))
        assert record.client_accuracy_std == pytest.approx(np.std(own))


def test_the_baselines_of_a_config_are_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = fedsim.baseline(CONFIG)
    assert [len(run.rounds) for run in (both.centralised, both.alone)] == [3, 3]
    assert [run.summary["name"] for run in (both.centralised, both.alone)] == ["small-centralised", "small-alone"]
    assert [run.summary["kind"] for run in (both.centralised, both.alone)] == ["centralised", "alone"]
    assert both.centralised.summary["totals"]["bytes_up"] == 0
    test = fedsim.split(CONFIG)  # the same held-out part
    assert both.centralised.model()(torch.zeros(2, 1, 8, 8)).shape == (2, test.facts["num_classes"])
    with pytest.raises(DataError, match="has no model, every client trained one of its own"):
        both.alone.model()
    for run in (both.centralised, both.alone):
        with pytest.raises(DataError, match="a baseline has no checkpoint and cannot be resumed"):
            fedsim.resume(run.folder, rounds=9)


@pytest.mark.parametrize(
    ("pruning", "sparsity"),
    [
        ({"name": "l1-filter", "at": 1, "sparsity": 0.5}, 0.5),
        ({"name": "lottery-ticket", "every": 1, "rate": 0.4}, 0.6),
    ],
)
def test_baselines_prune_as_the_federation_does(pruning, sparsity, tmp_path):
    both = fedsim.baseline({**CONFIG, "pruning": pruning, "output": str(tmp_path)})
    for run in (both.centralised, both.alone):
        first, second, third = run.rounds
        assert first.sparsity is None and not first.remaining and second.remaining.keys() == third.remaining.keys()
        assert second.remaining and all(0 < share < 1 for share in second.remaining.values())
        assert 0.3 < second.sparsity <= third.sparsity < sparsity + 0.1
    assert both.centralised.model()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_what_is_left_of_all_alone_is_a_mean_over_clients():
    def one(client, sparsity, **remaining):
        record = RoundRecord(1, None, None, None, 1, 0.0, 0, 0, sparsity=sparsity, remaining=remaining)
        return Alone(client, (record,), ())

    ((record, _),) = merged([one(0, 0.25, a=0.5, b=1.0), one(1, 0.75, a=0.25, b=0.25)])
    assert record.sparsity == 0.5 and record.remaining == {"a": 0.375, "b": 0.625}


def test_what_the_engine_refuses_is_said_before_a_folder_is_made(tmp_path):
    raw = {
        "data": {"dataset": "digits", "clients": 3},
        "model": "resnet-8",
        "engine": {"name": "local", "mode": "fused"},
        "output": str(tmp_path),
    }
    with pytest.raises(ConfigError, match=r"^engine: fused needs a chain of standard layers"):
        fedsim.baseline(raw)
    assert not any(tmp_path.iterdir())


def test_clients_alone_start_no_workers(tmp_path):
    raw = {
        "data": {"dataset": "digits", "clients": 3},
        "model": "linear",
        "train": {"rounds": 1},
        "engine": {"name": "local", "workers": 3},
        "output": str(tmp_path),
    }
    found = fedsim.baseline(raw)
    for run in (found.centralised, found.alone):
        engine = open_run(run.folder).environment()["engine"]
        assert engine["processes"] == 1 and engine["path"] in ("fused", "sequential", "vectorised")
