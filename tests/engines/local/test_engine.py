"""What a user of the default engine sees: its choices written down, and kept by a resume."""

import json
from dataclasses import replace

import pytest
import torch

import fedsim
from fedsim import params as p
from fedsim import runs
from fedsim.data.locations import cache_folder
from fedsim.engines.local import engine as module
from fedsim.engines.local import local, trainer
from fedsim.engines.local.engine import automatic, cores
from fedsim.engines.local.measuring import Choice
from fedsim.engines.local.plan import Plan, chunks
from fedsim.records import Broadcast
from fedsim.training.stacked import train_stacked


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A working folder and a cache of this test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def config(**train):
    return {
        "name": "small",
        "data": {"dataset": "digits", "clients": 24, "split": {"name": "dirichlet", "alpha": 0.5}},
        "model": {"name": "mlp", "hidden": [8], "dropout": 0.3},
        "train": {"rounds": 3, "clients_per_round": 20, "optimizer": {"name": "sgd", "momentum": 0.9}, **train},
    }


def engine_of(folder):
    return runs.open_run(folder).environment()["engine"]


def remember(path, chunk):
    """Have the cache say that this plan is the fastest, whatever was measured."""
    (file,) = cache_folder("plans").iterdir()
    file.write_text(json.dumps({"path": path, "chunk": chunk, "speeds": {}}))


def assert_same(folder, expected):
    for name in ("model.safetensors", "clients.jsonl", "checkpoint/state.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    one, other = ([replace(r, seconds=0) for r in fedsim.load(run).rounds] for run in (folder, expected))
    assert one == other


def test_the_default_engine_says_what_it_chose_and_by_which_speeds():
    engine = engine_of(fedsim.run(config()).folder)
    assert [engine[key] for key in ("name", "mode", "workers", "chosen")] == ["local", "auto", "auto", "measured"]
    assert engine["path"] in ("sequential", "vectorised", "fused") and engine["chunk"] in (1, *chunks(20))
    assert engine["processes"] >= 1
    assert {"sequential, 1 client", "fused, 1 client", "vectorised, 4 clients"} <= engine["speeds"].keys()


@pytest.mark.parametrize(("began", "now"), [(("fused", 4), ("sequential", 1)), (("vectorised", 5), ("fused", 1))])
def test_a_resume_keeps_to_the_plan_it_began_with_whatever_is_the_fastest_now(began, now):
    fedsim.run(config(rounds=1))
    remember(*began)
    whole, short = fedsim.run(config()).folder, fedsim.run(config(rounds=1)).folder
    assert (engine_of(short)["path"], engine_of(short)["chunk"]) == began
    remember(*now)
    assert engine_of(fedsim.run(config(rounds=1)).folder)["path"] == now[0]  # a new run takes what is remembered
    fedsim.resume(short, rounds=3)
    (resumed,) = runs.open_run(short).environment()["resumed"]
    assert (resumed["engine"]["path"], resumed["engine"]["chunk"]) == began
    assert resumed["engine"]["chosen"] == "as when the run began"
    assert_same(short, whole)


@pytest.mark.parametrize("call", [0, 2])
def test_a_run_interrupted_inside_a_round_goes_on_as_if_nothing_had_been(monkeypatch, call):
    """Ctrl-C at the first or third group of a round's clients, in round 1 and perhaps 2."""
    fedsim.run(config(rounds=1))
    remember("fused", 4)
    whole, calls, folders = fedsim.run(config()).folder, [], []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call + 6:  # twenty clients are five groups of four
            raise KeyboardInterrupt
        return train_stacked(*args)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "train_stacked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fedsim.run(config(), on_start=lambda run, federation: folders.append(run.folder))
    assert fedsim.load(folders[0]).summary["rounds_done"] == 1
    assert_same(fedsim.resume(folders[0]).folder, whole)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize(
    ("speed", "rounds", "several"),
    [(10.0, 20, True), (1000.0, 20, False), (1000.0, 2000, True), (None, 10**6, False)],
)
def test_long_runs_get_a_process_for_each_core_and_short_ones_none(job_of, monkeypatch, speed, rounds, several):
    """8 clients of 10 examples, 2 epochs, half of them a round: 80 examples a round."""
    monkeypatch.setattr(module, "cores", lambda: 3)
    job = replace(job_of(sizes=(10,) * 8, cohort=4), rounds=rounds)
    speeds = {} if speed is None else {"fused, 1 client": speed}
    assert automatic(job, Choice(Plan("fused", 1), "measured", speeds)) == (3 if several else 1)


def test_there_are_no_more_processes_than_tasks(job_of, monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 100)
    job = replace(job_of(sizes=(10,) * 20), rounds=10**6)
    speeds = dict.fromkeys(("fused, 1 client", "fused, 4 clients"), 1.0)
    assert automatic(job, Choice(Plan("fused", 1), "measured", speeds)) == 10  # blocks of two clients
    assert automatic(job, Choice(Plan("fused", 4), "measured", speeds)) == 5


def test_cores_are_those_that_this_process_may_use():
    assert 1 <= cores() <= 4096


@pytest.mark.parametrize("workers", [1, 7])
def test_as_many_processes_as_asked_for(job_of, workers):
    made = local(workers=workers, device="cpu").prepared(job_of(), {"path": "fused", "chunk": 1})
    assert made.describe()["processes"] == workers and made.choices.plan.plan == Plan("fused", 1)


def test_more_workers_than_one_need_a_system_that_can_start_them(monkeypatch):
    monkeypatch.setattr("os.name", "nt")
    with pytest.raises(ValueError, match=r"^workers must be 1 on this system, got 2$"):
        local(workers=2, device="cpu")
    assert local(workers=1, device="cpu").workers == 1


def test_a_cohort_of_one_client_trains_on_every_path(job_of):
    """The smallest cohort there is; all its paths agree up to rounding."""
    job, found = job_of(sizes=(5,)), []

    def loop(cohorts):
        found.append(cohorts.run_cohort(Broadcast(*p.of(job.work.model), {}, 1), [0], {}, 3).update)

    for path in ("sequential", "vectorised", "fused"):
        made = local(mode=path, workers=1, device="cpu").prepared(job, {})
        assert (made.choices.plan.plan.path, made.choices.plan.plan.chunk) == (path, 1)
        made.drive(job, loop)
    for name, tensor in found[0].items():
        assert all(torch.allclose(other[name], tensor, atol=1e-6) for other in found[1:])
