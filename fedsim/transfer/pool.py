"""Processes that share out work on large numbers. What they give does not depend on how many there are.

They are fresh interpreters, so no script is imported again, and import only what they are asked to call. What they
work on, a private key among it, reaches them by their pipe alone.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from fedsim.errors import TransferError

_CHUNKS = 4  # for each process, so that one that is slow, or has the harder part, gets fewer
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fedsim.transfer.pool import main; main()"
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Worker(NamedTuple):
    process: "subprocess.Popen[bytes]"
    pipe: Connection


class Pool:
    """So many processes, started when they are first needed. A context manager: leaving it ends them."""

    def __init__(self, workers: int = 1) -> None:
        """A pool; with one worker there is no process but this one.

        Raises:
            ValueError: fewer than one.
        """
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers
        self._running: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they do; they keep nothing that a kill could damage."""
        while self._running:
            worker = self._running.pop()
            worker.process.kill()
            worker.process.wait()
            worker.pipe.close()

    def map(self, function: Callable[..., Sequence[_Result]], items: Sequence[_Item], *shared: object) -> list[_Result]:
        """``function(items, *shared)``, called on parts of the items and joined in their order.

        Args:
            function: of a module; takes a list and ``shared``, and returns a result for each item.
            items: they, their results and ``shared`` can be pickled.
            shared: the same for all parts; sent once to each process.

        Raises:
            TransferError: a process ended.
            Exception: what the function raised. In both cases the processes are ended, and new ones start next time.
        """
        size = -(-len(items) // (_CHUNKS * self.workers))
        if self.workers == 1 or len(items) <= 1:
            return list(function(list(items), *shared))
        chunks = [list(items[at : at + size]) for at in range(0, len(items), size)]
        try:
            return [one for part in self._parts(pickle.dumps((function, shared)), chunks) for one in part]
        except BaseException:
            self.close()
            raise

    def _parts(self, work: bytes, chunks: list[list[Any]]) -> list[Sequence[Any]]:
        """What each chunk comes to. A worker has one at a time: neither end of a pipe waits for the other to read."""
        while len(self._running) < min(self.workers, len(chunks)):
            self._running.append(_started())
        waiting, found = deque(enumerate(chunks)), dict[int, Sequence[Any]]()
        busy: dict[Connection, int] = {}
        try:
            for _, pipe in self._running:
                pipe.send_bytes(work)
                _hand_out(pipe, waiting, busy)
            while busy:
                ready = wait(list(busy))
                for pipe in [one for one in busy if one in ready]:
                    result = pipe.recv()
                    if isinstance(result, Exception):
                        raise result
                    found[busy.pop(pipe)] = result
                    _hand_out(pipe, waiting, busy)
        except (EOFError, ConnectionError) as error:
            raise TransferError("a process that calculates ended; perhaps memory ran out") from error
        return [found[number] for number in range(len(chunks))]


def _hand_out(pipe: Connection, waiting: deque[tuple[int, list[Any]]], busy: dict[Connection, int]) -> None:
    if waiting:
        busy[pipe], chunk = waiting.popleft()
        pipe.send(chunk)


def _started() -> _Worker:
    here, there = Pipe()
    with there:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path), str(there.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    return _Worker(process, here)


def main() -> None:
    """What such a process does until its pipe is closed. Bytes say what to call from now on; lists are what on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the business of the process that started this one
    pipe = Connection(int(sys.argv[2]))
    function, shared = _nothing, ()
    with suppress(EOFError, ConnectionError):
        while True:
            received = pickle.loads(pipe.recv_bytes())
            if isinstance(received, tuple):
                function, shared = received
                continue
            pipe.send(_result(function, received, shared))


def _nothing(items: list[Any]) -> Sequence[Any]:
    return items


def _result(function: Callable[..., Sequence[Any]], items: list[Any], shared: tuple[Any, ...]) -> Any:
    try:
        return function(items, *shared)
    except Exception as error:
        return error
