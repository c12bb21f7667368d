"""Both parties in this process, a thread each: the same code as on two machines, over queues."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fedsim.errors import RunError, TransferError
from fedsim.records import Params
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.channel import Channel, Record
from fedsim.transfer.links import Link, pair
from fedsim.transfer.multiplication import Multiplication
from fedsim.transfer.party import Outcome, take_part


class Iteration(NamedTuple):
    """What both parties have after an iteration.

    a, b: their parameters. loss: before it. sent_a, sent_b: bytes that each has sent so far.
    """

    number: int
    a: Params
    b: Params
    loss: float | None
    sent_a: int
    sent_b: int


class Ends(NamedTuple):
    """What the parties have in the end; bytes that each has sent in all, by kind of message."""

    a: Outcome
    b: Outcome
    sent_a: dict[str, int]
    sent_b: dict[str, int]


@dataclass(frozen=True)
class _Event:
    role: str
    what: str
    number: int = 0
    params: Params | None = None
    loss: float | None = None
    sent: int = 0
    outcome: Outcome | None = None
    error: BaseException | None = None


def run_together(
    a: Party,
    b: Party,
    agreed: Agreed,
    multiplications: tuple[Multiplication, Multiplication],
    on_iteration: Callable[[Iteration], None],
    *,
    records: tuple[Record | None, Record | None] = (None, None),
    links: tuple[Link, Link] | None = None,
) -> Ends:
    """Run both parties; ``on_iteration`` is called in this thread.

    Args:
        a, b, agreed: the parties, and what they agree on.
        multiplications: each one's end.
        on_iteration: after each iteration that both have finished.
        records: what watches the messages of each party, for tests.
        links: between them, if not a pair of queues.

    Raises:
        TransferError: what the party that failed first says.
    """
    events: queue.Queue[_Event] = queue.Queue()
    ends = links or pair()
    channels = [
        Channel(link, peer, record=record)
        for link, peer, record in zip(ends, ("party b", "party a"), records, strict=True)
    ]
    threads = [
        threading.Thread(target=_act, args=(party, agreed, channel, multiplication, events), daemon=True)
        for party, channel, multiplication in zip((a, b), channels, multiplications, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        outcomes = _watch(events, on_iteration)
    finally:
        for channel in channels:
            channel.close()
        for thread in threads:
            thread.join(30)
    return Ends(outcomes["a"], outcomes["b"], dict(channels[0].sent), dict(channels[1].sent))


def _act(
    party: Party, agreed: Agreed, channel: Channel, multiplication: Multiplication, events: "queue.Queue[_Event]"
) -> None:
    def told(number: int, params: Params, loss: float | None) -> None:
        sent = sum(channel.sent.values())
        events.put(_Event(party.role, "iteration", number, params, loss, sent))

    try:
        outcome = take_part(party, agreed, channel, multiplication, told)
    except BaseException as error:
        events.put(_Event(party.role, "failed", error=error))
    else:
        events.put(_Event(party.role, "done", outcome=outcome))


def _watch(events: "queue.Queue[_Event]", on_iteration: Callable[[Iteration], None]) -> dict[str, Outcome]:
    waiting: dict[int, _Event] = {}
    outcomes: dict[str, Outcome] = {}
    while len(outcomes) < 2:
        event = events.get()
        if event.error is not None:
            raise _as_told(event)
        if event.outcome is not None:
            outcomes[event.role] = event.outcome
            continue
        first = waiting.pop(event.number, None)
        if first is None:
            waiting[event.number] = event
            continue
        one, two = (first, event) if first.role == "a" else (event, first)
        assert one.params is not None and two.params is not None
        on_iteration(Iteration(event.number, one.params, two.params, one.loss, one.sent, two.sent))
    return outcomes


def _as_told(event: _Event) -> BaseException:
    error = event.error
    assert error is not None
    if isinstance(error, TransferError):
        return TransferError(f"party {event.role}: {error}")
    if isinstance(error, RunError):
        return error
    return error
