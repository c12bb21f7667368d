"""What is seen of strategies and messages, beside what tests of whole apps see."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import quiet_log, task_identity
from fedsim.engines.flower.watching import Phase, Round, Watch


@pytest.fixture(autouse=True)
def _server() -> Iterator[None]:
    with task_identity(), quiet_log():
        yield


def client() -> ClientApp:
    app = ClientApp()

    @app.train()
    @app.evaluate()
    @app.query()
    def answer(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        metrics = MetricRecord({"num-examples": 2 * k + 1, "loss": float(-k)})
        arrays = ArrayRecord()
        if "arrays" in message.content:
            arrays = ArrayRecord([next(iter(message.content.array_records["arrays"].values())).numpy() + 1.0])
        return Message(RecordDict({"arrays": arrays, "m": metrics}), reply_to=message)

    return app


def watched() -> tuple[InProcessGrid, Watch, list[Round]]:
    rounds: list[Round] = []
    watch = Watch(2, rounds.append)
    return InProcessGrid(client(), 3, watch=watch.message), watch, rounds


def start() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.array([1.0, -1.0]))})


def test_means_are_weighted_by_examples_over_what_all_clients_report() -> None:
    replies: Any = {
        0: {"num-examples": 1, "loss": -2.0, "own": 1.0, "list": [1.0]},
        4: {"num-examples": 3, "loss": 4.0, "list": [2.0]},
        7: {"loss": 100.0},
    }
    assert Phase(replies).metrics() == {"loss": (-2.0 + 3 * 4.0) / 4}
    assert Phase(replies, aggregated={"a": 1.0}).metrics() == {"a": 1.0}
    assert Phase({0: {"loss": 1.0}}).metrics() == Phase().metrics() == {}
    assert Phase({0: {"num-examples": 0, "loss": 1.0}}).metrics() == {"loss": 0.0}


def test_a_strategy_is_seen_through_its_wrapper_and_left_as_it_was() -> None:
    grid, watch, rounds = watched()
    strategy = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 10.0, 3)
    before = dict(vars(strategy))
    with watch.strategy_starts():
        result = strategy.start(grid, start(), num_rounds=2)
    assert [r.number for r in rounds] == [1, 2]
    assert watch.strategies == ["DifferentialPrivacyServerSideFixedClipping"]
    assert watch.planned == 2
    assert watch.arrays is result.arrays
    assert vars(strategy).keys() == before.keys()
    assert rounds[1].train.aggregated == dict(result.train_metrics_clientapp[2])
    assert all(0 < r.ended - r.began < 60 for r in rounds)


def test_bytes_are_those_of_all_contents_of_a_round() -> None:
    grid, watch, rounds = watched()
    with watch.strategy_starts():
        FedAvg(fraction_evaluate=0.0).start(grid, start(), num_rounds=1)
    from flwr.common.serde import recorddict_to_proto

    config = {"arrays": start(), "config": ConfigRecord({"server-round": 1})}
    assert rounds[0].bytes_down == 3 * recorddict_to_proto(RecordDict(config)).ByteSize()
    replies = [
        {"arrays": ArrayRecord([np.zeros(2)]), "m": MetricRecord({"num-examples": 2 * k + 1, "loss": float(-k)})}
        for k in range(3)
    ]
    assert rounds[0].bytes_up == sum(recorddict_to_proto(RecordDict(reply)).ByteSize() for reply in replies)


@pytest.mark.parametrize(
    ("content", "group", "number"),
    [
        ({"config": ConfigRecord({"server-round": 4})}, "", 4),
        ({"any": ConfigRecord({"server-round": 4})}, "9", 4),
        ({}, "9", 9),
        ({}, "abc", None),
        ({}, "0", None),
        ({"config": ConfigRecord({"server-round": "4"})}, "", None),
    ],
)
def test_a_message_may_say_its_round(content: Any, group: str, number: int | None) -> None:
    grid, watch, rounds = watched()
    grid.send_and_receive([Message(RecordDict(content), 3, "train", group_id=group)])
    watch.end()
    watch.end()
    assert [r.number for r in rounds] == ([] if number is None else [number])
    assert watch.unnumbered == (number is None)
    if number is not None:
        assert rounds[0].train.replies == {1: {"num-examples": 3, "loss": -1.0}}


def test_queries_belong_to_a_round_but_are_neither_training_nor_evaluation() -> None:
    grid, watch, rounds = watched()
    grid.send_and_receive([Message(RecordDict(), 3, "query", group_id="1")])
    watch.end()
    assert (rounds[0].train, rounds[0].evaluate) == (Phase(), Phase())
    assert rounds[0].bytes_up > 0


def test_a_node_that_is_not_there_is_a_failure() -> None:
    grid, watch, _ = watched()
    grid.send_and_receive([Message(RecordDict(), 9, "train"), Message(RecordDict(), 2, "train")])
    assert (watch.messages, watch.answers) == (2, 1)
    assert watch.first_failure == "client 7 (node 9), train: no node 9; node ids are 2 to 4"


def test_what_the_watch_raises_ends_the_run() -> None:
    def watch(message: Message, reply: Message) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        InProcessGrid(client(), 1, watch=watch).send_and_receive([Message(RecordDict(), 2, "train")])
