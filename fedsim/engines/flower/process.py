"""What Flower keeps once per process, borrowed for the time of a run and put back: its task identity and its log."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from flwr.supercore.logger import FLOWER_LOGGER, ConsoleHandler
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1  # Flower's own id of the server


@contextmanager
def task_identity(run_id: int = RUN_ID, node_id: int = SERVER_NODE) -> Iterator[None]:
    """Be this node of this run: Flower stamps every new message with the identity of the process.

    May be nested. The identity is global, so two runs in two threads of one process would mix theirs up.
    """
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id  # None if unset; the properties raise
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, run_id, node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@contextmanager
def quiet_log() -> Iterator[None]:
    """Let Flower's logger pass on warnings only, and each line only once.

    It comes with a console handler of its own and propagates too, so any handler at the root doubles every line.
    """
    level, console = FLOWER_LOGGER.level, [h for h in FLOWER_LOGGER.handlers if isinstance(h, ConsoleHandler)]
    FLOWER_LOGGER.setLevel(logging.WARNING)
    for handler in console:
        FLOWER_LOGGER.removeHandler(handler)
    try:
        yield
    finally:
        FLOWER_LOGGER.setLevel(level)
        for handler in console:
            FLOWER_LOGGER.addHandler(handler)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Let the garbage collector pass over all that is there already.

    Some of Flower's strategies (QFedAvg, Bulyan) have it look at the whole process once for every reply, which takes
    longer than all the rest where torch is imported.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
