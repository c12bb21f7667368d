"""A transfer as a user runs it: from a config to a run folder."""

import json

import pytest
from safetensors.torch import load_file

import fedsim
from fedsim import runs
from fedsim.errors import ConfigError, DataError, TransferError
from fedsim.params import same_bits

CONFIG = {
    "name": "two",
    "data": {"dataset": "breast-cancer"},
    "model": "linear",
    "train": {"optimizer": {"name": "adam", "lr": 0.02}},
    "transfer": {"protocol": "plain", "overlap": 40, "labelled": 20, "hidden": 4, "iterations": 3},
}


def run(tmp_path, **changes):
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return fedsim.run(CONFIG, {"output": str(tmp_path), **dotted})


def nets(done):
    return [load_file(done.folder / f"party-{role}.safetensors") for role in "ab"]


def test_a_run_folder_has_both_nets_rounds_and_a_summary(tmp_path):
    begun, seen = [], []
    done = fedsim.run(
        CONFIG,
        {"output": str(tmp_path)},
        on_start=lambda run, pair: begun.append((run.folder, pair.rounds)),
        on_round=seen.append,
    )
    summary = done.summary
    assert begun == [(done.folder, 3)]
    assert [record.round for record in seen] == [record.round for record in done.rounds] == [1, 2, 3]
    assert summary["status"] == "finished"
    assert summary["kind"] == "transfer"
    assert summary["accuracy"] == done.rounds[-1].accuracy  # the protocol predicts what an onlooker sees
    assert summary["transfer"]["overlap"] == 40
    assert summary["transfer"]["predictions"] == 114  # a fifth of 569, held out
    assert summary["totals"]["bytes_up"] > 0
    assert done.rounds[-1].train_loss < done.rounds[0].train_loss
    assert sum(tensor.numel() for net in nets(done) for tensor in net.values()) == summary["model"]["parameters"]
    assert not (done.folder / "model.safetensors").exists()
    with pytest.raises(DataError, match=r"party-a\.safetensors and party-b\.safetensors"):
        done.model()
    with pytest.raises(DataError, match="a transfer has no checkpoint"):
        fedsim.resume(done.folder)
    with pytest.raises(DataError, match="a transfer cannot be verified"):
        fedsim.verify(done.folder)


def test_the_same_config_gives_the_same_bits_on_queues_and_on_flower(tmp_path):
    shared = {"transfer__protocol": "secret-sharing"}
    one, two, three = run(tmp_path, **shared), run(tmp_path, **shared), run(tmp_path, engine="flower", **shared)
    for others in (nets(two), nets(three)):
        assert all(same_bits(a, b) for a, b in zip(nets(one), others, strict=True))
    other = run(tmp_path, seed=1, **shared)
    assert not any(same_bits(a, b) for a, b in zip(nets(one), nets(other), strict=True))


def test_a_failed_transfer_says_why_and_leaves_no_net(tmp_path):
    with pytest.raises(TransferError, match="overflow"):
        run(tmp_path, transfer__protocol="secret-sharing", train__optimizer={"name": "sgd", "lr": 1e6})
    (folder,) = tmp_path.iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "overflow" in summary["error"]
    assert not list(folder.glob("*.safetensors"))


def test_eval_every_leaves_out_scores_but_not_the_last(tmp_path):
    done = run(tmp_path, train__eval_every=2, transfer__iterations=5)
    assert [record.accuracy is not None for record in done.rounds] == [False, True, False, True, True]


def test_a_sweep_runs_transfers(tmp_path):
    done = fedsim.sweep(CONFIG, {"output": str(tmp_path), "transfer.overlap": [20, 40]})
    rows = done.rows()
    assert [row["status"] for row in rows] == ["finished", "finished"]
    found = [runs.open_run(done.folder / row["run"]).summary()["transfer"]["overlap"] for row in rows]
    assert found == [20, 40]


@pytest.mark.parametrize("call", [fedsim.split, fedsim.baseline, fedsim.inspect, fedsim.bench])
def test_what_is_of_clients_says_so(call):
    with pytest.raises(ConfigError, match="transfer: this is of federations of clients"):
        call(CONFIG)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transfer__loss": "exact", "transfer__protocol": "paillier"}, "transfer.loss: exact needs"),
        ({"transfer__key_bits": 1024}, "transfer.key_bits: 1024 can be broken"),
        ({"transfer__labelled": 41}, r"transfer.labelled: must be <= transfer.overlap \(40\), got 41"),
        ({"transfer__alignment": "inner-product", "transfer__l2": 0.0}, "transfer.l2: must be > 0 with alignment"),
        ({"transfer__overlap": 456}, r"transfer.overlap: must be <= the number of training rows \(455\), got 456"),
        ({"transfer__positive": [2]}, r"transfer.positive: must be classes in \[0, 2\), got 2"),
        ({"train__local_epochs": 2}, "train.local_epochs: has no meaning in a transfer"),
        ({"strategy": "fedavgm"}, "strategy.name: has no meaning in a transfer"),
        ({"transforms": [{"name": "half"}]}, "transforms: has no meaning in a transfer"),
        ({"engine": "reference"}, "engine.name: must be local or flower in a transfer, got reference"),
        ({"pruning": "snip"}, "pruning: snip asks for gradients of clients, which two parties cannot do"),
        ({"pruning": {"name": "l1-filter", "at": 1}}, "pruning: l1-filter removes channels"),
        ({"pruning": {"name": "lottery-ticket", "every": 3}}, r"must be below transfer.iterations \(3\), got 3"),
        ({"model": {"name": "mlp", "norm": "batch"}}, "model: a party's net must treat every row by itself"),
        ({"model": {"name": "linear", "regularizers": [{"name": "mixup"}]}}, "model.regularizers: those that change"),
        ({"transfer__source_run": "nowhere"}, "nowhere: no such run folder"),
        ({"data__dataset": {"name": "party-files"}}, "data.dataset.a: must be a file, or b, or both, got neither"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises((ConfigError, DataError), match=said):
        run(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_each_party_has_its_own_file(tmp_path):
    rows_a = "\n".join(f"p{i},{i % 2},{i * 0.5},{(-1) ** i}" for i in range(30))
    rows_b = "\n".join(f"p{i},{(-1) ** i * 2},{i * i}," for i in range(10, 45))
    held_out = "\n".join(f"q{i},{(-1) ** i * 2},{i * i},{i % 2}" for i in range(8))
    (tmp_path / "a.csv").write_text(f"id,label,one,two\n{rows_a}\n")
    (tmp_path / "b.csv").write_text(f"id,three,four,label\n{rows_b}\n{held_out}\n")
    done = run(
        tmp_path / "runs",
        data={"dataset": {"name": "party-files", "a": str(tmp_path / "a.csv"), "b": str(tmp_path / "b.csv")}},
        transfer={"protocol": "secret-sharing", "overlap": "all", "labelled": "all", "hidden": 3, "iterations": 20},
    )
    assert done.summary["transfer"]["overlap"] == 20  # p10 to p29
    assert done.summary["transfer"]["predictions"] == 8
    assert done.summary["accuracy"] == 1.0  # the sign of column three is the label
