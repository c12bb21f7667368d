import time
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedsim.engines.flower.grid import ClientAppError, InProcessGrid
from fedsim.engines.flower.process import SERVER_NODE, quiet_log, task_identity


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with task_identity():
        yield


def echo() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


def ask(grid: InProcessGrid, *nodes: int, content: RecordDict | None = None, kind: str = "query") -> list[Message]:
    shared = content if content is not None else RecordDict()
    return grid.send_and_receive([Message(shared, node, kind) for node in nodes])


def test_flowers_own_fedavg_runs_unmodified() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        k, server_round = int(context.node_config["partition-id"]), message.content["config"]["server-round"]
        w = message.content["arrays"].to_numpy_ndarrays()[0]
        arrays = ArrayRecord({"w": Array(w + np.float64(server_round * (-2.0) ** k))})
        metrics = MetricRecord({"num-examples": k + 1, "loss": float(k)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        w = message.content["arrays"].to_numpy_ndarrays()[0]
        metrics = MetricRecord({"num-examples": 1, "mean": float(w.mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    with quiet_log():
        start = ArrayRecord({"w": Array(np.array([[1.0, -1.0, 0.5]]))})
        result = FedAvg().start(grid=InProcessGrid(app, 3), initial_arrays=start, num_rounds=2)
    step = (1 * 1 + 2 * -2 + 3 * 4) / 6  # of round 1, twice that in round 2
    np.testing.assert_allclose(result.arrays["w"].numpy(), [[1 + 3 * step, -1 + 3 * step, 0.5 + 3 * step]])
    assert result.train_metrics_clientapp[2]["loss"] == pytest.approx((0 + 2 * 1 + 3 * 2) / 6)
    assert result.evaluate_metrics_clientapp[2]["mean"] == pytest.approx(0.5 / 3 + 3 * step)


def test_what_a_client_does_to_its_message_reaches_nobody_else() -> None:
    app, seen = ClientApp(), []

    @app.query()
    def query(message: Message, context: Context) -> Message:
        config, array = message.content["config"], message.content["arrays"]["w"]
        seen.append((config["a"], list(config["list"]), array.numpy().tolist(), len(message.content)))
        config["a"], array.data, message.content["more"] = 99, b"", ConfigRecord()
        config["list"].append(4)
        message.metadata.group_id = "other"
        return Message(message.content, reply_to=message)

    content = RecordDict(
        {"config": ConfigRecord({"a": 1, "list": [2, 3]}), "arrays": ArrayRecord({"w": Array(np.ones(2))})}
    )
    messages = [Message(content, node, "query", group_id="mine") for node in (2, 3)]
    InProcessGrid(app, 2).send_and_receive(messages)
    assert seen == [(1, [2, 3], [1.0, 1.0], 2)] * 2
    assert content["config"] == {"a": 1, "list": [2, 3]}
    assert [m.metadata.group_id for m in messages] == ["mine", "mine"]


def counting() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        count = context.state.setdefault("count", ConfigRecord({"n": 0}))
        count["n"] += 1
        if "fail" in message.content:
            raise OSError("no disk")
        return Message(context.state, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state.clear()
        return Message(RecordDict(), reply_to=message)

    return app


def test_state_stays_with_its_node_and_out_of_replies() -> None:
    grid = InProcessGrid(counting(), 3)
    replies = ask(grid, 2, 3, 2, 2)
    assert [r.content["count"]["n"] for r in replies] == [1, 1, 2, 3]
    replies[3].content["count"]["n"] = 50
    assert ask(grid, 2)[0].content["count"]["n"] == 4
    assert set(grid.states) == {2, 3}
    ask(grid, 2, kind="train")
    assert set(grid.states) == {3}


def test_a_failed_message_leaves_the_state_alone() -> None:
    grid = InProcessGrid(counting(), 1)
    ask(grid, 2)
    assert ask(grid, 2, content=RecordDict({"fail": ConfigRecord()}))[0].has_error()
    assert ask(grid, 2)[0].content["count"]["n"] == 2


def test_an_exception_becomes_an_error_reply_that_holds_it() -> None:
    fail = RecordDict({"fail": ConfigRecord()})
    reply = ask(InProcessGrid(counting(), 1), 2, content=fail)[0]
    assert isinstance(reply.error, ClientAppError)
    assert isinstance(reply.error.cause, OSError)
    assert reply.error == ClientAppError(reply.error.cause)
    assert (reply.error.code, reply.error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "OSError: no disk")
    assert not reply.has_content()


def test_an_action_the_app_lacks_is_an_error_reply() -> None:
    assert "No evaluate function" in str(ask(InProcessGrid(echo(), 1), 2, kind="evaluate")[0].error.reason)


def test_an_app_that_returns_no_message_is_an_error_reply() -> None:
    app = ClientApp()
    app.query()(lambda message, context: None)  # type: ignore[arg-type, return-value]
    assert "must return a Message, got NoneType" in str(ask(InProcessGrid(app, 1), 2)[0].error.reason)


def test_an_app_that_answers_another_message_is_an_error_reply() -> None:
    app, first = ClientApp(), []

    @app.query()
    def query(message: Message, context: Context) -> Message:
        first.append(message)
        return Message(RecordDict(), reply_to=first[0])

    replies = ask(InProcessGrid(app, 2), 2, 3)
    assert [r.has_error() for r in replies] == [False, True]
    assert "must return a reply to the message it got" in str(replies[1].error.reason)
    assert replies[1].metadata.src_node_id == 3


def test_an_error_that_the_app_returns_is_passed_on() -> None:
    app = ClientApp()
    app.query()(lambda message, context: Message(Error(6, "not ready"), reply_to=message))
    assert ask(InProcessGrid(app, 1), 2)[0].error == Error(6, "not ready")


@pytest.mark.parametrize("node", [0, 1, 5, -1])
def test_a_message_to_no_node_gets_an_error_reply(node: int) -> None:
    error = ask(InProcessGrid(echo(), 3), node)[0].error
    assert error.code == ErrorCode.NODE_UNAVAILABLE
    assert error.reason == f"no node {node}; node ids are 2 to 4"


def test_replies_come_in_the_order_of_the_messages_with_their_ids() -> None:
    grid = InProcessGrid(echo(), 4)
    messages = [Message(RecordDict(), node, "query", group_id=str(node)) for node in (5, 2, 9, 4, 2)]
    replies = grid.send_and_receive(messages)
    assert [r.metadata.src_node_id for r in replies] == [5, 2, 9, 4, 2]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert {r.metadata.dst_node_id for r in replies} == {SERVER_NODE}
    assert len({m.metadata.message_id for m in [*messages, *replies]}) == 10
    assert [r.metadata.group_id for r in replies] == ["5", "2", "9", "4", "2"]


def test_pushed_messages_are_answered_at_once_and_pulled_once() -> None:
    grid = InProcessGrid(counting(), 3)
    first, second = grid.push_messages([grid.create_message(RecordDict(), "query", node, "g") for node in (2, 4)])
    assert set(grid.states) == {2, 4}
    assert [r.metadata.src_node_id for r in grid.pull_messages([second, "unknown"])] == [4]
    assert [r.metadata.src_node_id for r in grid.pull_messages([second, first])] == [2]


def test_after_the_timeout_no_further_message_is_delivered() -> None:
    app, started = ClientApp(), []

    @app.query()
    def query(message: Message, context: Context) -> Message:
        started.append(context.node_id)
        time.sleep(0.02)
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3)
    messages = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    assert grid.send_and_receive(messages, timeout=0.0) == []
    assert [r.metadata.src_node_id for r in grid.send_and_receive(messages, timeout=0.01)] == started == [2]


def test_context_says_who_the_node_is() -> None:
    app, seen = ClientApp(), []

    @app.query()
    def query(message: Message, context: Context) -> Message:
        configs = dict(context.node_config), dict(context.run_config)
        seen.append((context.run_id, context.node_id, *configs, TaskIdentity.node_id))
        context.run_config["lr"] = 5.0
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 3, run_config={"lr": 0.1})
    grid.set_run(Run.create_empty(7))
    ask(grid, 4, 4)
    assert seen == [(7, 4, {"partition-id": 2, "num-partitions": 3}, {"lr": 0.1}, 4)] * 2
    assert grid.run.run_id == 7


def test_a_million_nodes_cost_no_objects() -> None:
    grid = InProcessGrid(counting(), 1_000_000)
    assert ask(grid, 1_000_001)[0].content["count"]["n"] == 1
    assert len(grid.get_node_ids()) == 1_000_000
    assert len(grid.states) == 1


def test_a_server_that_waits_for_nodes_is_told_that_none_will_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsim.engines.flower.grid.PAUSE_S", 0.01)
    monkeypatch.setattr("flwr.serverapp.strategy.strategy_utils.sleep", lambda _: time.sleep(0.02))
    with quiet_log(), pytest.raises(RuntimeError, match="waits for more nodes than the 1 there are"):
        FedAvg().start(grid=InProcessGrid(echo(), 1), initial_arrays=ArrayRecord(), num_rounds=1)


def test_looking_at_the_nodes_is_no_waiting_without_a_pause_or_with_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = InProcessGrid(echo(), 2)
    assert [list(grid.get_node_ids()) for _ in range(50)] == [[2, 3]] * 50
    monkeypatch.setattr("fedsim.engines.flower.grid.PAUSE_S", 0.0)
    for _ in range(50):
        ask(grid, *grid.get_node_ids())


def test_a_grid_needs_a_node() -> None:
    with pytest.raises(ValueError, match="num_nodes must be >= 1, got 0"):
        InProcessGrid(echo(), 0)


def test_task_identity_is_restored_when_nested_and_after_an_error() -> None:
    with pytest.raises(KeyError), task_identity(9, 8):
        assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (1, 9, 8)
        raise KeyError
    assert (TaskIdentity.run_id, TaskIdentity.node_id) == (1, SERVER_NODE)
