"""What a bench says follows from what it measured, and what it refuses has a reason."""

import math
import time

import numpy as np
import pytest
import torch

import fedsim
from fedsim.api import benching
from fedsim.config import build, load
from fedsim.config.foreign import importable
from fedsim.data.locations import cache_folder
from fedsim.errors import ConfigError
from fedsim.federation import job, start
from fedsim.federation import run as run_rounds

MODELS = """
from torch import nn


class Deciding(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(x.flatten(1)) if x.sum() < 1e9 else x


class Rows(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, num_classes)

    def forward(self, x):
        return self.head(self.lstm(x.flatten(1).view(-1, 8, 8))[0][:, -1])


def rows(input_shape, num_classes):
    return Rows(num_classes)


def deciding(input_shape, num_classes):
    return Deciding(num_classes)
"""


def config(**changes):
    return {
        "data": {"dataset": "digits", "clients": 6},
        "model": {"name": "mlp", "hidden": [12]},
        "train": {"rounds": 7, "clients_per_round": 5, "batch_size": 32, "local_epochs": 3, "eval_every": 3},
        **changes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with models of its own in it."""
    folder = tmp_path_factory.mktemp("benched")
    (folder / "test_bench_models.py").write_text(MODELS)
    return folder


@pytest.fixture(autouse=True)
def _in_place(place, tmp_path, monkeypatch):
    """Quick measurements that remember nothing between tests."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(benching, "SPENT_S", 0.01)
    monkeypatch.setattr(benching.measuring, "SPENT_S", 0.005)


def federation(raw):
    return build.federation(load.load(raw))


def test_numbers_are_positive_and_the_estimate_is_examples_over_speed(tmp_path):
    found = fedsim.bench(config())
    own = found.estimate
    assert set(found.paths.speeds) | set(found.paths.left_out) == {
        "sequential, 1 client", "fused, 1 client", "fused, 2 clients", "vectorised, 2 clients"
    }  # fmt: skip
    assert all(speed > 0 for speed in found.paths.speeds.values())
    assert found.paths.refused == {}
    assert own.speed == found.paths.speeds[found.paths.chosen]
    assert 1.1 * own.speed >= max(found.paths.speeds.values())
    assert own.trained == pytest.approx(7 * 3 * 5 * 1438 / 6)
    assert own.training_s == pytest.approx(own.trained / own.speed)
    assert own.evaluation_s == pytest.approx(own.tested / own.test_speed)
    assert own.total_s == pytest.approx(own.training_s + own.evaluation_s)
    assert (found.workers, own.at_once, own.start_s) == (1, 1.0, 0.0)
    assert found.arithmetic.share == pytest.approx(own.speed * found.arithmetic.per_example / found.arithmetic.peak)
    assert 0 < found.arithmetic.share < 1
    assert not list(tmp_path.rglob("*"))  # nothing is written, not even what was measured


def test_as_many_examples_are_counted_as_a_run_trains_on_and_scores(monkeypatch):
    """By counting them in a run; the clients' own held-out examples are others than the test set here."""
    split = {"name": "feature-noise", "std": 0.3}
    raw = config(data={"dataset": "digits", "clients": 6, "split": split}, engine="reference")
    made, engine = federation({**raw, "train": {**raw["train"], "clients_per_round": "all"}})
    counted = {"trained": 0, "tested": 0}

    def counting(cohorts):
        class Counting:
            def run_cohort(self, broadcast, clients, states, key):
                done = cohorts.run_cohort(broadcast, clients, states, key)
                counted["trained"] += sum(done.num_examples) * made.work.local_epochs
                return done

            def evaluate(self, broadcast, examples):
                counted["tested"] += len(examples)
                return cohorts.evaluate(broadcast, examples)

        return Counting()

    drive = type(engine).drive
    monkeypatch.setattr(type(engine), "drive", lambda e, j, loop: drive(e, j, lambda c: loop(counting(c))))
    run_rounds(made, start(made), engine, lambda result: None)
    assert benching.expected_examples(job(made)) == pytest.approx(counted["trained"])
    assert benching._tested(made) == counted["tested"]


@pytest.mark.parametrize("batch_size", [32, "all"])
def test_flops_of_a_step_are_those_of_its_products(batch_size):
    """Three products in each linear layer, but two in the first, which needs no gradient of its input."""
    raw = config(train={"batch_size": batch_size})
    made, _ = federation(raw)
    assert benching.step_flops(job(made)) == 2 * (64 * 12 * 2 + 12 * 10 * 3)
    assert torch.backends.mkldnn.enabled


def test_flops_of_an_lstm_are_counted(place):
    with importable(place):
        made, _ = federation(config(model="test_bench_models:rows"))
    steps, gates = 8, 4 * 16
    inputs = 2 * 2 * steps * 8 * gates  # forward, and gradient of the weights
    states = 2 * (3 * steps - 1) * 16 * gates  # and of the states, but for the first
    assert benching.step_flops(job(made)) == inputs + states + 3 * 2 * 16 * 10


def test_the_peak_is_that_of_a_slow_count():
    """Within a factor of ten, for clocks are what they are: the same product with numpy."""
    a = np.ones((512, 512), np.float32)
    tries = []
    for _ in range(5):
        began = time.thread_time()
        a @ a
        tries.append(time.thread_time() - began)
    assert 0.1 < benching.peak_flops("cpu") / (2 * 512**3 / min(tries)) < 10


def test_a_model_that_only_autograd_can_train_says_why():
    found = fedsim.bench(config(model="test_bench_models:deciding"))
    assert list(found.paths.speeds) == ["sequential, 1 client"]
    assert found.paths.refused["fused"] == "fused needs a chain of standard layers, as the model is not"
    assert "data-dependent control flow" in found.paths.refused["vectorised"]
    assert (found.paths.chosen, found.paths.why) == ("sequential, 1 client", "the fastest")


def test_a_mode_of_the_config_is_kept_and_the_other_paths_are_shown():
    found = fedsim.bench(config(engine={"name": "local", "mode": "vectorised"}))
    assert found.paths.chosen == "vectorised, 2 clients"
    assert found.paths.why == "engine.mode is vectorised; the fastest"
    assert "fused, 1 client" in found.paths.speeds
    assert found.estimate.speed == found.paths.speeds["vectorised, 2 clients"]


def test_a_mode_that_cannot_take_the_model_is_refused_as_a_run_would():
    with pytest.raises(ConfigError, match="engine: fused needs a chain of standard layers"):
        fedsim.bench(config(model="test_bench_models:rows", engine={"name": "local", "mode": "fused"}))


def test_a_remembered_plan_is_shown_and_not_used():
    raw = config()
    made, engine = federation(raw)
    chosen = engine.prepared(job(made), {}).choices.plan.plan
    first = fedsim.bench(raw)
    assert first.paths.remembered == benching.measuring.name(chosen)
    (file,) = cache_folder("plans").iterdir()
    file.write_text(file.read_text().replace(f'"path": "{chosen.path}"', '"path": "sequential"').replace(
        f'"chunk": {chosen.chunk}', '"chunk": 1'))  # fmt: skip
    again = fedsim.bench(raw)
    assert again.paths.remembered == "sequential, 1 client"
    assert again.paths.chosen != "sequential, 1 client"


def test_workers_are_those_of_a_run_and_their_start_is_counted(monkeypatch):
    monkeypatch.setattr(benching, "_start_s", lambda: 2.5)
    monkeypatch.setattr(benching, "cores", lambda: 4)
    found = fedsim.bench(config(engine={"name": "local", "workers": 4, "mode": "sequential"}))
    assert (found.workers, found.workers_why, found.estimate.start_s) == (4, "engine.workers", 2.5)
    assert found.estimate.at_once == 2.5  # five clients, one a task, on four processes
    assert found.estimate.training_s == pytest.approx(found.estimate.trained / found.estimate.speed / 2.5)


@pytest.mark.parametrize(("speed", "several"), [(10.0, True), (1e9, False)])
def test_a_long_run_gets_a_worker_for_each_core(monkeypatch, speed, several):
    from fedsim.engines.local import engine
    from fedsim.engines.local.plan import Plan

    monkeypatch.setattr(engine, "cores", lambda: 3)
    made, local = federation(config())
    count, why = benching._workers(job(made), local, Plan("fused", 1), speed)
    assert count == (3 if several else 1)
    assert ("one process would train for " in why) and (("10 s on" in why) is not several)


@pytest.mark.slow
def test_a_worker_takes_a_while_to_start():
    assert 0.05 < benching._start_s() < math.inf


def test_half_precision_has_fewer_paths_and_says_why():
    found = fedsim.bench(config(engine={"name": "local", "precision": "bf16"}))
    assert set(found.paths.refused) == {"fused"}
    assert "float32" in found.paths.refused["fused"]
    assert found.arithmetic.per_example == 2 * (64 * 12 * 2 + 12 * 10 * 3)


@pytest.mark.parametrize("engine", ["reference", "flower"])
def test_of_another_engine_the_local_one_is_measured(engine):
    found = fedsim.bench(config(engine=engine))
    assert found.engine == engine
    assert len(found.paths.speeds) + len(found.paths.left_out) == 4
