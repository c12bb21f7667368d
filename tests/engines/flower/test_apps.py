import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NoReturn

import flwr
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.logger import FLOWER_LOGGER
from flwr.supercore.task_identity import TaskIdentity

from fedsim import federation as f
from fedsim import params as p
from fedsim.engines.engine import Cohorts, Engine, Job
from fedsim.engines.flower import flower, messages
from fedsim.engines.flower.apps import CHUNK, GridCohorts, client_app
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import task_identity
from fedsim.engines.reference import reference
from fedsim.errors import ClientError
from fedsim.federation import Federation
from fedsim.records import ClientEvaluation, ClientUpdate, CohortUpdate, RoundRecord, ServerState

Make = Callable[..., Federation]
Results = tuple[list[RoundRecord], list[ClientEvaluation], ServerState]


def results(federation: Federation, engine: Engine, state: ServerState | None = None) -> Results:
    """All that a run leaves behind, but for the two things that may differ: time and the codec's frame."""
    rounds: list[f.RoundResult] = []
    final = f.run(federation, state or f.start(federation), engine, rounds.append)
    records = [replace(r.record, seconds=0.0, bytes_up=0, bytes_down=0) for r in rounds]
    return records, [e for r in rounds for e in r.evaluations], final


def job(federation: Federation) -> Job:
    return Job(federation.work, federation.data, federation.strategy, federation.on_nan, 2, 1)


def assert_equal(a: Results, b: Results) -> None:
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert p.same_bits(a[2].params, b[2].params)
    assert p.same_bits(a[2].buffers, b[2].buffers)
    assert a[2].clients.keys() == b[2].clients.keys() != set()
    assert all(p.same_bits(a[2].clients[k], b[2].clients[k]) for k in a[2].clients)


def test_three_rounds_equal_the_reference_bit_for_bit(federation: Make) -> None:
    made = federation()
    flower_results = results(made, flower())
    assert_equal(flower_results, results(made, reference()))
    assert len(flower_results[0]) == 4


def test_order_of_parameters_survives(federation: Make) -> None:
    assert list(results(federation(), flower())[2].params) == list(f.start(federation()).params)


def test_resuming_with_client_states_equals_an_unbroken_run(federation: Make) -> None:
    first = results(federation(rounds=2), flower())
    rest = results(federation(), flower(), first[2])
    whole = results(federation(), flower())
    assert_equal((first[0] + rest[0], first[1] + rest[1], rest[2]), whole)


def test_cohorts_of_several_chunks_equal_the_reference(federation: Make) -> None:
    made = federation(times=7, rounds=2)
    assert made.clients_per_round > 2 * CHUNK
    assert_equal(results(made, flower()), results(made, reference()))


def cohort(federation: Federation, engine: Engine, clients: list[int]) -> CohortUpdate:
    got: list[CohortUpdate] = []

    def loop(cohorts: Cohorts) -> None:
        state = f.start(federation)
        got.append(cohorts.run_cohort(f.broadcast(federation, state, 1), clients, {}, 5))

    engine.drive(job(federation), loop)
    return got[0]


def test_bytes_are_those_of_the_wire_format_and_a_small_frame(federation: Make) -> None:
    clients = [0, 3, 6]
    ours, plain = (cohort(federation(), engine, clients) for engine in (flower(), reference()))
    for name in ("bytes_up", "bytes_down"):
        assert 0 < getattr(ours, name) - getattr(plain, name) <= 200 * len(clients)


def test_an_empty_cohort_gives_nothing(federation: Make) -> None:
    nothing = cohort(federation(), flower(), [])
    assert (nothing.update, nothing.clients, nothing.bytes_up, nothing.bytes_down) == (None, (), 0, 0)


def test_a_diverged_client_fails_the_run(federation: Make) -> None:
    with pytest.raises(ClientError, match=r"round \d, client 1: training diverged: train_loss is nan"):
        results(federation(broken=(1,)), flower())


def test_a_diverged_client_is_skipped_like_in_the_reference(federation: Make) -> None:
    made = federation(broken=(1,), on_nan="skip")
    ours = results(made, flower())
    assert_equal(ours, results(made, reference()))
    assert any(record.skipped == (1,) for record in ours[0])


def test_a_client_that_raises_becomes_a_client_error_with_its_cause(federation: Make) -> None:
    made = federation()
    broken = replace(made.data, train=replace(made.data.train, labels=made.data.train.labels + 1))  # classes 1 and 2
    with pytest.raises(ClientError, match=r"^round 1, client \d: IndexError: Target 2 is out of bounds") as caught:
        results(replace(made, data=broken), flower())
    assert isinstance(caught.value.__cause__, IndexError)


def cohort_of(federation: Federation, app: ClientApp, grid: type[InProcessGrid] = InProcessGrid) -> CohortUpdate:
    """A round of clients 0, 2 and 4, whatever app they run."""
    nodes = grid(app, federation.data.num_clients)
    cohorts = GridCohorts(nodes, job(federation), nodes.nodes, nodes.states)
    with task_identity():
        return cohorts.run_cohort(f.broadcast(federation, f.start(federation), 1), [4, 0, 2], {}, 5)


def stranger(reply: Callable[[Message], Message]) -> ClientApp:
    app = ClientApp()
    app.train()(lambda message, context: reply(message))
    return app


def other_client(message: Message) -> Message:
    broadcast, client, _ = messages.read_train(message.content)
    update = ClientUpdate(client + 1, broadcast.params, broadcast.buffers, 1, {"train_loss": 1.0}, {})
    return Message(messages.update_content(update), reply_to=message)


@pytest.mark.parametrize(
    ("app", "what"),
    [
        (stranger(lambda m: Message(m.content, reply_to=m)), "the reply is not a valid update: not a fedsim message"),
        (stranger(lambda m: Message(RecordDict(), reply_to=m)), "the reply is not a valid update: the message has no"),
        (stranger(other_client), "the reply is not a valid update: the update is of client"),
        (stranger(lambda m: Message(Error(8, "the node is gone"), reply_to=m)), "the node is gone"),
        (ClientApp(), "ValueError: No train function registered with name 'default'"),
    ],
)
def test_a_reply_that_is_no_update_becomes_a_client_error(federation: Make, app: ClientApp, what: str) -> None:
    with pytest.raises(ClientError, match=rf"^round 1, client \d: {what}"):
        cohort_of(federation(), app)


class Forgetful(InProcessGrid):
    """Delivers in reverse and loses the reply of partition 2, as a grid of machines may."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(list(messages)[::-1], timeout=timeout)
        return [reply for reply in replies if reply.metadata.src_node_id != self.nodes[2]]


def test_replies_are_told_apart_by_their_message_and_a_lost_one_is_an_error(federation: Make) -> None:
    made = federation()
    with pytest.raises(ClientError, match=r"^round 1, client 2: no reply$"):
        cohort_of(made, client_app(job(made)), Forgetful)


def test_a_client_refuses_the_message_of_another(federation: Make) -> None:
    made = federation()
    packed = messages.pack_broadcast(f.broadcast(made, f.start(made), 1))
    grid = InProcessGrid(client_app(job(made)), 7)
    with task_identity():
        message = Message(messages.train_content(packed, 3, 1), grid.nodes[2], "train")
        reply = grid.send_and_receive([message])[0]
    assert "got a message for client 3, being 2" in str(reply.error.reason)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ClientError(1, 2, "x"), StopIteration(), OSError("disk full")])
def test_what_the_loop_raises_comes_out_unchanged(federation: Make, error: BaseException) -> None:
    def loop(cohorts: Cohorts) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        flower().drive(job(federation()), loop)
    assert caught.value is error


def test_ctrl_c_in_a_client_stops_the_run(federation: Make) -> None:
    made = federation()

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    rule = made.work.rule._replace(correct=interrupted)
    with pytest.raises(KeyboardInterrupt):
        results(replace(made, work=replace(made.work, rule=rule)), flower())


def test_flowers_globals_are_put_back(federation: Make, capfd: pytest.CaptureFixture[str]) -> None:
    before = FLOWER_LOGGER.level, FLOWER_LOGGER.handlers[:], vars(TaskIdentity).get("_task_id")
    results(federation(rounds=1), flower())
    with pytest.raises(ClientError):
        results(federation(broken=tuple(range(7))), flower())
    assert (FLOWER_LOGGER.level, FLOWER_LOGGER.handlers, vars(TaskIdentity).get("_task_id")) == before
    with pytest.raises(RuntimeError, match="not set"):
        _ = TaskIdentity.run_id
    assert capfd.readouterr() == ("", "")


def test_the_table_needs_no_flwr_and_the_engine_no_ray() -> None:
    code = (
        "import sys; from fedsim.engines.table import ENGINES; ENGINES['flower']().describe();"
        "assert 'flwr' not in sys.modules;"
        "import fedsim.engines.flower.apps; assert 'flwr' in sys.modules and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_describe_names_the_version_of_flower() -> None:
    assert flower().describe() == {"name": "flower", "runtime": "in-process", "processes": 1, "flwr": flwr.__version__}
