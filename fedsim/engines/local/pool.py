"""Worker processes that live as long as a run: who gets which task, and what happens when one of them dies."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from fedsim.engines.engine import Job
from fedsim.engines.folding import Part
from fedsim.engines.local.memory import Shared, read, size_of, write
from fedsim.engines.local.plan import Plan
from fedsim.engines.local.sharing import Range, scored, trained
from fedsim.engines.local.trainer import Task
from fedsim.engines.local.worker import NOBODY, READY, SLOTS, Memories, Order, Reply
from fedsim.errors import ClientError, FedsimError, RunError
from fedsim.params import of
from fedsim.records import Broadcast, CohortUpdate, Examples, Params
from fedsim.training.evaluate import Scores

DEATHS = 3  # of workers over one task, before the run gives up
SPARE_BYTES = 1 << 20  # of a slot, beside two models
DYING_S = 5  # a worker whose pipe is closed may take so long to end, to say how
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fedsim.engines.local.worker import main; main()"


@dataclass(frozen=True)
class _Worker:
    """A process, the pipe to it, the orders it has not answered, oldest first, and its free slots."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    memories: Memories
    orders: deque[Order] = field(default_factory=deque)
    free: list[int] = field(default_factory=lambda: list(range(SLOTS)))


class Pool:
    """Cohorts trained by worker processes. A context manager: leaving it ends them.

    Tasks are a function of the cohort, and parts are joined in the order of tasks, so results do not depend on the
    number of workers or on their speed. A worker that dies is replaced and its tasks are done again.
    """

    def __init__(self, job: Job, plan: Plan, *, mixes: bool, workers: int) -> None:
        self._job, self._plan = job, plan
        model = size_of(of(job.work.model))
        self._model_bytes = 2 * model + SPARE_BYTES
        self._data, self._round = Shared(size_of(job)), Shared(self._model_bytes)
        self._hello = pickle.dumps((write(job, self._data), plan, mixes))
        self._workers = [self._started() for _ in range(workers)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            _end(worker)

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """See ``Cohorts.run_cohort``."""

        def train(asked: Sequence[Task]) -> Iterator[Part]:
            return itertools.chain.from_iterable(self._results(broadcast, asked, states, key))

        return trained(self._job, self._plan, broadcast, clients, train)

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """See ``Cohorts.evaluate``."""
        return scored(
            self._job, broadcast, examples, len(self._workers), lambda asked: self._results(broadcast, asked, {}, 0)
        )

    def _results(
        self, broadcast: Broadcast, asked: Sequence[Task | Range], states: Mapping[int, Params], key: int
    ) -> Iterator[Any]:
        """What each order comes to, in the order asked; handed out and heard as workers get free."""
        sent = write(broadcast, self._round)
        waiting = deque(enumerate(asked))
        done: dict[int, Any] = {}
        deaths: Counter[int] = Counter()
        for number in range(len(asked)):
            while number not in done:
                self._hand_out(waiting, sent, states, key)
                for worker in self._ready():
                    try:
                        self._hear(worker, done)
                    except (EOFError, ConnectionError):
                        self._bury(worker, deaths, broadcast.round)
                        waiting.extendleft((order.number, order.task) for order in reversed(worker.orders))
            result = done.pop(number)
            if isinstance(result, FedsimError):
                raise result
            yield result

    def _hand_out(
        self, waiting: deque[tuple[int, Task | Range]], sent: bytes, states: Mapping[int, Params], key: int
    ) -> None:
        """Fill the free slots, a first one of every worker before a second one of any."""
        for busy in range(SLOTS):
            for worker in self._workers:
                if not waiting or len(worker.orders) > busy or not worker.free:
                    continue
                number, task = waiting.popleft()
                slot = worker.free.pop()
                own = {} if isinstance(task, Range) else {c: states[c] for block in task for c in block if c in states}
                order = Order(number, slot, sent, task, write(own, worker.memories.slots[slot]), key)
                worker.orders.append(order)
                with suppress(ConnectionError):  # a dead worker is found by listening to it
                    worker.pipe.send(order)

    def _ready(self) -> list[_Worker]:
        ready = wait([worker.pipe for worker in self._workers])
        return [worker for worker in self._workers if worker.pipe in ready]

    def _hear(self, worker: _Worker, done: dict[int, Any]) -> None:
        reply: Reply = worker.pipe.recv()
        if reply.number == READY:
            return
        slot = worker.memories.slots[reply.slot]
        done[reply.number] = reply.error or read(reply.record, slot, copy=True)
        worker.orders.popleft()
        worker.free.append(reply.slot)

    def _bury(self, worker: _Worker, deaths: Counter[int], round: int) -> None:
        """Replace a dead worker, unless its task has killed too many.

        Raises:
            RunError: it died before it could do anything.
            ClientError: it is the last of several that died over one task.
        """
        with suppress(subprocess.TimeoutExpired):
            worker.process.wait(DYING_S)
        _end(worker)
        how, client = _how(worker.process.returncode), worker.memories.client()
        first = worker.orders[0] if worker.orders else None
        scoring = first is not None and isinstance(first.task, Range)
        if client is None and not scoring:
            raise RunError(f"round {round}: a worker process ended ({how}) before it had trained a client")
        if first is not None:
            deaths[first.number] += 1
            if deaths[first.number] == DEATHS and (scoring or client is None):
                raise RunError(f"round {round}: {DEATHS} worker processes ended ({how}) while they scored the model")
            if deaths[first.number] == DEATHS and client is not None:
                raise ClientError(round, client, f"{DEATHS} worker processes ended ({how}) while they trained it")
        where = "while it scored the model" if scoring else f"at client {client}"
        again = "what it was doing is done again"
        warnings.warn(f"round {round}: a worker process ended ({how}) {where}; {again}", stacklevel=2)
        self._workers[self._workers.index(worker)] = self._started()

    def _started(self) -> _Worker:
        slots = tuple(Shared(self._model_bytes) for _ in range(SLOTS))
        memories = Memories(self._data, self._round, slots, Shared(8))
        memories.at.bytes()[:8] = NOBODY
        here, there = Pipe()
        arguments = [json.dumps(sys.path), json.dumps([there.fileno(), memories.described()])]
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno(), *memories.fds()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        there.close()
        with suppress(ConnectionError):
            here.send_bytes(self._hello)
        return _Worker(process, here, memories)


def _end(worker: _Worker) -> None:
    """A worker keeps nothing that a kill could damage."""
    worker.process.kill()
    worker.process.wait()
    worker.pipe.close()


def _how(returncode: int) -> str:
    if returncode == -9:
        return "signal 9, as when memory runs out"
    return f"signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
