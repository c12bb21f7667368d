"""A worker process: trains tasks and scores examples until the pipe to its run is closed."""

import contextlib
import json
import pickle
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from fedsim.engines.folding import Part
from fedsim.engines.local.memory import Shared, read, write
from fedsim.engines.local.sharing import Range
from fedsim.engines.local.trainer import Task, Trainer, Watch, trainer
from fedsim.errors import FedsimError, RunError
from fedsim.records import Broadcast, Params
from fedsim.training.evaluate import Scores, score

SLOTS = 2  # tasks under way in a worker: one is trained while the next waits, so that it never waits for its run
READY = -1  # number of the first reply
NOBODY = b"\xff" * 8  # in the memory of the client a worker is at


@dataclass(frozen=True)
class Order:
    """What a worker is asked to do. ``slot`` says in which memory its states lie and its reply goes.

    broadcast: from ``memory.write``, in the memory of the round.
    task: blocks of clients to train, or a range of examples to score.
    states: from ``memory.write``, in the slot; of a training task.
    key: of the round.
    """

    number: int
    slot: int
    broadcast: bytes
    task: Task | Range
    states: bytes
    key: int


@dataclass(frozen=True)
class Reply:
    """A finished order: a record in the slot, or an error."""

    number: int
    slot: int
    record: bytes
    error: FedsimError | None


@dataclass(frozen=True)
class Memories:
    """Memory shared with a worker: of the job, of the round, of each slot, and of the client it is at."""

    job: Shared
    round: Shared
    slots: tuple[Shared, ...]
    at: Shared

    def described(self) -> Any:
        """Sizes and descriptors, for the command line."""
        return [[shared.size, shared.fd] for shared in (self.job, self.round, self.at, *self.slots)]

    def client(self) -> int | None:
        """The client that the worker is at, or was at last; None if it never was at one."""
        at = bytes(self.at.bytes()[:8])
        return None if at == NOBODY else int.from_bytes(at, "little")

    def fds(self) -> list[int]:
        """What a worker must inherit."""
        return [fd for _, fd in self.described()]


def main() -> None:
    """Run in a fresh interpreter, whose last argument is JSON: descriptor of the pipe, and of the memories."""
    # Ctrl-C reaches the whole group; the run decides, then closes the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    pipe, described = json.loads(sys.argv[-1])
    job, round, at, *slots = (Shared(size, fd) for size, fd in described)
    with contextlib.suppress(EOFError, ConnectionError):  # the run is over, or gone
        _serve(Connection(pipe), Memories(job, round, tuple(slots), at))


def _serve(pipe: Connection, memories: Memories) -> None:
    data, plan, mixes = pickle.loads(pipe.recv_bytes())
    own = trainer(read(data, memories.job, copy=False), plan, mixes=mixes)
    pipe.send(Reply(READY, 0, b"", None))
    while True:
        order: Order = pipe.recv()
        broadcast: Broadcast = read(order.broadcast, memories.round, copy=False)
        pipe.send(_done(own, broadcast, order, memories))


def _done(own: Trainer, broadcast: Broadcast, order: Order, memories: Memories) -> Reply:
    slot = memories.slots[order.slot]

    def watch(client: int) -> None:
        memories.at.bytes()[:8] = client.to_bytes(8, "little")

    found = answer(own, broadcast, order.task, read(order.states, slot, copy=True), order.key, watch=watch)
    if isinstance(found, FedsimError):
        return Reply(order.number, order.slot, b"", found)
    return Reply(order.number, order.slot, write(found, slot), None)


def answer(
    own: Trainer,
    broadcast: Broadcast,
    task: Task | Range,
    states: Mapping[int, Params],
    key: int,
    *,
    watch: Watch = lambda client: None,
) -> list[Part] | Scores | FedsimError:
    """What a process that works for a run makes of a task; see ``Trainer.train`` for what it is given.

    Returns:
        Parts of a cohort, or scores of a range of examples, or what went wrong.
    """
    try:
        if isinstance(task, Range):
            return score(own.job.work.model, broadcast.params, broadcast.buffers, task.of(own.job.data))
        return own.train(broadcast, task, states, key, watch)
    except FedsimError as error:
        return error
    except Exception as error:
        return RunError(f"a worker failed: {type(error).__name__}: {error}")
