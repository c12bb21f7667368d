"""A client's supervisor: with stand-ins for the SuperNode, and (slow) with Flower's own and a server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.deploy import authority, client, interventions
from fedsim.deploy.address import Address
from fedsim.deploy.certificates import client_files, server_files
from fedsim.deploy.client import run_client
from fedsim.deploy.interventions import client as flower
from fedsim.deploy.node import END, Ended, Log, Remembered
from fedsim.deploy.superlink import superlink
from fedsim.errors import RunError

NOT_TAKEN = Ended(1, 305, "[code: 2004] Failed to activate SuperNode", online=False)
KILLED = Ended(-9, 0, "", online=True)
RUNS = None


@contextlib.contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Address("127.0.0.1", server.getsockname()[1])


@pytest.fixture
def server():
    with listening() as address:
        yield address


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs")
    authority.make(folder, ["localhost"], 3)
    return folder


class Nodes:
    """SuperNodes that end as they are told, one after another; the last says that the run is over."""

    def __init__(self, *ends):
        self.ends, self.started, self.at = list(ends), 0, []

    def __call__(self, setup, say):
        self.at.append(time.monotonic())
        self.started += 1
        return Node(self.ends[self.started - 1])


class Node:
    runtime, secret = Address("127.0.0.1", 1), b"s"

    def __init__(self, ended):
        self.ended, self.log = ended, Log()
        if ended is RUNS or ended.online:
            self.log.read("INFO : SuperNode ID: 55")
        if ended is RUNS:
            self.log.read(f"INFO : Receiving: {END} message (ID: a)")
            threading.Timer(0.2, self.log.read, ["INFO : Sent successfully"]).start()

    def wait(self, seconds):
        time.sleep(0.02)
        return self.ended is not RUNS

    def stop(self):
        return True

    def clear(self):
        return self.ended


def run(server, state, files=None, **more):
    """Run a client of stock kind, whose SuperNodes are stand-ins; what was said."""
    said = []
    options = {"partition": 0, "state": state, "until": threading.Event(), "stock": True, **more}
    run_client(ClientApp(), server, files, say=said.append, **options)
    return said


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(client, "FIRST_S", 0.05)
    monkeypatch.setattr(client, "RETRY_S", 0.05)


def test_a_supernode_that_ends_is_started_again_later_and_later(server, tmp_path, monkeypatch, quickly):
    nodes = Nodes(KILLED, KILLED, NOT_TAKEN, NOT_TAKEN, RUNS)
    monkeypatch.setattr(client, "SuperNode", nodes)
    said = run(server, tmp_path)
    assert nodes.started == 5
    waits = np.diff(nodes.at)
    assert (waits[1:] > [0.1, 0.2, 0.4]).all()
    assert "Flower's SuperNode was ended by signal 9; trying again in 0 s" in said
    assert sum("does not take this client" in line for line in said) == 1  # the same line is not said at once again
    assert said[-1] == f"connected to the server at {server}"


def test_a_key_that_is_not_taken_is_fatal_at_first(server, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "SuperNode", Nodes(NOT_TAKEN))
    with pytest.raises(RunError, match="does not take this client: its key is not registered"):
        run(server, tmp_path)


def test_a_key_that_was_taken_once_will_be_again(server, certs, tmp_path, monkeypatch, quickly):
    files = client_files(certs, 0)
    monkeypatch.setattr(client.reaching, "reach", lambda *_: None)
    nodes = Nodes(NOT_TAKEN, RUNS)
    monkeypatch.setattr(client, "SuperNode", nodes)
    Remembered(tmp_path / "node.json", files.public).write(55)
    run(server, tmp_path, files)
    assert nodes.started == 2


def test_the_former_node_is_said_to_be_gone_before_a_new_one_starts(certs, tmp_path, monkeypatch, quickly):
    files, told = client_files(certs, 0), []
    nodes = Nodes(KILLED, KILLED, RUNS)
    monkeypatch.setattr(client.reaching, "reach", lambda *_: None)
    monkeypatch.setattr(client, "SuperNode", nodes)
    monkeypatch.setattr(client.worker, "step", lambda *_: False)
    monkeypatch.setattr(flower, "deactivate", lambda *a: told.append((nodes.started, a)))
    until = threading.Event()
    threading.Timer(1.0, until.set).start()
    run(Address("localhost", 5), tmp_path, files, stock=False, until=until)
    assert [started for started, _ in told] == [1, 2]
    assert told[0][1] == ("localhost:5", files.ca.read_bytes(), files.key.read_bytes(), 55)
    assert Remembered(tmp_path / "node.json", files.public).read() == 55


def test_a_server_that_does_not_come_is_waited_for_so_long(tmp_path, quickly):
    with listening() as address:
        pass
    begun, said = time.monotonic(), []
    with pytest.raises(RunError, match=f"{address} stayed away for 0.5 s"):
        run_client(
            ClientApp(),
            address,
            None,
            partition=0,
            say=said.append,
            state=tmp_path,
            until=threading.Event(),
            wait_s=0.5,
        )
    assert time.monotonic() - begun >= 0.5
    assert said == [f"waiting for the server at {address}: connection refused"]


def test_two_clients_cannot_share_a_folder(server, tmp_path):
    with filelock.FileLock(tmp_path / "client.lock"), pytest.raises(RunError, match="another fedsim client is using"):
        run(server, tmp_path)


def test_a_folder_that_cannot_be_written_is_no_mistake(server, certs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(client.reaching, "reach", lambda *_: None)
    monkeypatch.setattr(client, "SuperNode", Nodes(RUNS))
    assert run(server, tmp_path / "file" / "state", client_files(certs, 0))


def test_another_flower_is_used_in_its_own_ways(server, tmp_path, monkeypatch):
    monkeypatch.setattr(interventions, "MADE_FOR", "9.9")
    monkeypatch.setattr(client, "SuperNode", Nodes(RUNS))
    said = run(server, tmp_path, stock=False)
    assert said[0] == "warning: made for Flower 9.9; with another one rounds are slower"


HERE = Path(__file__).parent


@contextlib.contextmanager
def started(address, partition, state, certs="-", *more):
    """A client in a process of its own."""
    command = [sys.executable, HERE / "a_client.py", str(address), str(partition), str(state), str(certs), *more]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    state.mkdir(exist_ok=True)
    with (state / "said").open("w") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def supernode(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    (pid,) = {pid for path in threads for pid in path.read_text().split()} | set(children)
    return int(pid)


def exists(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what, seconds=60.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def training(grid, nodes, seconds=0.0, size=300_000):
    arrays = ArrayRecord({"x": Array(np.arange(size, dtype=np.uint8))})
    config = ConfigRecord({"seconds": seconds})
    return grid.push_messages([Message(RecordDict({"arrays": arrays, "config": config}), n, "train") for n in nodes])


def replies(grid, ids, seconds=60.0):
    ids, found = set(ids), []
    end = time.monotonic() + seconds
    while len(found) < len(ids):
        assert time.monotonic() < end
        missing = ids - {reply.metadata.reply_to_message_id for reply in found}
        found += [r for r in grid.pull_messages(missing) if r.metadata.reply_to_message_id in missing]
        time.sleep(0.1)
    return found


def first_entries(found):
    return sorted(int(reply.content["arrays"]["x"].numpy()[0]) for reply in found)


@pytest.mark.slow
def test_clients_work_over_tls_fail_and_end(certs, tmp_path):
    with superlink(Address("127.0.0.1", 0), server_files(certs), say=print) as link, link.grid() as grid:
        address = Address("localhost", link.address.port)
        with started(address, 0, tmp_path / "0", certs) as one, started(address, 2, tmp_path / "2", certs) as two:
            wait_for(lambda: len(list(grid.get_node_ids())) == 2)
            nodes = [link.nodes[0], link.nodes[2]]
            assert set(grid.get_node_ids()) == set(nodes)
            for _ in range(3):
                assert first_entries(replies(grid, training(grid, nodes))) == [1, 3]
            (failed,) = replies(grid, grid.push_messages([Message(RecordDict(), nodes[0], "query.fail")]))
            assert failed.error.reason == "ZeroDivisionError: no examples"
            assert first_entries(replies(grid, training(grid, nodes))) == [1, 3]

            two.send_signal(signal.SIGINT)
            assert two.wait(10) != 0
            assert set(grid.get_node_ids()) == {nodes[0]}
            child = supernode(one)
            (last,) = replies(grid, grid.push_messages([Message(RecordDict(), nodes[0], END)]))
            assert last.has_content()
            assert one.wait(15) == 0
            assert not exists(child)
            assert not list(grid.get_node_ids())


@pytest.mark.slow
def test_killed_processes_come_back_as_the_same_node(certs, tmp_path):
    with superlink(Address("127.0.0.1", 0), server_files(certs), say=print) as link, link.grid() as grid:
        address, node = Address("localhost", link.address.port), link.nodes[1]
        with contextlib.ExitStack() as stack:
            one = stack.enter_context(started(address, 1, tmp_path, certs))
            wait_for(lambda: list(grid.get_node_ids()) == [node])
            for victims in ("SuperNode", "client", "both"):
                under_way = training(grid, [node], seconds=2.0)
                time.sleep(0.8)  # it is at work
                child = supernode(one)
                if victims != "client":
                    os.kill(child, signal.SIGKILL)
                if victims != "SuperNode":
                    one.kill()
                    one.wait()
                    wait_for(lambda child=child: not exists(child), 10)
                    one = stack.enter_context(started(address, 1, tmp_path, certs))
                (lost,) = replies(grid, under_way)
                assert "Node Unavailable" in lost.error.reason, victims
                wait_for(lambda: list(grid.get_node_ids()) == [node], 15)  # 20 s would be as long as without a word
                assert first_entries(replies(grid, training(grid, [node]))) == [2]


@pytest.mark.slow
def test_a_server_that_is_started_anew_is_joined_anew(certs, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = Address("127.0.0.1", probe.getsockname()[1])
    with started(Address("localhost", address.port), 0, tmp_path, certs):
        for _ in range(2):
            with superlink(address, server_files(certs), say=print) as link, link.grid() as grid:
                wait_for(lambda link=link, grid=grid: list(grid.get_node_ids()) == [link.nodes[0]])
                assert first_entries(replies(grid, training(grid, [link.nodes[0]]))) == [1]
        said = (tmp_path / "said").read_text()
        assert said.count(f"connected to the server at localhost:{address.port}") == 2
        assert "waiting for the server" in said


@pytest.mark.slow
def test_flowers_own_ways_work_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    components = {"serverapp": "fedsim.deploy.apps:server_app", "clientapp": "a_client:app"}
    with superlink(Address("127.0.0.1", 0), None, say=print, components=components) as link, link.grid() as grid:
        with started(link.address, 1, tmp_path, "-", "stock") as one:
            (node,) = wait_for(lambda: list(grid.get_node_ids()))
            assert first_entries(replies(grid, training(grid, [node]))) == [2]
            training(grid, [node], seconds=60)
            child = supernode(one)
            wait_for(lambda: len(group(child)) == 3)  # SuperNode, superexec, the app
            members = group(child)
            one.kill()
            wait_for(lambda: not any(map(exists, members)), 15)
        with started(link.address, 1, tmp_path, "-", "stock") as one:
            (node,) = wait_for(lambda: list(set(grid.get_node_ids()) - {node}))
            (last,) = replies(grid, grid.push_messages([Message(RecordDict(), node, END)]))
            assert last.has_content()
            assert one.wait(15) == 0


def group(leader):
    """Processes of a group that are alive."""
    found = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in found if exists(pid) and _group(pid) == leader]


def _group(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None
