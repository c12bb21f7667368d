"""Sweeps through the Python API: their folder, what they come to, and going on after every kind of stop."""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import fedsim
from fedsim.errors import ConfigError, DataError, RunError

CONFIG = {
    "name": "small",
    "data": {"dataset": "digits", "clients": 6, "split": {"name": "dirichlet", "alpha": 0.5}},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 3, "clients_per_round": 3, "batch_size": 32},
    "engine": {"name": "local", "mode": "sequential"},
}
GRID = {"train.local_epochs": [1, 4], "seed": [1, 2, 3]}
NAMES = [f"0{n}-local_epochs={e}-seed={s}" for n, (e, s) in enumerate([(e, s) for e in (1, 4) for s in (1, 2, 3)], 1)]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A finished sweep, for looking at."""
    return fedsim.sweep(CONFIG, {**GRID, "output": str(tmp_path_factory.mktemp("grid"))})


def lines(folder):
    """Every round of a run, without wall times."""
    return [{**json.loads(line), "seconds": None} for line in (folder / "rounds.jsonl").read_text().splitlines()]


def same(one, other):
    """Whether two runs have the same rounds and the same model, bit for bit."""
    tensors = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other)]
    alike = all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    return alike and len(lines(one)) > 0 and lines(one) == lines(other)


def statuses(sweep):
    return [row["status"] for row in sweep.rows()]


# ---------------------------------------------------------------- what is written


def test_every_combination_is_the_run_that_it_would_be_by_itself(grid):
    assert re.fullmatch(r"small-sweep-\d{4}-\d\d-\d\d-1", grid.folder.name)
    assert [run.folder.name for run in grid.runs] == NAMES
    for row, run in zip(grid.rows(), grid.runs, strict=True):
        alone = fedsim.run(CONFIG, {"train.local_epochs": row["train.local_epochs"], "seed": row["seed"]})
        assert same(run.folder, alone.folder)
        assert run.config == {**alone.config, "output": str(grid.folder.parent)}
        assert {p.name for p in run.folder.iterdir()} == {p.name for p in alone.folder.iterdir()}
    assert not (grid.folder / ".new").exists()


def test_the_rows_are_what_the_rounds_come_to(grid):
    for row, run in zip(grid.rows(), grid.runs, strict=True):
        rounds = run.rounds
        assert row == {
            "run": run.folder.name,
            "train.local_epochs": run.config["train"]["local_epochs"],
            "seed": run.config["seed"],
            "status": "finished",
            "rounds": 3,
            "loss": rounds[-1].loss,
            "accuracy": rounds[-1].accuracy,
            "best_accuracy": max(r.accuracy for r in rounds),
            "seconds": sum(r.seconds for r in rounds),
            "bytes_up": sum(r.bytes_up for r in rounds),
            "bytes_down": sum(r.bytes_down for r in rounds),
            "error": None,
        }
    with (grid.folder / "summary.csv").open() as file:
        found = list(csv.DictReader(file))
    told = [{key: "" if value is None else str(value) for key, value in row.items()} for row in grid.rows()]
    assert found == told


def test_runs_that_differ_only_in_seed_are_one_line_with_mean_and_deviation(grid):
    table = grid.table()
    assert [(line["local_epochs"], line["n"]) for line in table] == [("1", "3"), ("4", "3")]
    for line, part in zip(table, np.split(np.arange(6), 2), strict=True):
        for title, key, scale in (("accuracy", "accuracy", 100), ("loss", "loss", 1)):
            values = [grid.rows()[i][key] * scale for i in part]
            mean, deviation = (float(x) for x in line[title].removesuffix(" %").split(" ± "))
            assert mean == pytest.approx(np.mean(values), abs=0.51 * 10 ** -_decimals(line[title]))
            assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.51 * 10 ** -_decimals(line[title]))
            assert deviation != pytest.approx(statistics.pstdev(values), abs=0.51 * 10 ** -_decimals(line[title]))
    page = (grid.folder / "summary.md").read_text()
    assert page.startswith("# small: sweep of local_epochs, seed\n\n6 of 6 runs finished.\n")
    assert all(f"| {' | '.join(line.values())} |\n" in page for line in table)


def _decimals(told):
    return len(told.partition(" ")[0].partition(".")[2])


def test_a_sweep_can_be_opened_compared_and_reported(grid):
    again = fedsim.load_sweep(grid.folder)
    assert again == grid and again.rows() == grid.rows()
    from fedsim.report import groups, report
    from fedsim.runs import open_run

    compared = groups.compare([open_run(run.folder) for run in again.runs])
    assert [(group.label, len(group.finished)) for group in compared.groups] == [
        ("local_epochs=1", 3),
        ("local_epochs=4", 3),
    ]
    assert report.write(grid.runs[0].folder).exists()


def test_components_and_lists_are_axes_and_the_table_tells_them_apart():
    done = fedsim.sweep(
        CONFIG,
        {
            "train.rounds": 1,
            "train.optimizer": [{"name": "sgd", "lr": 0.1}, {"name": "sgd", "lr": 0.5}],
            "model.hidden": [[], [4, 4]],
        },
    )
    assert [(line["optimizer"], line["hidden"], line["status"]) for line in done.table()] == [
        ("sgd(lr=0.1)", "[]", "finished"),
        ("sgd(lr=0.1)", "[4, 4]", "finished"),
        ("sgd(lr=0.5)", "[]", "finished"),
        ("sgd(lr=0.5)", "[4, 4]", "finished"),
    ]
    assert [run.config["model"]["hidden"] for run in done.runs] == [[], [4, 4]] * 2
    assert [run.config["train"]["optimizer"]["lr"] for run in done.runs] == [0.1, 0.1, 0.5, 0.5]
    assert done.rows()[1]["model.hidden"] == [4, 4]


def test_a_sweep_with_a_mistake_leaves_nothing(tmp_path):
    for changes, jobs in (({"seed": [1, -1]}, 1), ({"seed": [1]}, 0)):
        with pytest.raises(ConfigError):
            fedsim.sweep(CONFIG, changes, jobs=jobs)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- side by side


def test_runs_side_by_side_give_the_same_numbers(grid):
    ended = []
    done = fedsim.sweep(CONFIG, {**GRID, "seed": [2]}, jobs=2, on_end=lambda row: ended.append(row["run"]))
    assert sorted(ended) == [run.folder.name for run in done.runs]
    alone = [run for run in grid.runs if run.config["seed"] == 2]
    for run, other in zip(done.runs, alone, strict=True):
        assert same(run.folder, other.folder)
        assert (run.config["engine"]["workers"], other.config["engine"]["workers"]) == (1, "auto")
        assert json.loads((run.folder / "environment.json").read_text())["engine"]["processes"] == 1


DEADLY = """
import os
from torch import nn


class Net(nn.Module):
    def __init__(self, input_shape, num_classes, dies=False):
        super().__init__()
        self.fc, self.dies = nn.Linear(64, num_classes), dies

    def forward(self, x):
        if self.dies and not os.path.exists("cured"):
            os.kill(os.getpid(), 9)
        print("forward")
        return self.fc(x.flatten(1))
"""


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_run_and_the_others_go_on(tmp_path):
    study = tmp_path / "study"  # its modules are found beside the config
    study.mkdir()
    (study / "deadly.py").write_text(DEADLY)
    config = {**CONFIG, "model": "deadly:Net", "train": {"rounds": 1}}
    (study / "study.yaml").write_text(yaml.safe_dump(config))
    done = fedsim.sweep(study / "study.yaml", {"model.dies": [True, False]}, jobs=2)
    assert [(row["status"], row["error"]) for row in done.rows()] == [
        ("failed", "its process ended by signal 9"),
        ("finished", None),
    ]
    assert done.runs[-1].model()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    (tmp_path / "cured").touch()
    shutil.move(study / "study.yaml", tmp_path / "gone.yaml")  # sweep.yaml has all that it needs
    again = fedsim.resume_sweep(done.folder, jobs=2)
    assert statuses(again) == ["finished", "finished"]
    assert json.loads((done.folder / "failures.json").read_text()) == {}


# ---------------------------------------------------------------- failures


def test_a_run_that_diverges_is_a_row_and_the_others_go_on():
    ended = []
    done = fedsim.sweep(CONFIG, {"train.optimizer.lr": [1e30, 0.1]}, on_end=ended.append)
    bad, good = done.rows()
    assert ended == [bad, good]
    assert (bad["status"], good["status"]) == ("failed", "finished")
    assert bad["error"].startswith("round 1, client ") and "diverged" in bad["error"]
    assert [line["accuracy"] == "–" for line in done.table()] == [True, False]
    assert f"Failed: 01-lr=1e+30: {bad['error']}" in (done.folder / "summary.md").read_text()


def test_a_run_that_cannot_start_is_a_row_without_a_folder_until_it_can(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)).astype("f4"), np.arange(60) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    sets = [{"name": "npz", "path": f"{name}.npz"} for name in "ab"]
    done = fedsim.sweep(CONFIG, {"data.dataset": sets, "data.split": "iid", "seed": [1, 2]})
    assert statuses(done) == ["finished", "finished", "failed", "failed"]
    assert len(done.runs) == 2 and "b.npz" in done.rows()[2]["error"]
    assert [line["n"] for line in done.table()] == ["2", "0 of 2"]
    np.savez(tmp_path / "b.npz", x=-x, y=y)
    before = (done.runs[0].folder / "summary.json").stat().st_mtime_ns
    again = fedsim.resume_sweep(done.folder)
    assert statuses(again) == ["finished"] * 4 and len(again.runs) == 4
    assert (done.runs[0].folder / "summary.json").stat().st_mtime_ns == before


def test_whatever_a_run_raises_does_not_stop_the_others():
    def lose(record):
        if record.round == 2 and not lost:
            lost.append(record)
            raise KeyError("lost")

    lost = []
    done = fedsim.sweep(CONFIG, {"seed": [1, 2]}, on_round=lose)
    assert [(row["status"], row["error"]) for row in done.rows()] == [
        ("failed", "KeyError: 'lost'"),
        ("finished", None),
    ]
    fedsim.resume(done.runs[0].folder)  # a run of a sweep is one like others
    assert statuses(done) == ["finished", "finished"] and done.rows()[0]["error"] is None
    assert same(done.runs[0].folder, fedsim.run(CONFIG, {"seed": 1}).folder)


# ---------------------------------------------------------------- stops


class Stop:
    """Raises KeyboardInterrupt after so many rounds."""

    def __init__(self, after):
        self.left = after

    def __call__(self, _):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("broken", ["interrupted", "killed", "killed early"])
def test_a_sweep_that_was_stopped_goes_on_and_comes_to_the_same(grid, broken):
    begun = []
    with pytest.raises(KeyboardInterrupt):
        fedsim.sweep(CONFIG, GRID, on_round=Stop(5), on_start=lambda folder, rows: begun.append(folder))
    (folder,) = begun
    first, second, third = (folder / name for name in NAMES[:3])
    assert statuses(fedsim.load_sweep(folder)) == ["finished", "interrupted", *["not started"] * 4]
    assert f"Interrupted: {NAMES[1]}\n" in (folder / "summary.md").read_text()
    assert f"Not started: {', '.join(NAMES[2:5])} and 1 more\n" in (folder / "summary.md").read_text()
    if broken != "interrupted":
        content = {**json.loads((second / "summary.json").read_text()), "status": "running"}
        (second / "summary.json").write_text(json.dumps(content))
        (folder / ".new" / "small-2026-01-01-1").mkdir(parents=True)
    if broken == "killed early":
        (second / "checkpoint" / "state.json").unlink()
    before = (first / "summary.json").stat().st_mtime_ns
    seen, names, ended = [], [], []
    done = fedsim.resume_sweep(
        folder,
        on_start=lambda _, rows: seen.append([row["status"] for row in rows]),
        on_begin=lambda *told: names.append(told),
        on_end=lambda row: ended.append(row["run"]),
    )
    assert ended == NAMES[1:]
    assert seen[0][0] == "finished" and not third.with_name(".new").exists()
    assert names == [(NAMES[1], 0 if broken == "killed early" else 2, 3), *((name, 0, 3) for name in NAMES[2:])]
    assert (first / "summary.json").stat().st_mtime_ns == before
    assert all(same(run.folder, other.folder) for run, other in zip(done.runs, grid.runs, strict=True))
    assert statuses(done) == ["finished"] * 6 and done.table()[0]["accuracy"] == grid.table()[0]["accuracy"]


@pytest.mark.slow
def test_stopping_runs_side_by_side_saves_them(tmp_path):
    def stop(row):
        (other,) = (tmp_path / "runs").glob("*/02-*")
        until = time.monotonic() + 30
        while not (other / "rounds.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.sweep(CONFIG, {"train.rounds": [1, 100_000]}, jobs=2, on_end=stop)
    (folder,) = (tmp_path / "runs").iterdir()
    assert statuses(fedsim.load_sweep(folder)) == ["finished", "interrupted"]
    with filelock.FileLock(folder / "02-rounds=100000" / "checkpoint" / ".lock", timeout=0):
        pass  # nobody writes it any more
    assert fedsim.resume(folder / "02-rounds=100000", rounds=len(lines(folder / "02-rounds=100000")) + 1)


KILLED = """
import fedsim, json, sys
fedsim.sweep(json.loads(sys.argv[1]), {"train.rounds": [90_000, 100_000]}, jobs=2)
"""


@pytest.mark.slow
def test_runs_side_by_side_end_and_are_saved_when_their_sweep_is_killed(tmp_path):
    running = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(CONFIG)])
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/*/0*/rounds.jsonl"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    (folder,) = (tmp_path / "runs").iterdir()
    for name in ("01-rounds=90000", "02-rounds=100000"):
        with filelock.FileLock(folder / name / "checkpoint" / ".lock", timeout=30):
            pass
    assert statuses(fedsim.load_sweep(folder)) == ["interrupted", "interrupted"]


def test_two_processes_cannot_go_on_with_one_sweep(grid):
    with filelock.FileLock(grid.folder / ".lock"), pytest.raises(RunError, match="another process"):
        fedsim.resume_sweep(grid.folder)


# ---------------------------------------------------------------- folders that are none


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not the folder of a sweep"),
        ("format: 2", "format 2 is newer"),
        ("format: 1", "damaged"),
        ("[", "damaged"),
        ("3", "damaged"),
    ],
)
def test_what_is_no_sweep_cannot_be_opened(tmp_path, content, message):
    if content is not None:
        (tmp_path / "sweep.yaml").write_text(content)
    for opened in (fedsim.load_sweep, fedsim.resume_sweep):
        with pytest.raises(DataError, match=message):
            opened(tmp_path)


def test_a_damaged_run_is_a_failed_row(tmp_path):
    done = fedsim.sweep(CONFIG, {"seed": [1, 2], "train.rounds": 1})
    (done.runs[0].folder / "rounds.jsonl").write_text("{}\n")
    assert statuses(done) == ["failed", "finished"] and "rounds.jsonl" in done.rows()[0]["error"]
    assert [line["n"] for line in done.table()] == ["1 of 2"]
