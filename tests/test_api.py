"""Whole runs through the Python API: resume after every kind of stop, divergence, independence of the process."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import fedsim
from fedsim import params as p
from fedsim import recording, rng, runs
from fedsim.config import build, load
from fedsim.engines import reference
from fedsim.engines.engine import Job
from fedsim.errors import ClientError, ConfigError, DataError, RunError
from fedsim.federation import cohort, start
from fedsim.records import Broadcast
from fedsim.training.client import train_client

CONTROL = '''
"""In the manner of SCAFFOLD: a state at each client, one at the server, and an extra that every client is sent."""

import os
import time
from dataclasses import replace

from fedsim import params as p
from fedsim.strategies.server_rules import ServerRule
from fedsim.strategies.strategy import fedavg
from fedsim.training.local_rule import LocalRule


def correct(grads, local, broadcast, state):
    time.sleep(float(os.environ.get("TEST_SLEEP_S", 0)))
    return {n: g - state[n] + broadcast.extra[n] for n, g in grads.items()}


def finish(local, broadcast, state, steps):
    moved = p.sub(broadcast.params, local)
    return {n: 0.5 * (state[n] - broadcast.extra[n] + moved[n] / steps) for n in state}


def step(params, update, state):
    return p.add(params, update), {n: 0.5 * state[n] - 0.1 * update[n] for n in state}


def control():
    server = ServerRule(p.zeros_like, step, dict)
    return replace(fedavg(), local=LocalRule(p.zeros_like, correct, finish), server=server)
'''
TIED = """
from torch import nn


class Tied(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, num_classes)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())
"""
TRAIN = {
    "rounds": 4,
    "clients_per_round": 3,
    "batch_size": 32,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a strategy of its own in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "test_control.py").write_text(CONTROL)
    return folder


@pytest.fixture(autouse=True)
def _in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    yield
    sys.modules.pop("test_control", None)


def config(**train):
    return {
        "name": "small",
        "seed": 3,
        "data": {"dataset": "digits", "clients": 6, "split": {"name": "dirichlet", "alpha": 0.5}},
        "model": {"name": "mlp", "hidden": [12], "dropout": 0.3},
        "train": {**TRAIN, **train},
        "strategy": "test_control:control",
        "engine": "reference",  # of which some tests break single clients
        "output": "runs",
    }


@pytest.fixture(scope="module")
def whole(place):
    """The run that was never stopped."""
    before = Path.cwd()
    os.chdir(place)
    try:
        return fedsim.run(config())
    finally:
        os.chdir(before)


def lines(folder):
    return [{**json.loads(line), "seconds": 0} for line in (folder / "rounds.jsonl").read_text().splitlines()]


def assert_equal(folder, expected):
    """Same numbers, bit for bit; only wall times may differ."""
    assert lines(folder) == lines(expected)
    for name in ("clients.jsonl", "model.safetensors", "config.yaml", "split.json", "checkpoint/state.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    one, other = (json.loads((f / "summary.json").read_text()) for f in (folder, expected))
    assert {**one, "totals": 0} == {**other, "totals": 0}
    tensors = "checkpoint/" + json.loads((expected / "checkpoint/state.json").read_text())["file"]
    assert (folder / tensors).read_bytes() == (expected / tensors).read_bytes()
    assert not list(folder.rglob("*.part"))


class Stopped(Exception):  # noqa: N818
    """Something that goes wrong outside fedsim."""


def stopped_after(round, error=Stopped):
    """A run whose listener breaks after this round; its folder."""

    def on_round(record):
        if record.round == round:
            raise error

    folders = []
    with pytest.raises(error):
        fedsim.run(config(), on_start=lambda run, federation: folders.append(run.folder), on_round=on_round)
    return folders[0]


# ---------------------------------------------------------------- a whole run


def test_a_run_leaves_a_whole_folder(whole):
    assert [record.round for record in whole.rounds] == [1, 2, 3, 4]
    assert whole.summary["status"] == "finished" and whole.summary["rounds_done"] == 4
    assert whole.config["train"]["rounds"] == 4 and whole.config["seed"] == 3
    state = runs.load_checkpoint(whole.folder)
    assert len(state.clients) >= 4 and all(p.l2_norm(own) > 0 for own in state.clients.values())
    assert p.l2_norm(state.server) > 0
    opened = runs.open_run(whole.folder)
    assert opened.environment()["fedsim"] == fedsim.__version__ and opened.split()["num_clients"] == 6
    assert {e.round for e in whole.clients} == {1, 2, 3, 4}


def test_the_model_of_a_run_scores_what_the_run_says(whole):
    from fedsim.config import build
    from fedsim.config import load as config_files

    data = build.federated_data(config_files.load({**config(), "strategy": "fedavg"}))
    with torch.no_grad():
        right = whole.model()(data.test.inputs).argmax(1) == data.test.labels
    assert float(right.double().mean()) == whole.rounds[-1].accuracy == whole.summary["accuracy"]
    assert p.same_bits(p.of(whole.model())[0], runs.load_checkpoint(whole.folder).params)
    assert not whole.model().training


def test_a_model_with_tied_weights_comes_back(place):
    (place / "test_tied.py").write_text(TIED)
    run = fedsim.run({**config(rounds=1, clients_per_round=1), "model": "test_tied:Tied", "strategy": "fedavg"})
    model = run.model()
    assert model.second.weight is model.first.weight
    assert torch.equal(model.second.weight, runs.load_checkpoint(run.folder).params["first.weight"])


def test_a_model_that_does_not_fit_the_config_any_more_is_refused():
    folder = stopped_after(1)
    written = runs.open_run(folder).config()
    runs.write_config(folder, {**written, "model": {**written["model"], "hidden": [13]}})
    with pytest.raises(DataError, match=r"does not fit the model of config\.yaml .*fc1\.weight: shapes differ"):
        fedsim.load(folder).model()


def test_a_run_can_be_opened_by_its_path(whole):
    assert fedsim.load(str(whole.folder)) == fedsim.load(whole.folder) == whole
    with pytest.raises(DataError, match="nowhere: no such run folder"):
        fedsim.load("nowhere")


def test_a_config_file_with_overrides_is_the_same_run(whole, place):
    import yaml

    (place / "small.yaml").write_text(yaml.safe_dump({**config(), "seed": 99}))
    assert_equal(fedsim.run(place / "small.yaml", {"seed": 3}).folder, whole.folder)


def test_hooks_hear_of_the_start_and_of_every_round():
    heard = []
    run = fedsim.run(
        config(rounds=2),
        on_start=lambda run, federation: heard.append((run.folder.exists(), federation.rounds)),
        on_round=heard.append,
    )
    assert heard[0] == (True, 2) and heard[1:] == run.rounds


def test_a_bad_config_writes_nothing(place):
    before = sorted((place / "runs").iterdir())
    with pytest.raises(ConfigError, match=r"train\.rounds"):
        fedsim.run(config(rounds=0))
    assert sorted((place / "runs").iterdir()) == before


# ---------------------------------------------------------------- independence


def test_results_depend_neither_on_the_past_nor_on_torchs_global_generator_nor_change_it(whole):
    fedsim.run({**config(rounds=1), "seed": 4})
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.rand(11)
        before = torch.get_rng_state()
        again = fedsim.run(config())
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert_equal(again.folder, whole.folder)


def test_another_seed_is_another_run(whole):
    other = fedsim.run({**config(), "seed": 4})
    assert lines(other.folder) != lines(whole.folder)


def test_the_import_is_light():
    """A fresh process: neither torch nor flwr, matplotlib or scikit-learn comes with ``import fedsim``."""
    code = "import sys, fedsim; print([m for m in ('torch', 'flwr', 'matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fedsim' has no attribute 'nothing'"):
        fedsim.nothing  # noqa: B018


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("round", [1, 3])
def test_a_run_that_an_error_stopped_goes_on_as_if_nothing_had_been(whole, round):
    folder = stopped_after(round)
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"
    assert_equal(fedsim.resume(folder).folder, whole.folder)


@pytest.mark.parametrize("call", [0, 2, 3, 10])
def test_a_run_interrupted_inside_a_round_goes_on_as_if_nothing_had_been(whole, monkeypatch, call):
    """Ctrl-C in the first, third, fourth or eleventh training of a client, three a round."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return train_client(*args, **kwargs)

    monkeypatch.setattr(reference, "train_client", interrupted)
    folders = []
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(config(), on_start=lambda run, federation: folders.append(run.folder))
    monkeypatch.setattr(reference, "train_client", train_client)
    found = json.loads((folders[0] / "summary.json").read_text())
    assert (found["status"], found["rounds_done"]) == ("interrupted", call // 3)
    assert_equal(fedsim.resume(folders[0]).folder, whole.folder)


@pytest.mark.parametrize(("step", "whole_calls"), [("add", 1), ("save_checkpoint", 2), ("save_model", 0)])
def test_a_run_that_stopped_while_it_wrote_goes_on_as_if_nothing_had_been(whole, monkeypatch, step, whole_calls):
    """As after a crash: the lines of round 2 are there, or half of them, but not its checkpoint; or the last model."""
    where = runs.Lines if step == "add" else runs
    real, calls, folders = getattr(where, step), [], []

    def crash(*args):
        calls.append(args)
        if len(calls) <= whole_calls:
            return real(*args)
        if step == "add":
            real(*args)
            for name in ("rounds.jsonl", "clients.jsonl"):
                os.truncate(folders[0] / name, (folders[0] / name).stat().st_size - 20)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(recording, "due", lambda last, now: True)
        patched.setattr(where, step, crash)
        with pytest.raises(KeyboardInterrupt):
            fedsim.run(config(), on_start=lambda run, federation: folders.append(run.folder.resolve()))
    assert runs.load_checkpoint(folders[0]).round == {"add": 1, "save_checkpoint": 1, "save_model": 4}[step]
    assert_equal(fedsim.resume(folders[0]).folder, whole.folder)


def test_a_run_can_be_stopped_and_resumed_again_and_again(whole):
    folder = stopped_after(1)
    for round in (2, 3):
        with pytest.raises(Stopped):
            fedsim.resume(folder, on_round=lambda record, last=round: _stop_at(record, last))
    assert_equal(fedsim.resume(folder).folder, whole.folder)


def _stop_at(record, round):
    if record.round == round:
        raise Stopped


@pytest.mark.parametrize(("saved", "done"), [(0, 1), (0, 3), (0, 4), (1, 2), (1, 4), (2, 3), (3, 4)])
def test_what_a_killed_run_leaves_goes_on_from_its_last_checkpoint(whole, tmp_path, monkeypatch, saved, done):
    """The folder as it is after round ``done``, with the checkpoint of round ``saved``: all that ``kill -9`` leaves."""
    left, folders = tmp_path / "left", []

    def on_round(record):
        if record.round == done:
            shutil.copytree(folders[0], left, ignore=shutil.ignore_patterns(".lock"))

    with monkeypatch.context() as patched:
        patched.setattr(recording, "due", lambda last, now: len(runs.RunFolder(folders[0]).rounds()) == saved)
        fedsim.run(config(), on_start=lambda run, federation: folders.append(run.folder), on_round=on_round)
    assert runs.load_checkpoint(left).round == saved and len(runs.open_run(left).rounds()) == done
    assert json.loads((left / "summary.json").read_text())["status"] == "running"
    assert_equal(fedsim.resume(left).folder, whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize(("pause", "saved"), [(0, 2), (3600, 0)])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(whole, place, pause, saved):
    """SIGKILL in the middle of round 3, in which each step of a client takes at least 20 ms."""
    code = f"""
import fedsim
from fedsim import recording
recording.PAUSE_S, recording.PAUSE_WRITES = {pause}, 0
fedsim.run({config()!r} | {{'output': 'killed-{pause}'}})
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=place, env={**os.environ, "TEST_SLEEP_S": "0.02"})
    try:
        deadline = time.monotonic() + 60
        while len(_written(place, f"killed-{pause}")) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (folder,) = (place / f"killed-{pause}").iterdir()
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    assert runs.load_checkpoint(folder).round == saved
    resumed = fedsim.resume(folder).folder
    written = (resumed / "config.yaml").read_text()
    assert f"output: killed-{pause}" in written
    runs.write_bytes(resumed / "config.yaml", written.replace(f"output: killed-{pause}", "output: runs").encode())
    assert_equal(resumed, whole.folder)


def _written(place, output):
    return [line for path in place.glob(f"{output}/*/rounds.jsonl") for line in path.read_text().splitlines()]


def test_resuming_a_finished_run_changes_nothing(whole):
    again = fedsim.run(config())
    before = {f.name: f.read_bytes() for f in again.folder.iterdir() if f.is_file() and f.name != "summary.json"}
    assert fedsim.resume(again.folder) == again
    assert {f.name: f.read_bytes() for f in again.folder.iterdir() if f.name in before} == before
    assert_equal(again.folder, whole.folder)


def test_a_finished_run_made_longer_equals_a_longer_run(whole):
    short = fedsim.run(config(rounds=2))
    assert_equal(fedsim.resume(short.folder, rounds=4).folder, whole.folder)


def test_modules_beside_the_config_are_found_again_from_another_folder(tmp_path, monkeypatch):
    import yaml

    (tmp_path / "test_beside.py").write_text(CONTROL)
    (tmp_path / "beside.yaml").write_text(yaml.safe_dump({**config(rounds=1), "strategy": "test_beside:control"}))
    folder = fedsim.run(tmp_path / "beside.yaml").folder.resolve()
    monkeypatch.chdir(tmp_path.parent)
    sys.modules.pop("test_beside")
    assert len(fedsim.resume(folder, rounds=2).rounds) == 2
    sys.modules.pop("test_beside")
    assert not fedsim.load(folder).model().training
    sys.modules.pop("test_beside")


def test_a_run_cannot_be_made_shorter_than_it_is(whole):
    with pytest.raises(ConfigError, match="has 4 rounds already, got 3"):
        fedsim.resume(whole.folder, rounds=3)
    assert len(whole.rounds) == 4


@pytest.mark.parametrize("hidden", [[13], [12, 12], []])
def test_a_checkpoint_of_another_model_is_refused(hidden):
    folder = stopped_after(1)
    written = runs.open_run(folder).config()
    written["model"] = {**written["model"], "hidden": hidden}
    runs.write_config(folder, written)
    with pytest.raises(DataError, match=r"does not fit the model of config\.yaml"):
        fedsim.resume(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda params: {name: tensor.T.contiguous() for name, tensor in params.items()},
        lambda params: {name: tensor.double() for name, tensor in params.items()},
        lambda params: {**params, "more.weight": torch.ones(2)},
    ],
    ids=["shapes", "dtypes", "names"],
)
def test_a_checkpoint_with_other_tensors_is_refused(change):
    folder = stopped_after(1)
    state = runs.load_checkpoint(folder)
    matrices = {name: tensor for name, tensor in state.params.items() if tensor.ndim == 2}
    runs.save_checkpoint(folder, replace(state, params={**state.params, **change(matrices)}))
    with pytest.raises(DataError, match=r"does not fit the model of config\.yaml"):
        fedsim.resume(folder)


def test_what_was_never_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        fedsim.resume(tmp_path)
    runs.write_config(tmp_path, config())
    with pytest.raises(DataError, match=r"not a run folder \(it has no environment\.json\)"):
        fedsim.resume(tmp_path)
    runs.write_json(tmp_path / "environment.json", {})
    with pytest.raises(DataError, match=r"checkpoint/state\.json: missing"):
        fedsim.resume(tmp_path)


# ---------------------------------------------------------------- divergence


def test_divergence_fails_the_run_and_names_round_and_client(monkeypatch):
    folders = []
    with pytest.raises(ClientError, match=r"round 1, client \d: training diverged: train_loss is nan"):
        fedsim.run(
            config(optimizer={"name": "sgd", "lr": 1e30}),
            on_start=lambda run, federation: folders.append(run.folder),
        )
    found = json.loads((folders[0] / "summary.json").read_text())
    assert found["status"] == "failed" and found["error"].startswith("round 1, client ")
    assert runs.load_checkpoint(folders[0]).round == 0 and not (folders[0] / "model.safetensors").exists()


def diverging(round, client):
    def train(work, broadcast, who, data, **more):
        result = train_client(work, broadcast, who, data, **more)
        bad = (broadcast.round, who) == (round, client)
        return replace(result, update={n: t / 0 for n, t in result.update.items()}) if bad else result

    return train


def test_a_run_that_failed_late_keeps_its_last_whole_round_and_goes_on(whole, monkeypatch):
    folders, chosen = [], _cohort(3)
    monkeypatch.setattr(reference, "train_client", diverging(3, chosen[1]))
    with pytest.raises(ClientError, match=f"round 3, client {chosen[1]}: training diverged"):
        fedsim.run(config(), on_start=lambda run, federation: folders.append(run.folder))
    run = fedsim.load(folders[0])
    assert run.summary["error"].startswith(f"round 3, client {chosen[1]}: ") and run.summary["status"] == "failed"
    assert len(run.rounds) == 2 and runs.load_checkpoint(run.folder).round == 2
    assert p.all_finite(p.of(run.model())[0])
    monkeypatch.setattr(reference, "train_client", train_client)
    assert_equal(fedsim.resume(run.folder).folder, whole.folder)


def test_with_on_nan_skip_the_record_lists_the_client_and_the_run_finishes(monkeypatch):
    chosen = _cohort(3)
    monkeypatch.setattr(reference, "train_client", diverging(3, chosen[1]))
    run = fedsim.run(config(on_nan="skip"))
    assert [record.skipped for record in run.rounds] == [(), (), (chosen[1],), ()]
    assert [record.clients for record in run.rounds] == [3, 3, 2, 3]
    assert run.summary["status"] == "finished" and run.summary["totals"]["skipped_updates"] == 1


def test_if_every_client_is_skipped_the_model_stays(whole):
    run = fedsim.run(config(on_nan="skip", optimizer={"name": "sgd", "lr": 1e30}))
    assert [record.skipped for record in run.rounds] == [tuple(_cohort(round)) for round in (1, 2, 3, 4)]
    assert all(record.clients == 0 and record.train_loss is None for record in run.rounds)
    assert len({record.accuracy for record in run.rounds}) == 1
    assert run.summary["initial"]["accuracy"] == run.rounds[0].accuracy
    state = runs.load_checkpoint(run.folder)
    saved = safetensors.torch.load_file(run.folder / "model.safetensors")
    assert p.same_bits(state.params, saved) and p.all_finite(saved) and not state.clients


def _cohort(round):
    from fedsim import rng

    return rng.choice(rng.fold(3, "round", round, "cohort"), 6, 3).tolist()


def test_two_processes_cannot_write_one_run():
    run = fedsim.run(config(rounds=1))
    with runs.locked(run.folder), pytest.raises(RunError, match="another process is writing this run"):
        fedsim.resume(run.folder, rounds=2)
    assert len(fedsim.resume(run.folder, rounds=2).rounds) == 2


def test_a_run_with_missing_lines_is_not_resumed():
    run = fedsim.run(config(rounds=2))
    lines = (run.folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "rounds.jsonl").write_text(lines[1])
    with pytest.raises(DataError, match=r"rounds\.jsonl: holds 1 rounds, the checkpoint is of round 2"):
        fedsim.resume(run.folder, rounds=3)


FROZEN = """
from torch import nn


class Frozen(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
        self[1].weight.requires_grad_(False)
"""


@pytest.mark.parametrize("engine", ["reference", "flower"])
def test_frozen_parameters_stay_bit_for_bit_while_the_others_move(place, engine):
    (place / "test_frozen.py").write_text(FROZEN)
    states = [
        fedsim.run({**config(rounds=rounds), "model": "test_frozen:Frozen", "engine": engine}).model().state_dict()
        for rounds in (1, 3)
    ]
    assert torch.equal(states[0]["1.weight"], states[1]["1.weight"])
    assert all(not torch.equal(states[0][name], states[1][name]) for name in ("1.bias", "3.weight", "3.bias"))


def test_a_run_that_is_made_longer_and_interrupted_has_the_model_of_its_checkpoint():
    run = fedsim.run(config(rounds=2))

    def stop(record):
        if record.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.resume(run.folder, rounds=5, on_round=stop)
    state = runs.load_checkpoint(run.folder)
    assert state.round == 3
    assert p.same_bits(dict(run.model().named_parameters()), state.params)


def test_a_resume_is_written_down_in_the_environment():
    run = fedsim.run(config(rounds=1))
    assert "resumed" not in runs.open_run(run.folder).environment()
    for rounds in (2, 3):
        fedsim.resume(run.folder, rounds=rounds)
    resumed = runs.open_run(run.folder).environment()["resumed"]
    assert [(at["round"], at["engine"]["name"]) for at in resumed] == [(1, "reference"), (2, "reference")]


def test_a_finished_run_comes_back_untouched():
    run = fedsim.run(config(rounds=1))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.folder.rglob("*") if path.is_file()}
    fedsim.resume(run.folder)
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("what", ["inputs", "labels"])
def test_a_run_does_not_go_on_with_other_data(place, what):
    arrays = {"x": rng.normal(1, 60, 4).numpy(), "y": rng.bits(2, 60).numpy() % 3}
    np.savez(place / "mine.npz", **arrays)
    data = {"dataset": {"name": "npz", "path": "mine.npz"}, "clients": 3, "split": "iid"}
    run = fedsim.run({**config(rounds=1, optimizer="sgd"), "data": data, "strategy": "fedavg"})
    assert len(fedsim.resume(run.folder, rounds=2).rounds) == 2
    arrays["x" if what == "inputs" else "y"] = np.roll(arrays["x" if what == "inputs" else "y"], 1, axis=0)
    np.savez(place / "mine.npz", **arrays)
    with pytest.raises(DataError, match="data: must be what the run started with"):
        fedsim.resume(run.folder, rounds=3)


MINE = "from torch import nn\n\ndef mine():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias={}))\n"


def test_a_module_is_never_mistaken_for_another_of_the_same_name(place):
    for folder, bias in (("one", True), ("two", False)):
        (place / folder).mkdir()
        (place / folder / "mine_twice.py").write_text(MINE.format(bias))
        written = {**config(rounds=1), "model": "mine_twice:mine", "strategy": "fedavg"}
        (place / folder / "c.yaml").write_text(yaml.safe_dump(written))
    assert fedsim.run(place / "one" / "c.yaml").summary["model"]["parameters"] == 650
    with pytest.raises(ConfigError, match=r"two/mine_twice\.py has the name of .*one/mine_twice\.py"):
        fedsim.run(place / "two" / "c.yaml")


def test_a_run_folder_does_not_bring_code_of_its_own(place):
    run = fedsim.run(config(rounds=1))
    (run.folder / "planted.py").write_text("raise SystemExit('planted code ran')")
    environment = runs.open_run(run.folder).environment()
    runs.write_json(run.folder / "environment.json", {**environment, "config_folder": str(run.folder)})
    runs.write_config(run.folder, {**run.config, "model": {"name": "planted:model"}})
    with pytest.raises(ConfigError, match="No module named 'planted'"):
        run.model()


def test_all_that_an_engine_needs_can_be_sent_to_another_process():
    made, _ = build.federation(load.load({**config(), "strategy": "fedavg"}))
    job = pickle.loads(pickle.dumps(Job(made.work, made.data, made.strategy, made.on_nan, 2, 1)))
    first = start(made)
    broadcast = Broadcast(first.params, first.buffers, {}, 1)
    one, other = (
        train_client(each.work, broadcast, 2, each.data.client(2), state={}, key=9)
        for each in (job, Job(made.work, made.data, made.strategy, made.on_nan, 2, 1))
    )
    assert p.same_bits(one.update, other.update)


def test_a_run_stopped_before_its_first_round_is_resumed_from_the_start(whole):
    seen = []

    def stop(run, federation):
        seen.append(run)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(config(), on_start=stop)
    (stopped,) = seen
    assert stopped.summary["status"] == "interrupted" and stopped.rounds == []
    assert_equal(fedsim.resume(stopped.folder).folder, whole.folder)


def test_the_seed_of_the_data_fixes_split_and_held_out_part_alone():
    first, other = (fedsim.split(config(), {"seed": seed, "data.seed": 11}) for seed in (1, 2))
    assert first.facts == other.facts and np.array_equal(first.partition.indices, other.partition.indices)
    assert fedsim.split(config(), {"seed": 1}).facts["fingerprint"] != first.facts["fingerprint"]
    runs_ = [fedsim.run(config(rounds=1), {"seed": seed, "data.seed": 11}) for seed in (1, 2)]
    assert runs_[0].rounds[0].loss != runs_[1].rounds[0].loss


def test_a_round_records_who_took_part():
    plain = {**config(), "strategy": "fedavg"}
    federation, _ = build.federation(load.load(plain))
    run = fedsim.run(plain)
    assert [list(r.cohort) for r in run.rounds] == [cohort(federation, r.round).tolist() for r in run.rounds]


def test_a_change_of_somebody_elses_code_is_told(place):
    source = "from torch import nn\n\n\ndef mine():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (place / "mended.py").write_text(source)
    run = fedsim.run({**config(rounds=1), "model": "mended:mine", "strategy": "fedavg"})
    fedsim.resume(run.folder, rounds=2)
    (place / "mended.py").write_text(source + "# mended\n")
    with pytest.warns(UserWarning, match=r"mended changed since .*small-.* was started"):
        fedsim.resume(run.folder, rounds=3)
    with pytest.warns(UserWarning, match="mended changed"):
        run.model()


def test_a_run_tells_in_a_line_what_became_of_it(whole):
    told = repr(whole)
    assert told.startswith(f"Run('{whole.folder}', status=finished, rounds_done=4, accuracy=0.")
    assert {"run", "resume", "load", "split", "baseline"} <= set(dir(fedsim))
