import json

import pytest

from fedsim.api import benching
from fedsim.data.locations import cache_folder


@pytest.fixture(autouse=True)
def _quick(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(benching, "SPENT_S", 0.01)
    monkeypatch.setattr(benching.measuring, "SPENT_S", 0.005)


@pytest.fixture
def run(fedsim, folder):
    fedsim("run", "config.yaml")
    (made,) = (folder / "runs").iterdir()
    return made


def test_a_run_verifies(fedsim, run):
    result = fedsim("verify", run)
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    first, *rounds, last = result.out.splitlines()
    assert first == "again, with engine local"
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    assert last == "equal, bit for bit: 2 of 2 rounds and the final tensors"


def test_a_run_that_differs_says_where_with_exit_code_1(fedsim, run):
    path = run / "rounds.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    path.write_text(f"{json.dumps(first)}\n{json.dumps({**second, 'train_loss': 0.51})}\n")
    result = fedsim("verify", run, "--rounds", "all", "engine.name=reference")
    assert (result.code, result.err, result.new) == (1, "", frozenset())
    where, why, *_ = result.out.splitlines()[2:]
    assert where.startswith("round 2, train_loss: recorded 0.51, now ")
    assert why == "perhaps because: engine: recorded local, now reference"
    assert fedsim("verify", run, "--rounds", "1").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--rounds", "many"], 2, "error: --rounds: must be a whole number >= 1, or all, got many\n"),
        (["--rounds", "0"], 2, "error: rounds: must be a whole number >= 1, or all, got 0\n"),
        (["seed=4"], 2, "error: seed: must be of engine, data.root, data.dataset; with another value it would be"),
        (["engine.name=remote"], 2, "error: engine.name: "),
        (["data.dataset=synthetic"], 3, "error: data: must be what the run started with"),
    ],
)
def test_what_cannot_be_verified_is_one_clear_line(fedsim, run, arguments, code, message):
    result = fedsim("verify", run, *arguments)
    assert (result.code, result.new) == (code, frozenset())
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1


def test_bench_shows_a_table_and_writes_nothing(fedsim):
    result = fedsim("bench", "config.yaml", "train.rounds=3")
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    rows = [line.split("  ", 2)[1].strip() for line in result.out.splitlines()]
    assert rows[0] == "machine"
    assert "sequential, 1 client" in rows
    assert rows[-4:] == ["chosen", "of peak", "workers", "whole run"]


def test_bench_tells_of_another_engine_and_of_a_memory_that_disagrees(fedsim, folder):
    fedsim("run", "config.yaml")
    (file,) = cache_folder("plans").iterdir()
    file.write_text(json.dumps({"path": "vectorised", "chunk": 1, "speeds": {}}))
    shown = fedsim("bench", "config.yaml").out
    assert "vectorised, 1 client, which runs take; to have it measured anew, remove " in shown
    assert "is not measured" not in shown
    shown = fedsim("bench", "config.yaml", "engine=reference").out
    assert "reference is not measured; all that follows is of local" in shown


def test_bench_prints_json_for_scripts(fedsim):
    result = fedsim("bench", "config.yaml", "--json")
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    found = json.loads(result.out)
    assert found["name"] == "small"
    assert found["estimate"]["speed"] == found["paths"]["speeds"][found["paths"]["chosen"]]
    assert found["estimate"]["total_s"] > 0
