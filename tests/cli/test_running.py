import gzip
import json
import signal
import struct
import time

import numpy as np
import pytest

LONG = ("run", "config.yaml", "train.rounds=40", "data.clients=20", "train.clients_per_round=10")
FOREIGN_NET = """
import numpy as np
from torch import nn
class Net(nn.Module):
    calls = 0
    def __init__(self, input_shape, num_classes, width=8, fails_at=None):
        super().__init__()
        self.a, self.b = nn.Linear(int(np.prod(input_shape)), width), nn.Linear(width, num_classes)
        self.fails_at = fails_at
    def forward(self, x):
        Net.calls += 1
        if self.fails_at is not None and Net.calls > self.fails_at:
            raise RuntimeError("worn out")
        return self.b(self.a(x.flatten(1)))
"""


def only_run(folder):
    (found,) = (folder / "runs").iterdir()
    return found


def rounds_of(run):
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{**line, "seconds": None} for line in lines]


def test_a_run_prints_plain_lines_and_ends_with_its_folder(fedsim, folder):
    result = fedsim("run", "config.yaml")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0] == "small: digits, dirichlet split, mlp, fedavg, local engine"
    assert [line.split("  ")[0] for line in lines[1:3]] == ["round 1/2", "round 2/2"]
    run = only_run(folder)
    assert lines[-2].split() == ["run", f"runs/{run.name}"]
    assert lines[-1].split() == ["report", f"runs/{run.name}/report.html"]
    assert (run / "report.html").exists()
    assert "\x1b" not in result.out


DRAWING_NET = """
import numpy as np
from torch import nn
from torch.nn import functional
class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.1), nn.Linear(int(np.prod(input_shape)), num_classes)
    def forward(self, x):
        return functional.dropout(self.fc(self.drop(x.flatten(1))), 0.1, self.training)
"""


def test_what_a_model_draws_is_told_once_at_the_start_of_a_run_a_resume_and_a_baseline(fedsim, folder):
    (folder / "drawing_net.py").write_text(DRAWING_NET)
    told = [
        "model: replaced dropout layer drop by a keyed one",
        "model: draws from torch's global generator (in its forward code); its draws are seeded per client and round, "
        "so the run repeats with the same torch version, but each client is trained by itself",
    ]
    first = fedsim("run", "config.yaml", "model=drawing_net:Net", "train.rounds=1")
    longer = fedsim("resume", only_run(folder), "--rounds", "2")
    baseline = fedsim("baseline", "config.yaml", "model=drawing_net:Net", "train.rounds=1")
    for result in (first, longer, baseline):
        assert (result.code, result.err) == (0, "")
        lines = result.out.splitlines()
        assert lines[1:3] == told and lines[3].startswith(("round 1/1", "round 2/2"))
        assert result.out.count("model: ") == 2


def test_overrides_reach_the_run(fedsim, folder):
    fedsim("run", "config.yaml", "data.split={name: shards, shards_per_client: 3}", "train.rounds=1", "output=deep/er")
    (run,) = (folder / "deep" / "er").iterdir()
    assert "shards_per_client: 3" in (run / "config.yaml").read_text()
    assert len(rounds_of(run)) == 1


# ---------------------------------------------------------------- bad data, and nothing left behind


def idx(n, magic=2051):
    return struct.pack(">IIII", magic, n, 28, 28) + bytes(n * 784)


def labels(n):
    return struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n))


@pytest.fixture
def mnist(folder):
    """Write small MNIST files to a folder of this name."""

    def write(name, images, train_labels, cut=None):
        (folder / name).mkdir()
        files = {"train-images-idx3": images, "train-labels-idx1": train_labels}
        files |= {"t10k-images-idx3": idx(10), "t10k-labels-idx1": labels(10)}
        for file, content in files.items():
            packed = gzip.compress(content)
            path = folder / name / f"{file}-ubyte.gz"
            path.write_bytes(packed[: len(packed) // 2] if file == cut else packed)
        return (f"data.root={name}", "data.dataset=mnist")

    return write


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((idx(50), labels(50), "train-images-idx3"), "in/train-images-idx3-ubyte.gz: cannot be read: Compressed file"),
        ((idx(50, magic=7), labels(50)), "in/train-images-idx3-ubyte.gz: an IDX file of 3 axes begins with"),
        ((idx(50), labels(49)), "50 images in in/train-images-idx3-ubyte.gz, but 49 labels in"),
        ((b"", labels(49)), "in/train-images-idx3-ubyte.gz: "),
    ],
)
def test_damaged_data_files_are_named_and_nothing_is_written(fedsim, mnist, files, message):
    result = fedsim("run", "config.yaml", *mnist("in", *files))
    assert (result.code, result.out, result.new) == (3, "", frozenset())
    assert result.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.full((20, 4), np.nan, "f4"), "y": np.arange(20) % 2}, "own.npz: array x must be finite, got nan"),
        ({"x": np.ones((20, 4), "f4"), "y": np.arange(19) % 2}, "own.npz: train: 20 inputs but 19 labels"),
        ({"x": np.ones((20, 4), "f4")}, "own.npz: needs arrays x, y or x_train"),
        ({"x": np.ones((5, 4), "f4"), "y": np.arange(5)}, "data.clients: 6 clients but only 4 training examples"),
    ],
)
def test_bad_arrays_are_named_and_nothing_is_written(fedsim, folder, arrays, message):
    np.savez(folder / "own.npz", **arrays)
    result = fedsim("run", "config.yaml", "data.dataset={name: npz, path: own.npz}")
    assert (result.code, result.out, result.new) == (3, "", frozenset())
    assert result.err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("data.root=/nowhere", 3, "data.root: folder /nowhere does not exist"),
        ("data.clients=2000", 3, "data.clients: 2000 clients but only 1438 training examples"),
        ("data.dataset={name: npz, path: no.npz}", 3, "no.npz: cannot be read"),
        ("data.split={name: file, path: no.npz}", 3, "data.split.path: file no.npz does not exist"),
        ("train.batch_size=0", 2, "train.batch_size: must be a whole number >= 1, or all, got 0"),
        ("train.clients_per_round=7", 2, "train.clients_per_round: must be <= data.clients (6), got 7"),
        ("output=config.yaml/runs", 2, "output: cannot make a run folder in config.yaml/runs: Not a directory"),
        ("output=config.yaml", 2, "output: cannot make a run folder in config.yaml: File exists"),
        ("output=/proc/x", 2, "output: cannot make a run folder in /proc/x: "),
        ("engine.workers=0", 2, "engine.workers: must be >= 1 or 'auto', got 0"),
        ("engine.mode=fast", 2, "engine.mode: must be 'auto', 'sequential', 'vectorised' or 'fused', got 'fast'"),
        ("model=no_such:Net", 2, "model.name: cannot import 'no_such': ModuleNotFoundError"),
    ],
)
@pytest.mark.parametrize("command", ["run", "baseline"])
def test_what_is_wrong_is_found_before_anything_is_written(fedsim, command, change, code, message):
    result = fedsim(command, "config.yaml", change)
    assert (result.code, result.out, result.new) == (code, "", frozenset())
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("mode", ["sequential", "vectorised", "fused"])
def test_the_mode_of_the_engine_can_be_given_on_the_command_line(fedsim, folder, mode):
    result = fedsim("run", "config.yaml", f"engine.mode={mode}", "engine.workers=1")
    assert (result.code, result.err) == (0, "")
    engine = json.loads((only_run(folder) / "environment.json").read_text())["engine"]
    assert (engine["mode"], engine["path"], engine["processes"]) == (mode, mode, 1)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fused", "engine: fused needs a chain of standard layers"),
        ("vectorised", "engine: the model cannot be vectorised over clients: "),
    ],
)
def test_a_mode_that_cannot_take_the_model_is_a_mistake_in_the_config(fedsim, folder, mode, message):
    model = "resnet-8" if mode == "fused" else "branching_net:Net"
    branching = FOREIGN_NET.replace("if self.fails_at", "if x.sum() > 0 and self.fails_at")
    (folder / "branching_net.py").write_text(branching)
    result = fedsim("run", "config.yaml", f"model={model}", f"engine.mode={mode}")
    assert (result.code, result.out, result.new) == (2, "", frozenset())
    assert result.err.startswith(f"error: {message}") and result.err.count("\n") == 1


# ---------------------------------------------------------------- failing, stopping, going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_equals_an_unbroken_one(fedsim, folder, process, number):
    running = process(*LONG)
    seen = [next(line for line in running.stdout if line.startswith("round 3/"))]
    running.send_signal(number)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    broken = only_run(folder)
    assert len(seen + out.splitlines()) < 40
    assert err.splitlines() == [
        "interrupted",
        f"the last whole round is saved; go on with: fedsim resume runs/{broken.name}",
    ]
    assert json.loads((broken / "summary.json").read_text())["status"] == "interrupted"
    assert not list(folder.rglob("*.part"))

    assert fedsim("resume", f"runs/{broken.name}").code == 0
    fedsim(*LONG, "output=whole")
    (whole,) = (folder / "whole").iterdir()
    assert rounds_of(broken) == rounds_of(whole)
    assert len(rounds_of(whole)) == 40
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((broken / "summary.json").read_text())["status"] == "finished"


def test_whoever_reads_the_output_may_stop_the_run(folder, process):
    running = process(*LONG)
    assert running.stdout.readline().startswith("small: ")
    running.stdout.close()
    err = running.stderr.read()
    assert running.wait(timeout=30) == 130
    assert err.startswith("interrupted\nthe last whole round is saved; go on with: fedsim resume runs/")
    assert "Traceback" not in err


def test_a_run_that_fails_says_how_to_go_on(fedsim, folder):
    (folder / "worn.py").write_text(FOREIGN_NET)
    change = ("model={name: 'worn:Net', fails_at: 60}", "train.rounds=30", "engine=reference")
    result = fedsim("run", "config.yaml", *change)
    assert result.code == 4
    run = only_run(folder)
    first, second = result.err.splitlines()
    assert first.startswith("error: round ")
    assert first.endswith("RuntimeError: worn out")
    assert second == f"the last whole round is saved; go on with: fedsim resume runs/{run.name}"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("failed", first.removeprefix("error: "))


@pytest.mark.parametrize("place", ["beside", "here"])
def test_a_module_is_found_beside_the_config_and_in_the_working_folder_and_again_on_resume(fedsim, folder, place):
    (folder / "deep").mkdir()
    (folder / "deep" / "top.yaml").write_text(
        f"extends: ../config.yaml\nmodel: {{name: 'net_{place}:Net', width: 4}}\n"
    )
    (folder / ("deep" if place == "beside" else ".") / f"net_{place}.py").write_text(FOREIGN_NET)
    assert fedsim("run", "deep/top.yaml", "train.rounds=1").code == 0
    result = fedsim("resume", f"runs/{only_run(folder).name}", "--rounds", "2")
    assert (result.code, result.err) == (0, "")
    assert [line["round"] for line in rounds_of(only_run(folder))] == [1, 2]


@pytest.fixture
def run(fedsim, folder):
    """A finished run."""
    assert fedsim("run", "config.yaml").code == 0
    return only_run(folder)


def _truncate(run):
    (path,) = (run / "checkpoint").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])


def _from_the_future(run):
    path = run / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "{}/checkpoint/state-000002.safetensors: truncated checkpoint, 100 bytes where"),
        (_from_the_future, "{}/summary.json: run folder format 99 is newer than this fedsim reads (1)"),
        (lambda run: (run / "config.yaml").unlink(), "{}: not a run folder (it has no config.yaml)"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "{}/config.yaml: not whole YAML"),
        (lambda run: (run / "config.yaml").write_text("- 3"), "{}/config.yaml: expected a mapping, found list"),
        (lambda run: (run / "checkpoint" / "state.json").unlink(), "{}/checkpoint/state.json: missing"),
        (lambda run: (run / "checkpoint" / "state.json").write_text("{"), "{}/checkpoint/state.json: not whole JSON"),
    ],
)
def test_a_damaged_run_cannot_be_resumed_and_the_file_is_named(fedsim, run, damage, message):
    damage(run)
    result = fedsim("resume", str(run))
    assert (result.code, result.out, result.new) == (3, "", frozenset())
    assert result.err.startswith("error: " + message.format(run))


@pytest.mark.parametrize("path", ["nowhere", "empty", "config.yaml"])
@pytest.mark.parametrize("command", ["resume", "report", "compare"])
def test_a_folder_that_is_no_run_is_refused(fedsim, folder, command, path):
    (folder / "empty").mkdir()
    result = fedsim(command, path)
    assert (result.code, result.out, result.new) == (3, "", frozenset())
    assert "run folder" in result.err


@pytest.mark.parametrize("rounds", ["1", "0"])
def test_a_run_cannot_be_made_shorter(fedsim, run, rounds):
    result = fedsim("resume", str(run), "--rounds", rounds)
    assert (result.code, result.new) == (2, frozenset())
    assert "rounds: " in result.err


def test_a_finished_run_shows_its_result_again(fedsim, run):
    before = (run / "model.safetensors").read_bytes()
    time.sleep(0.01)
    result = fedsim("resume", str(run))
    assert result.code == 0
    assert "2 of 2" in result.out
    assert (run / "model.safetensors").read_bytes() == before


def test_the_baselines_are_two_runs_named_after_the_config(fedsim, folder):
    result = fedsim("baseline", "config.yaml", "train.rounds=1")
    assert (result.code, result.err) == (0, "")
    names = sorted(path.name for path in (folder / "runs").iterdir())
    assert [name.rsplit("-", 4)[0] for name in names] == ["small-alone", "small-centralised"]
    assert all(name in result.out for name in names)
    assert "clients alone 6/6" in result.out
