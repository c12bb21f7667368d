"""The server's side of Flower, with Flower's own SuperLink and, in the slow tests, its own SuperNodes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run

import fedsim
from fedsim.deploy import interventions, sides, superlink_child
from fedsim.deploy.address import Address
from fedsim.deploy.authority import make
from fedsim.deploy.certificates import server_files
from fedsim.deploy.interventions import server as quick
from fedsim.deploy.superlink import superlink
from fedsim.engines.flower.process import task_identity
from fedsim.errors import ConfigError, DataError, RunError

HERE = Address("127.0.0.1", 0)
APP = """
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1, "train_loss": 0.5})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)
"""
COMPONENTS = {"serverapp": "fedsim.deploy.apps:server_app", "clientapp": "dummy_app_of_a_test:app"}


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs")
    make(folder, ["127.0.0.1"], 2)
    return folder


def gone(process, wait=0.0):
    end = time.monotonic() + wait
    while True:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_the_interventions_fit_the_installed_flower(monkeypatch):
    assert interventions.fits("server")
    assert interventions.missing(("flwr.app:Message", "flwr.app:Nothing", "flwr.nowhere:x")) == [
        "flwr.app:Nothing",
        "flwr.nowhere:x",
    ]
    monkeypatch.setattr(quick, "NAMES", ("flwr.superlink.grid:HttpGrid._gone",))
    assert not interventions.fits("server")
    monkeypatch.undo()
    monkeypatch.setattr(interventions.metadata, "version", lambda _: "1.42.0")
    assert not interventions.fits("server")


def test_a_key_that_two_clients_have_is_refused_before_anything_starts(certs):
    files = server_files(certs)
    twice = type(files)(files.ca, files.certificate, files.key, {0: files.clients[0], 1: certs / "copy.pub"})
    (certs / "copy.pub").write_bytes(files.clients[0].read_bytes())
    with pytest.raises(DataError, match=r"copy.pub.*same key as .*client-0"), superlink(HERE, twice):
        pass


def test_a_port_in_use_is_known_before_anything_starts(certs, monkeypatch):
    monkeypatch.setattr(superlink_child, "running", None)
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(ConfigError, match=f"--listen: .*{other.getsockname()[1]}"),
        superlink(Address("127.0.0.1", other.getsockname()[1]), server_files(certs)),
    ):
        pass


def test_flowers_programs_get_a_clean_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_DATABASE", "somewhere.db")
    monkeypatch.setenv("FLWR_OIDC_ENABLED", "1")
    monkeypatch.setenv("PYTHONPATH", "/own")
    made = superlink_child.environment(tmp_path, {"MORE": "1"})
    assert {name for name in made if name.startswith("FLWR_")} == {*superlink_child._QUIET, "FLWR_HOME"}
    assert made["FLWR_HOME"] == str(tmp_path) and made["MORE"] == "1"
    assert made["PYTHONPATH"].split(os.pathsep) == [str(Path(fedsim.__file__).parent.parent), "/own"]
    assert made["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_flower_that_does_not_start_is_told_with_its_last_words(tmp_path):
    blocked = tmp_path / "home"
    blocked.mkdir()
    with (
        pytest.raises(RunError, match=r"(?s)has ended.*invalid choice: 'nonsense'"),
        superlink_child.running(blocked, tmp_path / "log", {}, "nonsense"),
    ):
        pass


class Calls:
    """Something to be called that fails as it is told."""

    def __init__(self, *errors):
        self.errors, self.count = list(errors), 0

    def __call__(self):
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_patience_tries_again_while_the_superlink_runs():
    patience, calls = quick._Patience(lambda: None), Calls(httpx.ReadTimeout(""), httpx.ConnectError(""))
    assert patience.invoke(calls) == "done" and calls.count == 3


def test_patience_ends_with_the_superlink():
    def check():
        raise RunError("it has ended")

    calls = Calls(httpx.ConnectError(""))
    with pytest.raises(RunError, match="it has ended"):
        quick._Patience(check).invoke(calls)
    assert calls.count == 1


def test_patience_has_an_end():
    patience = quick._Patience(lambda: None)
    patience.limit_s = 0.3
    with pytest.raises(RunError, match="does not answer"):
        patience.invoke(Calls(*[httpx.ConnectError("")] * 100))


@pytest.mark.parametrize(("status", "words"), [(401, "given this run up"), (403, "given this run up"), (500, "fails")])
def test_a_refusal_is_no_reason_to_try_again_or_to_kill_the_process(status, words):
    request = httpx.Request("POST", "http://x")
    calls = Calls(httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request)))
    with pytest.raises(RunError, match=words):
        quick._Patience(lambda: None).invoke(calls)
    assert calls.count == 1


class Stub:
    """A SuperLink's client that has the parts of one message."""

    def __init__(self, parts):
        self.parts, self.confirmed = parts, []

    def PullObject(self, request):  # noqa: N802
        return PullObjectResponse(
            object_found=True, object_available=True, object_content=self.parts[request.object_id]
        )

    def ConfirmMessageReceived(self, request):  # noqa: N802
        self.confirmed.append(request.message_object_id)


def fetched(change):
    """A reply after its parts were fetched; ``change`` is made to what the SuperLink was told and to the parts."""
    with task_identity(5, 1):
        sent = Message(RecordDict({"a": ConfigRecord({"n": 1})}), 7, "train")
        sent.metadata.__dict__["_message_id"] = sent.object_id
        reply = Message(RecordDict({"b": ConfigRecord({"n": 2})}), reply_to=sent)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    told, tree = message_to_proto(remove_content_from_message(reply)), get_object_tree(reply)
    parts = {name: one.deflate() for name, one in get_all_nested_objects(reply).items()}
    change(told, tree, parts)
    grid = quick._Grid("127.0.0.1:1", insecure=True, token="t")
    grid._client = Stub(parts)
    grid._run = Run.create_empty(5)
    return grid._fetch(told, tree), sent


def test_a_whole_reply_is_itself():
    reply, sent = fetched(lambda *_: None)
    assert reply.content["b"]["n"] == 2 and reply.metadata.reply_to_message_id == sent.object_id


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told, tree, parts: setattr(told.metadata, "src_node_id", 8), "of another node"),
        (lambda told, tree, parts: setattr(told.metadata, "reply_to_message_id", "x"), "another message"),
        (lambda told, tree, parts: parts.update(dict.fromkeys(parts, b"garbage")), "not valid"),
        (lambda told, tree, parts: tree.ClearField("children"), "not valid: KeyError"),
        (lambda told, tree, parts: setattr(told.metadata, "message_id", tree.children[0].object_id), "RecordDict"),
    ],
)
def test_a_reply_of_a_client_that_lies_is_an_error_of_that_client(change, words):
    reply, _ = fetched(change)
    assert reply.has_error() and words in reply.error.reason


@pytest.mark.slow
def test_all_of_it_starts_registers_and_leaves_nothing(certs, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    said = []
    with superlink(HERE, server_files(certs), say=said.append, log=tmp_path / "log") as link:
        assert sorted(link.nodes) == [0, 1] and len(set(link.nodes.values())) == 2
        home, process = link._child.home, link._child.process.pid
        assert home.stat().st_mode & 0o077 == 0
        with pytest.raises(ValueError, match="while the grid is open"):
            link.online()
        with link.grid() as grid:
            assert link.online() == set() and grid.run.run_id > 0
            link.check()
            began = time.monotonic()
            sent = Message(RecordDict({"a": ConfigRecord({"n": 1})}), link.nodes[0], "train")
            replies = list(grid.send_and_receive([sent], timeout=1.0))
            assert time.monotonic() - began < 5
            assert all(reply.has_error() for reply in replies)  # nobody is there
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert gone(process) and not home.exists() and said == []
    assert not sides._processes(home)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", link._child.port))
    assert os.environ.get("NO_PROXY") is None


@pytest.mark.slow
def test_a_superlink_that_ends_is_told(certs, tmp_path):
    with superlink(HERE, None, log=tmp_path / "log") as link:
        assert link.nodes == {}
        with pytest.raises(RunError, match="has ended"), link.grid() as grid:
            os.kill(link._child.process.pid, signal.SIGKILL)
            list(grid.get_node_ids())
        with pytest.raises(RunError, match=r"SuperLink has ended \(exit code -9\)"):
            link.check()


@pytest.mark.slow
def test_a_hundred_keys_are_registered_in_a_moment(tmp_path):
    make(tmp_path / "certs", ["127.0.0.1"], 100)
    keys = server_files(tmp_path / "certs").clients
    with superlink_child.running(tmp_path, tmp_path / "log", {}, "process") as child:
        nodes = quick.register(child.address, keys)
    assert list(nodes) == list(range(100)) and len(set(nodes.values())) == 100


PARENT = """
import sys, time
from fedsim.deploy.address import Address
from fedsim.deploy.superlink import superlink
with superlink(Address("127.0.0.1", 0), None, stock=sys.argv[1] == "stock") as link, link.grid():
    print(link._child.process.pid, link._child.home, link.address.port, link._child.port, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("pace", ["quick", "stock"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_the_server_ends_all_of_it(how, pace):
    environment = {**os.environ, "PYTHONPATH": str(Path(fedsim.__file__).parent.parent)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, pace],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        child, home, *ports = parent.stdout.readline().decode().split()
        parent.send_signal(how)
        parent.wait(15)
        assert gone(int(child), 15)
        end = time.monotonic() + 15
        while (sides._processes(Path(home)) or Path(home).exists()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not sides._processes(Path(home)) and not Path(home).exists()
        for port in ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(port)))
    finally:
        parent.kill()
        parent.wait()


@pytest.fixture
def supernode(certs, tmp_path, monkeypatch):
    """Starts Flower's own SuperNode of a client, with its key."""
    (tmp_path / "dummy_app_of_a_test.py").write_text(APP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(link, client):
        (tmp_path / f"home-{client}").mkdir()
        own = certs / f"client-{client}"
        options = ["--superlink", str(link.address), "--root-certificates", str(own / "ca.crt")]
        options += ["--auth-supernode-private-key", str(own / "client.key")]
        options += ["--host", "127.0.0.1", "--port", str(free_port())]
        with (tmp_path / f"node-{client}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [Path(sys.executable).parent / "flower-supernode", *options],
                    env=superlink_child.environment(tmp_path / f"home-{client}", {}),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        process.wait(15)
        os.killpg(process.pid, signal.SIGKILL) if not gone(process.pid) else None


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True])
def test_two_rounds_of_flowers_own_client_through_door_tls_and_keys(stock, certs, tmp_path, supernode):
    said = []
    files = server_files(certs)
    with superlink(HERE, files, stock=stock, say=said.append, log=tmp_path / "log", components=COMPONENTS) as link:
        supernode(link, 0)
        with link.grid() as grid:
            end = time.monotonic() + 30
            while not link.online() and time.monotonic() < end:
                link.check()
                time.sleep(0.1)
            assert link.online() == {link.nodes[0]}
            strategy = FedAvg(min_available_nodes=1, min_train_nodes=1, min_evaluate_nodes=0, fraction_evaluate=0.0)
            result = strategy.start(grid, ArrayRecord([np.arange(2000.0)]), num_rounds=2, timeout=60)
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], np.arange(2000.0))
    assert {round: dict(metrics) for round, metrics in result.train_metrics_clientapp.items()} == {
        1: {"train_loss": 0.5},
        2: {"train_loss": 0.5},
    }
    assert said == []


@pytest.mark.slow
def test_without_the_flower_they_were_made_for_the_supported_ways_are_taken(certs, tmp_path, monkeypatch):
    said, taken = [], []
    monkeypatch.setattr(interventions, "MADE_FOR", "1.40")
    real = sides.stock
    monkeypatch.setattr(sides, "stock", lambda *given: taken.append(1) or real(*given))
    with superlink(HERE, server_files(certs), say=said.append, log=tmp_path / "log") as link:
        assert sorted(link.nodes) == [0, 1]
    assert taken and len(said) == 1
    assert "is not the 1.40" in said[0] and "slower" in said[0]


@pytest.mark.slow
def test_a_slow_reply_holds_nobody_up(certs, tmp_path):
    """Two replies, one without its parts: the whole one is there at once, the other when it is whole."""
    from cryptography.hazmat.primitives import serialization
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import push_objects
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    files = server_files(certs)
    with superlink(HERE, files, log=tmp_path / "log") as link, link.grid() as grid:
        fleets = {}
        for client in link.nodes:
            key = serialization.load_ssh_private_key((certs / f"client-{client}/client.key").read_bytes(), None)
            fleets[client] = FleetHttpClient.from_server_address(
                str(link.address), False, files.ca.read_bytes(), [NodeAuthHttpInterceptor(key, key.public_key())]
            )
            public = quick._pem(files.clients[client])
            fleets[client].ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
        sent = [Message(RecordDict({"a": ConfigRecord({"n": k})}), link.nodes[k], "train") for k in fleets]
        ids = list(grid.push_messages(sent))
        later = []
        for client, fleet in fleets.items():
            node = Node(node_id=link.nodes[client])
            got = message_from_proto(fleet.PullMessages(PullMessagesRequest(node=node)).messages_list[0])
            got.metadata.__dict__["_message_id"] = ids[client]
            reply = Message(RecordDict({"b": ConfigRecord({"n": client})}), reply_to=got)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            bare = message_to_proto(remove_content_from_message(reply))
            told = fleet.PushMessages(
                PushMessagesRequest(
                    node=node, messages_list=[bare], message_object_trees=[tree], clientapp_runtime_list=[0.1]
                )
            )
            push = make_push_object_fn_protobuf(fleet.PushObject, node, grid.run.run_id, told.session_id)
            later.append(
                lambda o=objects, p=push, n=told: push_objects(o, p, object_ids_to_push=set(n.objects_to_push))
            )
        later[1]()
        first = grid.pull_messages(ids)
        assert [reply.content["b"]["n"] for reply in first] == [1]
        for _ in range(3):
            assert grid.pull_messages(ids[:1]) == []
        timer = threading.Timer(0.3, later[0])
        timer.start()
        second = []
        end = time.monotonic() + 10
        while not second and time.monotonic() < end:
            second = grid.pull_messages(ids[:1])
        timer.join()
        assert [reply.content["b"]["n"] for reply in second] == [0]
        for fleet in fleets.values():
            fleet.close()
