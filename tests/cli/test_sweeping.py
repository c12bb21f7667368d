import io
import json
import re
import signal
import time

import pytest
from rich.console import Console

from fedsim.cli import display


def only_sweep(folder):
    (found,) = (folder / "runs").iterdir()
    return found


def rounds_of(run):
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [{**line, "seconds": None} for line in lines]


def test_a_line_for_each_run_then_the_table_and_where_it_is(fedsim, folder):
    result = fedsim("sweep", "config.yaml", "train.local_epochs=[1, 2]", "seed=[1, 2]", "train.rounds=1")
    assert (result.code, result.err) == (0, "")
    sweep = only_sweep(folder)
    first, *runs, blank, heads, one, two, _, mean, where, summary = result.out.splitlines()
    assert first == f"4 runs in runs/{sweep.name}"
    assert [re.split(r"\s{2,}", line)[:3] for line in runs] == [
        ["1/4", "01-local_epochs=1-seed=1", "finished"],
        ["2/4", "02-local_epochs=1-seed=2", "finished"],
        ["3/4", "03-local_epochs=2-seed=1", "finished"],
        ["4/4", "04-local_epochs=2-seed=2", "finished"],
    ]
    assert all(re.search(r"accuracy \d+\.\d\d %  loss \d\.\d+  \d\.\d\d s$", line) for line in runs)
    assert blank == ""
    titles = ["local_epochs", "n", "accuracy", "best accuracy", "loss", "traffic", "time"]
    assert re.split(r"\s{2,}", heads.strip()) == titles
    assert [re.split(r"\s{2,}", line)[:2] for line in (one, two)] == [["1", "2"], ["2", "2"]]
    assert all(line.count(" ± ") == 5 for line in (one, two))
    assert mean.startswith("Mean ± sample standard deviation")
    assert where.split() == ["sweep", f"runs/{sweep.name}"]
    assert summary.split() == ["summary", f"runs/{sweep.name}/summary.md"]
    assert fedsim("report", sweep / "01-local_epochs=1-seed=1").code == 0
    assert fedsim("compare", *sorted(sweep.glob("0*"))).code == 0


def test_every_problem_is_told_before_anything_runs(fedsim):
    result = fedsim("sweep", "config.yaml", "train.local_epochs=[0, 1]", "seed=[1, -1]", "train.rounds=0")
    assert (result.code, result.out, result.new) == (2, "", frozenset())
    first, *problems = result.err.splitlines()
    assert first == "error: 3 problems:"
    assert sorted(problems) == [
        "  01-local_epochs=0-seed=1 (and 1 more): train.local_epochs: must be >= 1, got 0",
        "  02-local_epochs=0-seed=-1 (and 1 more): seed: must be >= 0, got -1",
        "  train.rounds: must be >= 1, got 0",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["config.yaml"], 2, "error: nothing to sweep: give a key a list of values"),
        ([], 2, "error: CONFIG: give either a config or --resume FOLDER"),
        (["config.yaml", "--resume", "runs"], 2, "error: CONFIG: give either a config or --resume FOLDER"),
        (["seed=[1]", "--resume", "runs"], 2, "error: CONFIG: give either a config or --resume FOLDER"),
        (["--resume", "."], 3, "error: .: not the folder of a sweep (it has no sweep.yaml)"),
        (["config.yaml", "seed=[1]", "--jobs", "0"], 2, "error: jobs: must be >= 1, got 0"),
        (["nowhere.yaml", "seed=[1]"], 2, "error: nowhere.yaml: no such file"),
        (["config.yaml", "seed=[1"], 2, "error: override seed, line 1: "),
    ],
)
def test_wrong_usage_is_one_clear_line(fedsim, arguments, code, message):
    result = fedsim("sweep", *arguments)
    assert (result.code, result.out, result.new) == (code, "", frozenset())
    assert result.err.startswith(message) and result.err.count("\n") == 1


def test_a_run_that_fails_is_told_and_makes_exit_code_4(fedsim, folder):
    result = fedsim("sweep", "config.yaml", "train.optimizer.lr=[1e30, 0.1]", "train.rounds=1")
    assert (result.code, result.err) == (4, "error: 1 of 2 runs failed, see above\n")
    assert "1/2  01-lr=1e+30  failed: round 1, client " in result.out
    assert "2/2  02-lr=0.1  finished  accuracy " in result.out
    rows = [re.split(r"\s{2,}", line.strip()) for line in result.out.splitlines()[4:7]]
    assert [row[:3] for row in rows] == [["lr", "status", "accuracy"], ["1e+30", "failed", "–"], rows[2][:3]]
    again = fedsim("sweep", "--resume", only_sweep(folder))
    assert again.code == 4
    assert again.out.startswith(f"2 runs in {only_sweep(folder)}, 1 of them finished before\n2/2  01-lr=1e+30  failed")


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_saves_and_says_how_to_go_on_and_that_comes_to_the_same(fedsim, process, folder, jobs):
    grid = ("config.yaml", "train.rounds=[1, 80]", "seed=[1, 2]", "engine.mode=sequential", "train.local_epochs=4")
    running = process("sweep", *grid, "--jobs", str(jobs))
    until = time.monotonic() + 60
    while not list(folder.glob("runs/*/03-*/rounds.jsonl")) and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    sweep = only_sweep(folder)
    more = " --jobs 2" if jobs > 1 else ""
    hint = f"fedsim sweep --resume runs/{sweep.name}{more}"
    assert running.returncode == 130
    assert err == f"interrupted\nfinished runs and whole rounds are saved; go on with: {hint}\n"
    assert "2/4  " in out and "3/4" not in out
    again = fedsim(*hint.split()[1:])
    assert again.code == 0
    assert "2 of them finished before" in again.out.splitlines()[0]
    fedsim("sweep", *grid, "output=whole")
    (whole,) = (folder / "whole").iterdir()
    for run in sorted(whole.glob("0*")):
        assert rounds_of(run) == rounds_of(sweep / run.name) != []


class Terminal(Console):
    def __init__(self, width):
        super().__init__(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


@pytest.mark.parametrize(("width", "last"), [(150, "time"), (60, "best accuracy")])
def test_a_terminal_gets_bars_and_the_columns_that_fit(fedsim, monkeypatch, width, last):
    terminal = Terminal(width)
    monkeypatch.setattr(display, "console", lambda: terminal)
    assert fedsim("sweep", "config.yaml", "train.local_epochs=[1, 2]", "seed=[1, 2]", "train.rounds=2").code == 0
    shown = terminal.file.getvalue()
    assert re.search(r"runs .*4/4", shown)
    assert re.search(r"rounds of 04-local_epochs=2-seed=2 .*/2", shown)
    assert "4/4  04-local_epochs=2-seed=2  finished  accuracy " in shown
    (heads,) = [line for line in shown.splitlines() if line.startswith("local_epochs  n")]
    assert heads.rstrip().endswith(last)
    assert all(len(line) <= width for line in shown.splitlines() if " ± " in line and not line.startswith("Mean"))
