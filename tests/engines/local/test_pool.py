"""Worker processes: the same bits as one process, whatever happens to them, and nothing left of them."""

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from fedsim import params as p
from fedsim import rng
from fedsim.engines.local.engine import OneProcess
from fedsim.engines.local.plan import Plan
from fedsim.engines.local.pool import Pool
from fedsim.engines.local.sharing import Range
from fedsim.engines.local.trainer import trainer
from fedsim.engines.local.worker import NOBODY, Order
from fedsim.errors import ClientError, RunError
from fedsim.records import Broadcast

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks for processes in /proc"),
]

# A model that looks at each step whether a file tells it to wait, to raise or to kill its own process: at any client,
# or at the one whose inputs were made large.
GATE = """
import os
import signal
import time

from torch import nn


class Gate(nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.fc = str(folder), nn.Linear(5, 3)

    def there(self, name):
        return os.path.exists(os.path.join(self.folder, name))

    def forward(self, x):
        while self.there("wait"):
            time.sleep(0.01)
        if self.training and float(x.abs().max()) > 50:
            if self.there("raise"):
                raise RuntimeError("worn out")
            if self.there("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.fc(x / 9)
"""
SIZES = (9, 2, 7, 7, 13, 4, 8, 1, 5, 12, 3, 6, 6, 2, 9, 4, 7, 3, 11, 5)
MARKED = 11
PLAN = Plan("sequential", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the model's module lies, and the files that it looks for."""
    path = tmp_path_factory.mktemp("gate")
    (path / "test_pool_gate.py").write_text(GATE)
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))
    sys.modules.pop("test_pool_gate", None)


@pytest.fixture(scope="module")
def job(folder, job_of):
    """Twenty clients, one of them with large inputs, and two batches to evaluate."""
    from test_pool_gate import Gate

    made = job_of(lambda: Gate(folder), sizes=SIZES, tests=700)
    partition = made.data.partition
    made.data.train.inputs[partition.indices[partition.offsets[MARKED] : partition.offsets[MARKED + 1]]] *= 100
    return made


@pytest.fixture
def told(folder):
    """Put a file where the model looks; it is removed again."""
    written = []

    def tell(name):
        written.append(folder / name)
        written[-1].touch()
        return written[-1]

    yield tell
    for path in written:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def pool(job):
    """Two workers that several tests share."""
    with Pool(job, PLAN, mixes=False, workers=2) as made:
        yield made


def broadcast_of(job, round):
    params = {n: t + 0.1 * rng.normal(round, *t.shape) for n, t in p.of(job.work.model)[0].items()}
    return Broadcast(params, {}, {}, round)


def alone(job):
    return OneProcess(trainer(job, PLAN, mixes=False))


def assert_same(one, other):
    assert p.same_bits(one.update, other.update)
    assert (one.clients, one.num_examples, one.metrics) == (other.clients, other.num_examples, other.metrics)
    assert (one.bytes_up, one.bytes_down, one.skipped) == (other.bytes_up, other.bytes_down, other.skipped)


@pytest.mark.parametrize(
    ("round", "clients"), [(1, [*range(20)]), (2, [3, 19, 4, 7]), (3, [5]), (4, [*range(0, 20, 2)])]
)
def test_cohorts_and_scores_are_those_of_one_process_bit_for_bit(pool, job, round, clients):
    broadcast, other = broadcast_of(job, round), alone(job)
    assert_same(pool.run_cohort(broadcast, clients, {}, 7), other.run_cohort(broadcast, clients, {}, 7))
    for examples in (job.data.test, job.data.train):
        scores = [cohorts.evaluate(broadcast, examples) for cohorts in (pool, other)]
        assert all(torch.equal(getattr(scores[0], n), getattr(scores[1], n)) for n in ("loss", "correct", "labels"))


def test_a_worker_killed_in_the_middle_of_a_round_is_replaced_and_no_bit_changes(pool, job, told):
    broadcast, wait, victim = broadcast_of(job, 5), told("wait"), pool._workers[0].process
    memories = pool._workers[0].memories
    memories.at.bytes()[:8] = NOBODY

    def kill():
        """While the first worker waits in the midst of a client's step."""
        while memories.client() is None:
            time.sleep(0.01)
        os.kill(victim.pid, signal.SIGKILL)
        wait.unlink()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.warns(UserWarning, match=r"^round 5: a worker process ended \(signal 9, .*\) at client \d+") as heard:
        found = pool.run_cohort(broadcast, list(range(20)), {}, 75)
    killer.join()
    assert len(heard) == 1
    processes = [worker.process for worker in pool._workers]
    assert len(processes) == 2 and victim not in processes and all(process.poll() is None for process in processes)
    assert_same(found, alone(job).run_cohort(broadcast, list(range(20)), {}, 75))


def test_a_client_that_kills_its_worker_every_time_is_named_after_three_deaths(job, told):
    told("kill")
    with warnings.catch_warnings(record=True) as heard, Pool(job, PLAN, mixes=False, workers=1) as own:
        warnings.simplefilter("always")
        with pytest.raises(ClientError, match=r"^round 3, client 11: 3 worker processes ended") as caught:
            own.run_cohort(broadcast_of(job, 3), [0, 4, MARKED, 13], {}, 9)
    assert (caught.value.round, caught.value.client) == (3, MARKED)
    assert [str(one.message).partition(";")[0][-10:] for one in heard] == [" client 11"] * 2


def test_a_worker_that_dies_while_it_scores_is_not_blamed_on_a_client(job, told):
    broadcast = broadcast_of(job, 6)
    with Pool(job, PLAN, mixes=False, workers=1) as own:
        own.run_cohort(broadcast, [3], {}, 7)
        worker = own._workers[0]
        worker.orders.append(Order(0, 0, b"", Range(0, 1, False), b"", 0))
        worker.process.kill()
        with pytest.warns(UserWarning, match=r"^round 6: a worker process ended \(.*\) while it scored the model; "):
            own._bury(worker, Counter(), 6)
        worker = own._workers[0]
        worker.orders.append(Order(0, 0, b"", Range(0, 1, False), b"", 0))
        worker.process.kill()
        with pytest.raises(RunError, match=r"^round 6: 3 worker processes ended \(.*\) while they scored the model"):
            own._bury(worker, Counter({0: 2}), 6)


def test_what_is_raised_in_a_worker_is_what_is_raised_in_one_process_and_nothing_is_left(job, told):
    told("raise")
    broadcast, errors, before = broadcast_of(job, 4), [], _descriptors()
    with Pool(job, PLAN, mixes=False, workers=1) as own:
        (process,) = (worker.process for worker in own._workers)
        for cohorts in (own, alone(job)):
            with pytest.raises(ClientError) as caught:
                cohorts.run_cohort(broadcast, list(range(20)), {}, 9)
            errors.append((type(caught.value), caught.value.round, caught.value.client, str(caught.value)))
    assert errors[0] == errors[1] == (ClientError, 4, MARKED, "round 4, client 11: RuntimeError: worn out")
    assert pickle.loads(pickle.dumps(caught.value)).client == MARKED
    assert process.returncode == -signal.SIGKILL
    del own, cohorts, caught
    assert _descriptors() <= before


def _descriptors():
    gc.collect()
    return {path.name for path in Path("/proc/self/fd").iterdir()}


# ---------------------------------------------------------------- from the command line

CONFIG = """
name: small
data: {dataset: digits, clients: 20}
model: {name: mlp, hidden: [8]}
train: {rounds: 100000, eval_every: 100000}
engine: {name: local, mode: sequential, workers: 2}
"""
HEARD = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job would ignore it


def _children(pid):
    found = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return {child for child in found if b"fedsim.engines.local.worker" in Path(f"/proc/{child}/cmdline").read_bytes()}


def _running(pid):
    """Whether there is such a process, and more of it than an exit code that nobody has asked for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_run_that_was_interrupted_or_killed(tmp_path, number):
    """Ctrl-C reaches all processes of a terminal, ``kill -9`` only the run."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    code = f"{HEARD}; import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"
    command = [sys.executable, "-c", code, "run", "config.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **pipes)
    assert any(line.startswith("round 2/") for line in running.stdout)  # reads on until then
    workers = _children(running.pid)
    assert len(workers) == 2 and all(map(_running, workers))
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
    _, err = running.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_running, workers))
    (run,) = (tmp_path / "runs").iterdir()
    engine = json.loads((run / "environment.json").read_text())["engine"]
    assert (engine["processes"], engine["workers"], engine["path"]) == (2, 2, "sequential")
    if number == signal.SIGINT:
        assert running.returncode == 130 and err.splitlines()[0] == "interrupted" and len(err.splitlines()) == 2
