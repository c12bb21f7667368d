"""The grid of another process, here of another thread: what matters goes through the socket all the same."""

import threading

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.deploy import relay
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.errors import RunError


@pytest.fixture
def grid():
    app = ClientApp()

    @app.query()
    def query(message, context):
        got = message.content["a"]["n"]
        return Message(RecordDict({"a": ConfigRecord({"n": got + context.node_id})}), reply_to=message)

    return InProcessGrid(app, 3)


@pytest.fixture
def link(grid, tmp_path, monkeypatch):
    word = b"w" * 32
    listener = relay.listening(tmp_path, word)
    monkeypatch.setenv(relay.SOCKET, str(listener.address))
    monkeypatch.setenv(relay.WORD, word.hex())
    other = threading.Thread(target=relay.answer, args=(grid, Context(5, 1, {}, RecordDict(), {})))
    other.start()
    with listener, relay.relayed(listener) as relayed:
        yield relayed
    other.join(5)
    assert not other.is_alive()


def messages(grid):
    return [Message(RecordDict({"a": ConfigRecord({"n": 10})}), node, "query") for node in grid.get_node_ids()]


def test_messages_go_there_and_replies_come_back(link):
    replies = link.send_and_receive(messages(link))
    assert [reply.content["a"]["n"] for reply in replies] == [12, 13, 14]


def test_pull_gives_what_has_come(link):
    ids = link.push_messages(messages(link))
    assert [reply.content["a"]["n"] for reply in link.pull_messages(ids[1:])] == [13, 14]
    assert link.pull_messages(ids[1:]) == []


def test_the_other_process_ends(tmp_path, grid):
    word = b"w" * 32
    listener = relay.listening(tmp_path, word)

    def leaves():
        with relay.Client(str(listener.address), authkey=word) as other:
            other.send((1, 1))

    thread = threading.Thread(target=leaves)
    thread.start()
    with listener, relay.relayed(listener) as link:
        thread.join()
        with pytest.raises(RunError, match="Flower's server process has ended"):
            link.get_node_ids()
