"""Runs that are run again: what is the same, what differs, what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch

import fedsim
from fedsim.errors import ConfigError, DataError

MODEL = """
from torch import nn


def flat(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
REFERENCE = {"engine.name": "reference"}


def config(**changes):
    return {
        "name": "small",
        "seed": 3,
        "data": {"dataset": "digits", "clients": 6, "split": {"name": "dirichlet", "alpha": 0.5}},
        "model": {"name": "mlp", "hidden": [12], "dropout": 0.3},
        "train": {"rounds": 4, "clients_per_round": 3, "batch_size": 32, "eval_every": 2},
        "engine": {"name": "local", "mode": "fused", "workers": 1},
        "output": "runs",
        **changes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified")
    (folder / "test_verified_model.py").write_text(MODEL)
    return folder


@pytest.fixture(autouse=True)
def _in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


@pytest.fixture(scope="module")
def whole(place):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        patched.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return place / fedsim.run(config()).folder


@pytest.fixture
def copy(whole, tmp_path):
    """The run, to be tampered with."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit(folder, round, **changes):
    path = folder / "rounds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[round - 1] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_equal_bit_for_bit_and_its_folder_is_left_alone(whole):
    before = contents(whole)
    done = fedsim.verify(whole, "all")
    assert contents(whole) == before
    assert (done.status, done.rounds, done.tensors, done.reasons) == ("equal", 4, True, ())
    assert done.told() == ["equal, bit for bit: 4 of 4 rounds and the final tensors"]
    assert {str(path) for path in whole.parent.iterdir()} == {str(whole)}


PRUNING = [{"name": "lottery-ticket", "every": 1, "rate": 0.4}, {"name": "l1-filter", "at": 2, "sparsity": 0.5}]


@pytest.mark.parametrize("pruning", PRUNING, ids=lambda section: section["name"])
def test_a_pruned_run_is_equal_bit_for_bit(pruning, tmp_path):
    run = fedsim.run(config(pruning=pruning, output=str(tmp_path)))
    assert [record.sparsity is None for record in run.rounds] == [True, pruning["name"] == "l1-filter", False, False]
    done = fedsim.verify(run.folder, "all")
    assert (done.status, done.rounds, done.tensors, done.reasons) == ("equal", 4, True, ())
    edit(run.folder, 4, sparsity=0.123)
    found = fedsim.verify(run.folder, "all")
    assert (found.status, found.first.round, found.first.field) == ("differs", 4, "sparsity")


@pytest.mark.parametrize(("rounds", "done"), [(1, 1), (3, 3), (9, 4)])
def test_as_many_rounds_are_run_as_are_asked_for_and_there(whole, rounds, done):
    seen = []
    found = fedsim.verify(whole, rounds, on_round=lambda record: seen.append(record.round))
    assert seen == list(range(1, done + 1))
    assert (found.status, found.rounds, found.recorded, found.tensors) == ("equal", done, 4, done == 4)


@pytest.mark.parametrize("engine", ["reference", "flower"])
def test_another_engine_is_equal_within_tolerance(whole, engine):
    done = fedsim.verify(whole, "all", {"engine.name": engine})
    assert (done.status, done.equal, done.first, done.tensors) == ("within tolerance", True, None, True)
    assert 0 < done.largest.relative < 4e-5
    assert done.reasons[0] == f"engine: recorded local, now {engine}"
    assert done.reasons[1].startswith("plan: recorded fused, ")


@pytest.mark.parametrize("engine", ["reference", "flower"])
def test_any_engine_can_be_stopped_where_it_differs(copy, engine):
    edit(copy, 2, clients=77)
    done = fedsim.verify(copy, "all", {"engine.name": engine})
    assert (done.status, done.rounds, done.first.field) == ("differs", 2, "clients")


def test_a_difference_within_tolerance_says_where_it_is_largest_and_what_is_different(copy):
    record = json.loads((copy / "rounds.jsonl").read_text().splitlines()[1])
    edit(copy, 2, train_loss=record["train_loss"] * (1 + 1.5e-5))
    environment = json.loads((copy / "environment.json").read_text())
    edit_json(copy / "environment.json", torch="1.0", engine={**environment["engine"], "name": "ray"})
    done = fedsim.verify(copy)
    assert done.told() == [
        "equal within 1e-05 a round (largest difference 1.5e-05 in train_loss of round 2): 3 of 4 rounds",
        f"different here: torch: recorded 1.0, now {environment['torch']}",
        "different here: engine: recorded ray, now local",
    ]


@pytest.mark.parametrize(
    ("round", "changes", "text"),
    [
        (2, {"train_loss": 0.51}, "round 2, train_loss: recorded 0.51, now "),
        (3, {"cohort": [0, 1, 2, 3]}, "round 3, cohort: recorded 0, 1, 2, 3, now "),
        (1, {"bytes_up": 7}, "round 1, bytes_up: recorded 7, now "),
        (2, {"loss": None}, "round 2, loss: recorded null, now "),
        (2, {"client_accuracy_mean": 0.0}, "round 2, client_accuracy_mean: recorded 0, now "),
    ],
)
def test_the_first_difference_is_told_and_nothing_is_run_beyond_it(copy, round, changes, text):
    edit(copy, round, **changes)
    edit(copy, 4, clients=77)
    done = fedsim.verify(copy, "all")
    assert (done.status, done.rounds, done.tensors) == ("differs", round, False)
    assert done.told()[0].startswith(text)
    assert done.told()[1:] == [
        "nothing that environment.json tells is different here: the folder or fedsim itself was changed"
    ]


def test_rounding_before_the_first_difference_is_told(copy):
    edit(copy, 3, clients=77)
    done = fedsim.verify(copy, "all", REFERENCE)
    assert done.told()[0] == "round 3, clients: recorded 77, now 3"
    assert done.told()[-1].startswith("rounding differs before that or beside it, which training amplifies (largest ")


def test_the_recorded_plan_is_taken_not_the_fastest(copy):
    path = copy / "config.yaml"
    path.write_text(path.read_text().replace("mode: fused", "mode: auto"))
    environment = json.loads((copy / "environment.json").read_text())
    edit_json(copy / "environment.json", engine={**environment["engine"], "path": "sequential", "chunk": 1})
    done = fedsim.verify(copy, "all")
    assert (done.status, done.reasons) == ("within tolerance", ())  # it ran as fused, whatever the folder says now


def test_bytes_of_another_engine_are_not_compared(copy):
    edit(copy, 1, bytes_up=7)
    assert fedsim.verify(copy, 1, REFERENCE).equal


def test_the_initial_model_is_compared(copy):
    summary = json.loads((copy / "summary.json").read_text())
    edit_json(copy / "summary.json", initial={**summary["initial"], "loss": 9.0})
    done = fedsim.verify(copy)
    assert (done.status, done.rounds) == ("differs", 0)
    assert done.told()[0].startswith("round 0, loss: recorded 9, now 2.")


@pytest.mark.parametrize(("add", "status"), [(1e-6, "within tolerance"), (0.1, "differs")])
def test_final_tensors_are_compared_when_all_rounds_are_run(copy, add, status):
    path = copy / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = max(tensors)
    tensors[name].view(-1)[3] += add
    safetensors.torch.save_file(tensors, path)
    assert fedsim.verify(copy, 3).status == "equal"
    done = fedsim.verify(copy, "all")
    assert (done.status, done.tensors) == (status, True)
    assert (done.first or done.largest).field.endswith("in model.safetensors")
    assert (done.first or done.largest).field.startswith(f"{name}[")


def test_a_round_that_was_evaluated_out_of_its_turn_is_compared_in_all_else(place):
    short = fedsim.run(config(train={**config()["train"], "rounds": 3}))
    longer = fedsim.resume(short.folder, rounds=5)  # round 3 was the last, and evaluated, and no longer is the last
    assert [record.loss is None for record in longer.rounds] == [True, False, False, False, False]
    assert fedsim.verify(longer.folder, "all").status == "equal"
    edit(longer.folder, 3, train_loss=9.0)
    assert "round 3, train_loss" in fedsim.verify(longer.folder, "all").told()[0]


def test_an_unfinished_run_is_compared_as_far_as_it_came(place):
    def stop(record):
        if record.round == 2:
            raise KeyboardInterrupt

    folders = set(Path("runs").iterdir()) if Path("runs").exists() else set()
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(config(), on_round=stop)
    (folder,) = set(Path("runs").iterdir()) - folders
    done = fedsim.verify(folder, "all")
    assert (done.status, done.rounds, done.recorded, done.tensors) == ("equal", 2, 2, True)


def test_other_data_is_refused(copy):
    edit_json(copy / "split.json", fingerprint="0" * 64)
    with pytest.raises(DataError, match="examples or their split have changed"):
        fedsim.verify(copy)


def test_a_changed_config_is_refused_as_other_data_or_told_as_another_run(copy):
    path = copy / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("alpha: 0.5", "alpha: 0.7"))
    with pytest.raises(DataError, match="have changed"):
        fedsim.verify(copy)
    assert "local_epochs: 1" in text
    path.write_text(text.replace("local_epochs: 1", "local_epochs: 2"))
    assert fedsim.verify(copy).told()[0].startswith("round 1, ")


def test_a_model_of_ones_own_is_found_and_its_changes_are_told(place, tmp_path):
    folder = place / fedsim.run(config(model="test_verified_model:flat")).folder
    os.chdir(tmp_path)  # the config's folder is remembered
    assert fedsim.verify(folder, "all").status == "equal"
    environment = json.loads((folder / "environment.json").read_text())
    edit_json(folder / "environment.json", code={"test_verified_model": "0" * 64})
    edit(folder, 1, clients=7)
    assert environment["code"]["test_verified_model"] != "0" * 64
    assert "perhaps because: the code of test_verified_model has changed" in fedsim.verify(folder).told()


@pytest.mark.parametrize("rounds", [0, -1, 1.5, "many", True])
def test_rounds_are_a_number_or_all(whole, rounds):
    with pytest.raises(ConfigError, match="rounds: must be a whole number >= 1, or all, got"):
        fedsim.verify(whole, rounds)


def test_what_would_make_another_run_cannot_be_changed(whole):
    with pytest.raises(ConfigError) as caught:
        fedsim.verify(whole, 1, {"train.rounds": 3, "seed": 4, "engine.name": "reference", "engines": 1})
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["train.rounds", "seed", "engines"]


def test_what_holds_no_rounds_of_a_federation_is_refused(copy, tmp_path):
    with pytest.raises(DataError, match="no such run folder"):
        fedsim.verify(tmp_path / "nowhere")
    edit_json(copy / "summary.json", kind="alone")
    with pytest.raises(DataError, match="a baseline \\(alone\\) cannot be verified"):
        fedsim.verify(copy)
    edit_json(copy / "summary.json", kind="federated")
    lines = (copy / "rounds.jsonl").read_text().splitlines(keepends=True)
    (copy / "rounds.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="line 1 must be of round 1, but is of 2"):
        fedsim.verify(copy)
    (copy / "rounds.jsonl").unlink()
    with pytest.raises(DataError, match="no whole round to verify"):
        fedsim.verify(copy)
