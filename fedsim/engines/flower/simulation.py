"""fedsim's own federation on Flower's Simulation Runtime: nodes that Flower makes, in actors of Ray.

The apps are those of ``apps``. Two things are different from the in-process grid. Node ids are random, so every node is
asked for its ``partition-id``. And a node's ``context.state`` is out of the server's reach, while the round loop owns
the clients' states, because it saves them with its checkpoints: so a state rides in the message to its client, and in
the reply. It counts as no traffic, since no client would send it.
"""

import functools
import logging
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from flwr.supercore.logger import FLOWER_LOGGER

from fedsim.engines.engine import Cohorts, Job
from fedsim.engines.flower.apps import GridCohorts, client_app
from fedsim.engines.flower.messages import STATE
from fedsim.engines.flower.process import quiet_log, task_identity
from fedsim.engines.local.engine import cores
from fedsim.engines.ray.cluster import attached
from fedsim.errors import RunError

POLL_S = 0.02  # Flower's own side looks for messages every 0.1 s
NODES_S = 60.0  # all nodes must be there in so long
_WHO, _CLIENT = "fedsim.who", "client"


def run_simulated(job: Job, loop: Callable[[Cohorts], None]) -> None:
    """Run the loop as a ServerApp on Flower's Simulation Runtime; what the loop raises comes out unchanged.

    Flower runs a ServerApp in a thread. It has ended when this returns, whatever happens.
    """
    raised: list[BaseException] = []
    started, stop, ended = threading.Event(), threading.Event(), threading.Event()

    def main(grid: Grid, context: Context) -> None:
        started.set()
        try:
            rides = Rides(grid, stop)
            grid.send_and_receive = rides.exchange  # type: ignore[method-assign]
            loop(GridCohorts(grid, job, rides.nodes(job.data.num_clients), rides.states))
        except BaseException as error:  # Flower would pass on an Exception only
            raised.append(error)
        finally:
            ended.set()

    packed = pickle.dumps((sys.path, pickle.dumps(job)))
    with tempfile.TemporaryDirectory() as folder, attached(None, cores()), quiet_log(), task_identity():
        FLOWER_LOGGER.setLevel(logging.CRITICAL)  # it warns of its own future, and tells errors twice
        path = Path(folder) / "job"
        path.write_bytes(packed)  # read once by each actor; Flower sends its client app with every message
        server = ServerApp()
        server.main()(main)
        try:
            run_simulation(server, riding_app(str(path)), job.data.num_clients, backend_config=_backend())
        except RuntimeError as error:
            if not raised:
                raise RunError(f"Flower's Simulation Runtime failed: {error.__cause__ or error}") from error
        finally:
            stop.set()
            if started.is_set():
                ended.wait()
    if raised:
        raise raised[0]


def _backend() -> Any:
    return {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}


# ---------------------------------------------------------------- server


class Rides:
    """States ride with the messages of a grid.

    states: of nodes, as ``GridCohorts`` lays them down before a client trains, and takes them away after.
    """

    def __init__(self, grid: Grid, stop: threading.Event) -> None:
        self.states: dict[int, RecordDict] = {}
        self._grid, self._stop = grid, stop

    def nodes(self, number: int) -> list[int]:
        """Node id of each client, once all nodes are there.

        Raises:
            RunError: they do not come, or do not say who they are.
        """
        end = time.monotonic() + NODES_S
        while len(found := list(self._grid.get_node_ids())) < number:
            self._wait()
            if time.monotonic() > end:
                raise RunError(f"Flower's Simulation Runtime has {len(found)} of {number} nodes after {NODES_S:.0f} s")
        clients: dict[int, int] = {}
        for reply in self.exchange([Message(RecordDict(), node, MessageType.QUERY) for node in found]):
            if reply.has_error():
                raise RunError(f"a node of Flower's Simulation Runtime does not answer: {reply.error.reason}")
            clients[int(reply.content.config_records[_WHO][_CLIENT])] = reply.metadata.src_node_id  # type: ignore[arg-type]
        return [clients[client] for client in range(number)]

    def exchange(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """In place of ``Grid.send_and_receive``. Waits for all replies, since a simulated node does not get lost."""
        sent = list(messages)
        for message in sent:
            message.content.update(self.states.pop(message.metadata.dst_node_id, {}))
        waiting, replies = set(self._grid.push_messages(sent)), list[Message]()
        while waiting:
            got = list(self._grid.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in got}
            replies += got
            if waiting:
                self._wait()
        for reply in replies:
            if reply.has_content() and STATE in reply.content:
                self.states[reply.metadata.src_node_id] = RecordDict({STATE: reply.content.pop(STATE)})
        return replies

    def _wait(self) -> None:
        if self._stop.wait(POLL_S):
            raise RunError("Flower's Simulation Runtime has ended")


# ---------------------------------------------------------------- clients


def riding_app(path: str) -> ClientApp:
    """A client of fedsim with its state in the messages. ``path``: of the pickled job; the app itself is small."""
    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        client = ConfigRecord({_CLIENT: int(context.node_config["partition-id"])})
        return Message(RecordDict({_WHO: client}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content.pop(STATE, None)
        context.state = RecordDict({STATE: state} if state is not None else {})
        try:
            reply = _client(path)(message, context)
        except Exception as error:  # Ray would make a traceback of two processes of it
            what = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, what), reply_to=message)
        reply.content.update(context.state)
        context.state = RecordDict()  # or every later message to this node would take it along
        return reply

    return app


@functools.cache
def _client(path: str) -> ClientApp:
    """The client app of a job, once for each actor."""
    torch.set_num_threads(1)
    folders, job = pickle.loads(Path(path).read_bytes())
    sys.path += [folder for folder in folders if folder not in sys.path]  # where the job's own modules are found
    return client_app(pickle.loads(job))
