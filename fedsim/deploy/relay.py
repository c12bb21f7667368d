"""Flower's grid in another process: a ServerApp that Flower started does what the server asks it over a socket.

Flower's supported way to run a server is a process of its own that gets a grid. The round loop, its records and its
checkpoints stay in ``fedsim server``; this carries the three calls it needs to that process and back. The socket is
a file in a private folder, and both ends prove that they know a word that only they were given.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.engines.flower.process import task_identity
from fedsim.errors import RunError

SOCKET, WORD = "FEDSIM_RELAY", "FEDSIM_RELAY_WORD"  # environment of Flower's process
_CALLS = ("get_node_ids", "push_messages", "pull_messages")


def answer(grid: Grid, context: Context) -> None:
    """Be the other process: do what is asked until the connection ends."""
    word = bytes.fromhex(os.environ[WORD])
    with Client(os.environ[SOCKET], authkey=word) as link:
        link.send((context.run_id, context.node_id))
        with contextlib.suppress(EOFError):
            while True:
                call, arguments = link.recv()
                if call not in _CALLS:
                    raise ValueError(f"no such call: {call}")
                link.send(list(getattr(grid, call)(*arguments)))


class RelayedGrid(Grid):
    """A grid whose calls are made in another process."""

    def __init__(self, link: "Connection[Any, Any]") -> None:
        self._link = link

    def set_run(self, run: Run) -> None:
        """The run is that of the other process."""

    @property
    def run(self) -> Run:
        """Known to the other process alone."""
        raise NotImplementedError("the run is known to Flower's own process alone")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ids of the nodes that are online."""
        return list(self._ask("get_node_ids"))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send them; their ids."""
        return list(self._ask("push_messages", list(messages)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have come."""
        return list(self._ask("pull_messages", list(message_ids)))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, and wait for the replies."""
        waiting, found = [i for i in self.push_messages(messages) if i], []
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting:
            new = self.pull_messages(waiting)
            found += new
            answered = {reply.metadata.reply_to_message_id for reply in new}
            waiting = [i for i in waiting if i not in answered]
            if time.monotonic() >= end:
                break
            time.sleep(0.1 if waiting else 0)
        return found

    def _ask(self, call: str, *arguments: Any) -> Any:
        try:
            self._link.send((call, arguments))
            return self._link.recv()
        except (EOFError, OSError) as error:
            raise RunError("Flower's server process has ended") from error


@contextlib.contextmanager
def relayed(listener: Listener) -> Iterator[RelayedGrid]:
    """The grid of the process that connects."""
    with listener.accept() as link:
        run_id, node_id = link.recv()
        with task_identity(run_id, node_id):
            yield RelayedGrid(link)


def listening(folder: Path, word: bytes) -> Listener:
    """Where Flower's process finds this one; ``folder`` must be private."""
    return Listener(str(folder / "relay"), authkey=word)
