"""Federations for actors, and a real cluster of two nodes on this machine: what ``ray start`` makes of two machines."""

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.local import local
from fedsim.federation import Federation, RoundResult, job, run, start
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.records import Examples, Partition, ServerState
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import sgd

SIZES = (6, 14, 2, 8, 7, 3, 11, 6, 10, 4, 12, 2, 6, 3)  # no last batch of one example, which batch norm refuses
TESTS = 1203  # three batches, so that scoring is shared out
UP_S = 120


@pytest.fixture(scope="session")
def rules() -> Iterator[Any]:
    """A module that is found through sys.path alone, as a user's is."""
    folder = str(Path(__file__).parent)
    sys.path.append(folder)
    yield importlib.import_module("ray_rules")
    sys.path.remove(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def examples(key: int, n: int) -> Examples:
    inputs = rng.normal(rng.fold(key, "x"), n, 4)
    return Examples(inputs, (inputs[:, 0] - inputs[:, 1] > 0).long() + (inputs[:, 2] > 0.5).long())


@pytest.fixture
def federation(rules: Any) -> Callable[..., Federation]:
    """Unequal clients with a state each, signs mixed; momentum, batch norm and keyed dropout, unless ``plain``."""

    def make(*, plain: bool = False, rule: Any = None) -> Federation:
        norm = () if plain else (nn.BatchNorm1d(6), nn.ReLU(), Dropout(0.3))
        made, rule = nn.Sequential(nn.Linear(4, 6), *norm, nn.Linear(6, 3)), rule or rules.drifting()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(0.5 * rng.normal(rng.fold(3, name), *parameter.shape))
        n = sum(SIZES)
        partition = Partition(np.array([0, *np.cumsum(SIZES)]), rng.permutation(4, n).numpy())
        train, test = examples(1, n), examples(2, TESTS)
        owners = Partition(np.linspace(0, TESTS, len(SIZES) + 1).astype(np.int64), np.arange(TESTS))
        data = FederatedData(train, test, partition, owners, test, 3, ("a", "b", "c"))
        work = LocalWork(made, key_names(made), sgd(lr=0.1, momentum=0.0 if plain else 0.9), rule, 2, 4)
        strategy = replace(fedavg(server_lr=0.7), local=rule)
        return Federation(7, data, work, strategy, 3, 12, "fixed", 1, "fail")

    return make


@pytest.fixture
def outcome() -> Callable[[Federation, Any], tuple[ServerState, list[Any]]]:
    """Last state, and every number of every round but its wall time."""

    def outcome(federation: Federation, engine: Any) -> tuple[ServerState, list[Any]]:
        found: list[Any] = []

        def note(result: RoundResult) -> None:
            found.append((replace(result.record, seconds=0.0), result.evaluations))

        return run(federation, start(federation), engine, note), found

    return outcome


@pytest.fixture
def same(federation: Any, outcome: Any) -> Callable[..., None]:
    """Check that an engine gives what ``local`` gives: bits of the model and of every state, numbers of every round."""

    def check(engine: Any, rule: Any = None, *, chunk: int = 1, plain: bool = False) -> None:
        """Rule: does to a process on the way what ``local`` is spared."""
        other = local(mode=engine.mode, workers=1, device="cpu", precision="bf16" if engine.autocast else "fp32")
        plan, made = {"path": engine.mode, "chunk": chunk}, federation(plain=plain, rule=rule)
        ours, our_rounds = outcome(made, engine.prepared(job(made), plan))
        made = federation(plain=plain)
        theirs, their_rounds = outcome(made, other.prepared(job(made), plan))
        assert p.same_bits(ours.params, theirs.params) and p.same_bits(ours.buffers, theirs.buffers)
        assert ours.clients.keys() == theirs.clients.keys() and len(ours.clients) > 10
        assert all(p.same_bits(ours.clients[k], theirs.clients[k]) for k in theirs.clients)
        assert our_rounds == their_rounds and len(our_rounds) == 4

    return check


def raylet_of(parent: int) -> int:
    """Process id of a node's raylet, by that of the process that started it; 0 if there is none."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            pid, name, state, found = path.read_text().split()[:4]
            if name == "(raylet)" and int(found) == parent and state != "Z":
                return int(pid)
    return 0


@dataclass
class Node:
    """A ``ray start`` that blocks, with all its processes in one group."""

    process: subprocess.Popen[bytes]

    def raylet(self) -> int:
        """Process id of the node's raylet, whose children are the node's actors; 0 when it has ended."""
        return raylet_of(self.process.pid)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Cluster:
    """A head node and further nodes, of one CPU each."""

    folder: Path
    port: int
    client_port: int
    nodes: list[Node]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def join(self, *options: str) -> Node:
        """Start a node and wait until it runs."""
        log = self.folder / f"node-{len(self.nodes)}.log"
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus", "1", *options]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": ""}
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd="/"
            )
        self.nodes.append(Node(process))
        until = time.monotonic() + UP_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        return self.nodes[-1]

    def wait_for_client_server(self) -> None:
        """It comes up some seconds after its node says that it runs."""
        until = time.monotonic() + UP_S
        while time.monotonic() < until:
            with contextlib.suppress(ConnectionRefusedError):
                return socket.create_connection(("127.0.0.1", self.client_port)).close()
            time.sleep(0.1)
        pytest.fail("the head node has no client server")

    def joined(self) -> Node:
        """Add a node to the head's cluster."""
        return self.join("--address", self.address)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A head node of one CPU, which lives as long as the tests."""
    if sys.platform != "linux":
        pytest.skip("finds processes in /proc")
    pytest.importorskip("ray", reason="needs Ray: pip install 'fedsim-flower[ray]'")
    folder = Path(tempfile.mkdtemp(prefix="fedsim-ray-", dir="/tmp"))  # the path of a socket must be short
    made = Cluster(folder, free_port(), free_port(), [])
    try:
        made.join(
            *("--head", "--port", str(made.port), "--ray-client-server-port", str(made.client_port)),
            *("--include-dashboard", "false", "--temp-dir", str(folder)),
        )
        made.wait_for_client_server()
        yield made
    finally:
        for node in made.nodes:
            node.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def own_raylet() -> Callable[[], int]:
    """Process id of the raylet of a Ray that this process has started; 0 if there is none."""
    return lambda: raylet_of(os.getpid())


@pytest.fixture
def second(cluster: Cluster) -> Iterator[Node]:
    """A second node, for one test."""
    node = cluster.joined()
    try:
        yield node
    finally:
        node.end()
