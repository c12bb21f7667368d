"""Somebody else's Flower app, run as it is on the in-process grid."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.logger import FLOWER_LOGGER

from fedsim.engines.flower.arrays import STYPE, lazy_arrays
from fedsim.engines.flower.grid import ClientAppError, InProcessGrid
from fedsim.engines.flower.process import RUN_ID, SERVER_NODE, quick_collections, quiet_log, task_identity
from fedsim.engines.flower.seeding import seeded
from fedsim.engines.flower.watching import Round, Watch
from fedsim.records import Params

KINDS = {"serverapp": ServerApp, "clientapp": ClientApp}


def watching(on_round: Callable[[Round], None]) -> Watch:
    """Something to see a run with; see :class:`Watch`."""
    return Watch(SERVER_NODE + 1, on_round)


def run(
    server: ServerApp,
    client: ClientApp,
    seen: Watch,
    *,
    clients: int,
    config: Mapping[str, UserConfigValue],
    seed: int | None,
    log: str | Path,
) -> None:
    """Call the ServerApp with a grid of so many nodes; what it raises comes out unchanged.

    Args:
        server, client: the two apps, of Flower's Message API.
        seen: sees the messages, and the strategies that are started.
        clients: >= 1. Node i has ``partition-id`` i and ``num-partitions`` clients.
        config: the run config, the same for both apps.
        seed: of the global generators, or None.
        log: file to which Flower's log is added.
    """

    def watch(message: Message, reply: Message) -> None:
        seen.message(message, reply)
        if reply.has_error() and isinstance(reply.error, ClientAppError):
            FLOWER_LOGGER.error("node %d raised", message.metadata.dst_node_id, exc_info=reply.error.cause)

    grid = InProcessGrid(client, clients, run_config=config, watch=watch)
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(config))
    with _logged(log), task_identity(), lazy_arrays(), quick_collections(), seeded(seed), seen.strategy_starts():
        try:
            server(grid, context)
        finally:
            seen.end()


def legacy(server: ServerApp) -> bool:
    """Whether a ServerApp has no main function: it was made for the API that Flower had before messages."""
    return getattr(server, "_main", None) is None


def tensors(record: ArrayRecord) -> tuple[Params, list[str]]:
    """The arrays as tensors, and the names of those that cannot be: other encodings, types that torch lacks."""
    found: Params = {}
    left: list[str] = []
    for name, array in record.items():
        try:
            if array.stype != STYPE:
                raise TypeError(array.stype)
            found[name] = torch.from_numpy(np.ascontiguousarray(array.numpy()).reshape(array.shape))
        except (TypeError, ValueError):
            left.append(name)
    return found, left


@contextmanager
def _logged(path: str | Path) -> Iterator[None]:
    """Flower's log goes to a file, from INFO up, and its own console handler is silent meanwhile."""
    with quiet_log():
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        propagate = FLOWER_LOGGER.propagate
        FLOWER_LOGGER.setLevel(logging.INFO)
        FLOWER_LOGGER.propagate = False
        FLOWER_LOGGER.addHandler(file)
        try:
            yield
        finally:
            FLOWER_LOGGER.removeHandler(file)
            FLOWER_LOGGER.propagate = propagate
            file.close()
