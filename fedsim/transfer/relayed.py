"""Parties as nodes of Flower: the server passes on frames that it cannot read, and knows no keys.

A party runs in a thread of its node's process and writes to a mailbox. Each message of the server brings the frames
that others have sent to this node; the reply takes along what the party has sent until it waits for more. So whatever
carries Flower's messages carries a transfer: the in-process grid, or SuperLink and SuperNodes on three machines.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import quiet_log, task_identity
from fedsim.errors import RunError, TransferError
from fedsim.transfer.links import GONE, Link, SealedLink

PASS = "query.party"  # type of messages
_RECORD = "fedsim.party"
REPLY_S = 20.0  # a party that still calculates says so, so that nobody takes it for dead
AT_ONCE_S = 0.02  # in one process nodes take turns, and one may wait for what another has to do first

Frames = list[tuple[str, bytes]]  # whom a frame is for, or who sent it
Exchange = Callable[[Mapping[int, RecordDict]], Mapping[int, RecordDict]]  # by node


class Mailbox:
    """What a party has sent and not been relieved of, and what has come for it. role: of the party."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._changed = threading.Condition()
        self._out: Frames = []
        self._in: dict[str, list[bytes]] = {}
        self._closed: set[str] = set()
        self._links: set[str] = set()
        self._waiting = False

    def link(self, peer: str) -> Link:
        """The party's end of what it says to another one."""
        with self._changed:
            self._links.add(peer)
            self._in.setdefault(peer, [])
        return _MailLink(self, peer)

    def turn(self, frames: Frames, wait_s: float) -> tuple[Frames, bool]:
        """Bring frames; take along what the party sends until it waits for more, or for at most so many seconds.

        Returns:
            Frames with whom they are for, and whether the party has finished.
        """
        with self._changed:
            for sender, frame in frames:
                self._in.setdefault(sender, []).append(frame)
                self._waiting = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self.over, wait_s)
            taken, self._out = self._out, []
            return taken, self.over

    @property
    def over(self) -> bool:
        """Whether all links are closed."""
        return bool(self._links) and self._closed >= self._links

    def _put(self, peer: str, frame: bytes) -> None:
        with self._changed:
            if peer in self._closed:
                raise TransferError(GONE)
            self._out.append((peer, frame))

    def _take(self, peer: str, timeout_s: float) -> bytes:
        end = time.monotonic() + timeout_s
        with self._changed:
            while not self._in[peer]:
                if peer in self._closed:
                    raise TransferError(GONE)
                self._waiting = True
                self._changed.notify_all()
                if not self._changed.wait(max(end - time.monotonic(), 0)) and time.monotonic() >= end:
                    raise TransferError(f"no message within {timeout_s:g} s")
            self._waiting = False
            return self._in[peer].pop(0)

    def _close(self, peer: str) -> None:
        with self._changed:
            self._closed.add(peer)
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nobody will come any more: whoever waits hears of it."""
        with self._changed:
            self._closed |= self._links
            self._changed.notify_all()


class _MailLink:
    """One end of a link through a mailbox."""

    def __init__(self, mailbox: Mailbox, peer: str) -> None:
        self._mailbox, self._peer = mailbox, peer

    def put(self, frame: bytes) -> None:
        self._mailbox._put(self._peer, frame)

    def take(self, timeout_s: float) -> bytes:
        return self._mailbox._take(self._peer, timeout_s)

    def close(self) -> None:
        self._mailbox._close(self._peer)


def nothing() -> None:
    """Do nothing."""


def party_app(
    mailbox_of: Callable[[Context], Mailbox], wait_s: float = REPLY_S, over: Callable[[], None] = nothing
) -> ClientApp:
    """A node that is a party.

    wait_s: for what it sends, before a reply. over: called before the reply that says that the party has finished.
    """
    app = ClientApp()

    @app.query("party")
    def turn(message: Message, context: Context) -> Message:
        mailbox = mailbox_of(context)
        frames, finished = mailbox.turn(_frames(_record(message.content)), wait_s)
        content = _content(mailbox.role, frames)
        _record(content)["over"] = finished
        if finished:
            over()
        return Message(content, reply_to=message)

    return app


def relay(exchange: Exchange, nodes: Sequence[int], expected: Mapping[str, int] = MappingProxyType({})) -> int:
    """Be the server: pass on frames until every party has finished.

    Args:
        exchange: sends every node its content and returns all replies.
        nodes: of the parties.
        expected: role -> node, where that is known by its key.

    Returns:
        Number of bytes passed on.

    Raises:
        RunError: a node answers something else, or they all wait for each other.
    """
    roles: dict[str, int] = dict(expected)
    waiting: dict[int, Frames] = {node: [] for node in nodes}
    passed, over = 0, set[int]()
    while len(over) < len(nodes):
        asked = {node: _content("", waiting[node]) for node in nodes if node not in over}
        for node in asked:
            waiting[node] = []
        sent: list[tuple[str, str, bytes]] = []
        for node, content in exchange(asked).items():
            record = _record(content)
            role = str(record.get("role"))
            if roles.setdefault(role, node) != node:
                raise RunError(f"a node says that it is party {role}, which is another node")
            if record.get("over") is True:
                over.add(node)
            sent += [(role, peer, frame) for peer, frame in _frames(record)]
        for role, peer, frame in sent:
            passed += len(frame)
            if peer not in roles:
                raise RunError(f"party {role} sends to party {peer}, which no node is")
            waiting[roles[peer]].append((role, frame))
    return passed


def _content(role: str, frames: Frames) -> RecordDict:
    record = ConfigRecord(
        {"role": role, "peers": [peer for peer, _ in frames], "frames": [frame for _, frame in frames]}
    )
    return RecordDict({_RECORD: record})


def _record(content: RecordDict) -> ConfigRecord:
    record = content.get(_RECORD)
    if not isinstance(record, ConfigRecord):
        raise RunError(f"a node answered without a record {_RECORD}")
    return record


def _frames(record: ConfigRecord) -> Frames:
    peers, frames = record.get("peers"), record.get("frames")
    if not isinstance(peers, list) or not isinstance(frames, list) or len(peers) != len(frames):
        raise RunError(f"a record {_RECORD} must hold as many peers as frames")
    found = [(peer, frame) for peer, frame in zip(peers, frames, strict=True) if isinstance(frame, bytes)]
    if len(found) != len(frames):
        raise RunError(f"a record {_RECORD} must hold frames of bytes")
    return [(str(peer), frame) for peer, frame in found]


@contextlib.contextmanager
def in_process() -> Iterator[tuple[Link, Link]]:
    """Ends for parties a and b, sealed, whose frames go through Flower's messages in this process.

    The relay stops when both ends have been closed.
    """
    mailboxes = [Mailbox("a"), Mailbox("b")]
    raw = [mailboxes[0].link("b"), mailboxes[1].link("a")]
    ends = SealedLink(raw[0], True), SealedLink(raw[1], False)
    app = party_app(lambda context: mailboxes[int(context.node_config["partition-id"])], AT_ONCE_S)
    grid = InProcessGrid(app, len(mailboxes))

    def exchange(contents: Mapping[int, RecordDict]) -> Mapping[int, RecordDict]:
        replies = grid.send_and_receive([Message(content, node, PASS) for node, content in contents.items()])
        return {reply.metadata.src_node_id: reply.content for reply in replies}

    def serve() -> None:
        try:
            with quiet_log(), task_identity():
                relay(exchange, grid.nodes)
        finally:
            for mailbox in mailboxes:
                mailbox.abandon()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield ends
    finally:
        for mailbox in mailboxes:
            mailbox.abandon()
        thread.join(30)
