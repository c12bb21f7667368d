"""Tasks are done by the app that is given: with a stand-in for the SuperNode, and with Flower's own interface."""

import contextlib
import socket
import threading

import httpx
import numpy as np
import pytest
import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _insert_message

from fedsim.deploy import interventions, worker
from fedsim.deploy.interventions.client import NAMES, Runtime
from fedsim.engines.flower.process import task_identity

RUN, NODE, SECRET = 7, 42, b"s" * 32


def doubling():
    app = ClientApp()

    @app.train()
    def train(message, context):
        array = message.content["arrays"]["x"].numpy()
        at = ConfigRecord({"at": context.node_config["partition-id"]})
        return Message(RecordDict({"arrays": ArrayRecord({"x": Array(2 * array)}), "at": at}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        raise ZeroDivisionError("no examples" + 5000 * ".")

    @app.query()
    def query(message, context):
        return 5

    return app


def asking(kind, array=None):
    content = RecordDict({"arrays": ArrayRecord({"x": Array(np.arange(3.0) if array is None else array)})})
    with task_identity(RUN, 1):
        return Message(content, NODE, kind)


class Fake:
    """A SuperNode with one task."""

    def __init__(self, message):
        message.metadata.__dict__["_message_id"] = "m"
        self.message, self.pushed = message, []

    @contextlib.contextmanager
    def task(self):
        yield self if self.message else None

    def pull(self):
        return self.message, Context(RUN, NODE, {"partition-id": 3}, RecordDict(), {})

    def push(self, reply, failure=""):
        self.pushed.append((reply, failure))


@pytest.fixture(autouse=True)
def identity():
    with task_identity(RUN, NODE):
        yield


def test_nothing_to_do():
    fake = Fake(asking("train"))
    fake.message = None
    assert not worker.step(fake, doubling(), print)


def test_the_reply_is_handed_over():
    fake = Fake(asking("train"))
    assert worker.step(fake, doubling(), print)
    ((reply, failure),) = fake.pushed
    assert failure == ""
    assert reply.content["arrays"]["x"].numpy().tolist() == [0, 2, 4]
    assert reply.content["at"]["at"] == 3


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("evaluate", "ZeroDivisionError: no examples"),
        ("query", "TypeError: a client app must return a Message, got int"),
    ],
)
def test_what_an_app_raises_becomes_an_error_reply(kind, reason):
    fake, told = Fake(asking(kind)), []
    assert worker.step(fake, doubling(), told.append)
    ((reply, failure),) = fake.pushed
    assert reply.has_error()
    assert reply.error.reason == failure
    assert failure.startswith(reason)
    assert len(failure) <= worker.REASON_LENGTH
    assert told == [f"{kind} failed: {failure}"]


def test_a_reply_to_another_message_is_an_error():
    fake, other = Fake(asking("train")), asking("train")
    other.metadata.__dict__["_message_id"] = "other"
    worker.step(fake, lambda message, context: Message(RecordDict(), reply_to=other), print)
    assert "must return a reply to the message it got" in fake.pushed[0][1]


def test_an_interruption_passes_through():
    fake = Fake(asking("train"))

    def interrupted(message, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.step(fake, interrupted, print)
    assert fake.pushed == []


class Interface:
    """The interface of a SuperNode, without a server behind it."""

    def __init__(self):
        factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self.state, self.store = factory.state(), factory.objectstore_factory.store()
        self.state.set_node_id(NODE)
        run = Run.create_empty(RUN)
        run.fab_hash = self.fab = self.state.store_fab(Fab("", b"code that is never loaded", {}))
        self.state.store_run(run)
        context = Context(RUN, NODE, {"partition-id": 3}, RecordDict(), {}, run.series_id)
        self.state.set_run_series_context(run.series_id, context)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        app = create_app(factory, SECRET)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", ws="none"))

    def offer(self, message, *, seen_before_its_message=0.0):
        self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=RUN, fab_hash=self.fab)
        threading.Timer(seen_before_its_message, _insert_message, (message, self.state, self.store)).start()


@pytest.fixture
def interface():
    one = Interface()
    thread = threading.Thread(target=one.server.run)
    thread.start()
    while not one.server.started:
        assert thread.is_alive()
    yield one
    one.server.should_exit = True
    thread.join(5)


@pytest.fixture
def runtime(interface):
    with contextlib.closing(Runtime(f"127.0.0.1:{interface.port}", SECRET)) as one:
        yield one


def test_every_name_is_there():
    assert interventions.missing(NAMES) == []
    assert interventions.fits("client")


@pytest.mark.parametrize("size", [3, 2_000_000])
def test_flowers_own_interface_gives_the_task_and_takes_the_reply(interface, runtime, size):
    assert not worker.step(runtime, doubling(), print)
    array = np.arange(size, dtype=np.float32) - 5
    interface.offer(asking("train", array), seen_before_its_message=0.3)
    assert worker.step(runtime, doubling(), print)
    (reply,) = interface.state.get_messages_legacy(is_reply=True)
    assert reply.metadata.dst_node_id == 1
    assert interface.store.get(reply.metadata.message_id)
    (task,) = interface.state.get_tasks()
    assert task.status.sub_status == "completed"
    assert not worker.step(runtime, doubling(), print)


def test_an_error_gets_there_too(interface, runtime):
    interface.offer(asking("evaluate"))
    assert worker.step(runtime, doubling(), print)
    (reply,) = interface.state.get_messages_legacy(is_reply=True)
    assert reply.error.reason.startswith("ZeroDivisionError: no examples")
    (task,) = interface.state.get_tasks()
    assert task.status.sub_status == "failed"


def test_others_on_this_machine_cannot_take_a_task(interface):
    interface.offer(asking("train"))
    stranger = Runtime(f"127.0.0.1:{interface.port}", b"t" * 32)
    with contextlib.closing(stranger), pytest.raises(httpx.HTTPStatusError, match="401"):
        worker.step(stranger, doubling(), print)


def test_no_proxy_is_asked(interface, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with contextlib.closing(Runtime(f"127.0.0.1:{interface.port}", SECRET)) as runtime:
        assert not worker.step(runtime, doubling(), print)
