"""Who is there: waiting for clients, asking who they are, and knowing which node of Flower's is which client."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedsim.deploy import contents as c
from fedsim.deploy.refusals import Say
from fedsim.errors import RunError

POLL_S = 0.05
JOIN_S = 60.0  # a client that does not say who it is by then is asked again
SAY_EVERY_S = 2.0
LOOK_EVERY_S = 1.0
LOST_S = 5.0  # Flower itself says sooner that a node is gone, as a rule


@dataclass(frozen=True)
class Post:
    """How the server reaches nodes.

    check: raises RunError if what carries the messages is gone; called between polls.
    """

    grid: Grid
    check: Callable[[], None]

    def online(self) -> set[int]:
        """Node ids that are online."""
        return set(self.grid.get_node_ids())

    def exchange(
        self, contents: Mapping[int, RecordDict], kind: str, timeout_s: float, group: str = ""
    ) -> dict[int, Message | str]:
        """Send every node its content; what it replies, or in words why it has not.

        A reply may be an error, Flower's own (the node is gone) or of the client. A node that has been away while its
        reply was waited for may have lost the message, and is not waited for to the end.
        """
        nodes = list(contents)
        end = time.monotonic() + timeout_s
        made = [Message(contents[node], node, kind, group_id=group) for node in nodes]
        sent = dict(zip(nodes, self.grid.push_messages(made), strict=True))
        waiting = {str(message_id): node for node, message_id in sent.items() if message_id}
        replies: dict[int, Message | str] = dict.fromkeys(nodes, f"no reply within {timeout_s:g} s")
        away = _Away(self)
        while waiting:
            for reply in self.grid.pull_messages(list(waiting)):
                node = waiting.pop(reply.metadata.reply_to_message_id, None)
                if node is not None:
                    replies[node] = reply
            lost = away.lost(set(waiting.values()))
            replies.update(dict.fromkeys(lost, "went away without a reply"))
            waiting = {message_id: node for message_id, node in waiting.items() if node not in lost}
            if not waiting or time.monotonic() >= end:
                break
            self.check()
            time.sleep(POLL_S)
        return replies


class _Away:
    """Since when nodes have been seen away, looked at once a second."""

    def __init__(self, post: Post) -> None:
        self._post, self._since, self._next = post, dict[int, float](), time.monotonic() + LOOK_EVERY_S

    def lost(self, nodes: set[int]) -> set[int]:
        """Those of the nodes that were first seen away some time ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LOOK_EVERY_S
            for node in nodes - self._post.online():
                self._since.setdefault(node, now)
        return {node for node in nodes if now - self._since.get(node, now) >= LOST_S}


def until(true: Callable[[], bool], wait_s: float, check: Callable[[], None], otherwise: str) -> None:
    """Wait.

    check: raises if there is nothing to wait for any more.

    Raises:
        RunError: it did not come true in so many seconds; says ``otherwise``.
    """
    end = time.monotonic() + wait_s
    while not true():
        check()
        if time.monotonic() >= end:
            raise RunError(f"gave up after {wait_s:g} s, {otherwise}")
        time.sleep(POLL_S * 4)


@dataclass
class Members:
    """The clients that have joined.

    clients: number of clients of the federation; their numbers are below it.
    registered: client -> node of its key; {} where nodes have no keys and are whatever client they say.
    sizes: examples of each client by the server's split.
    """

    post: Post
    facts: c.RunFacts
    clients: int
    registered: Mapping[int, int]
    sizes: Sequence[int]
    say: Say
    joined: dict[int, c.Member] = field(default_factory=dict)  # by node
    refused: set[int] = field(default_factory=set)  # nodes

    def here(self) -> dict[int, int]:
        """Client -> node, of the clients that are online and have joined; new nodes are asked first."""
        online = self.post.online()
        self.refused &= online  # whoever leaves and comes back is asked again
        self._ask(online - self.joined.keys() - self.refused)
        return {self.joined[node].client: node for node in sorted(online) if node in self.joined}

    def wait(self, enough: int, wait_s: float, wanted: Iterable[int] | None = None) -> dict[int, int]:
        """:meth:`here`, once at least ``enough`` of the ``wanted`` clients (None: of all) are.

        Raises:
            RunError: they have not come in ``wait_s``; names those that are missing.
        """
        among = range(self.clients) if wanted is None else sorted(wanted)
        end, said, last = time.monotonic() + wait_s, "", float("-inf")
        while True:
            here = self.here()
            missing = [client for client in among if client not in here]
            if len(among) - len(missing) >= enough:
                return here
            text = f"waiting for {_clients(missing)}: {len(among) - len(missing)} of {enough} needed are here"
            now = time.monotonic()
            if now >= end:
                raise RunError(f"gave up after {wait_s:g} s, {text.replace('waiting for', 'still missing')}")
            if text != said and now - last >= (SAY_EVERY_S if said else 0):
                self.say(text)
                said, last = text, now
            self.post.check()
            time.sleep(min(POLL_S * 4, max(end - now, 0)))

    def size(self, client: int) -> int:
        """Examples that a client said it has when it joined."""
        return next(member.num_examples for member in self.joined.values() if member.client == client)

    def _ask(self, nodes: Iterable[int]) -> None:
        contents = {node: c.with_facts(RecordDict(), self.facts) for node in sorted(nodes)}
        for node, reply in self.post.exchange(contents, c.JOIN, JOIN_S).items() if contents else ():
            if isinstance(reply, str) or reply.has_error():
                reason = reply if isinstance(reply, str) else str(reply.error.reason)
                self.say(f"node {node} does not say who it is: {reason}")
                continue
            try:
                member = c.read_member(reply.content)
            except ValueError as error:
                self._refuse(node, f"its answer is not valid: {error}")
                continue
            problem = self._problem(node, member)
            if problem:
                self._refuse(node, f"client {member.client}: {problem}")
            else:
                self._admit(node, member)

    def _problem(self, node: int, member: c.Member) -> str:
        """Why this member cannot take part; "" if it can."""
        if member.differs:
            return "; ".join(member.differs)
        if member.client >= self.clients:
            return f"the federation has clients 0 to {self.clients - 1}"
        if self.registered and self.registered.get(member.client) != node:
            owner = next((k for k, own in self.registered.items() if own == node), None)
            return f"its key is that of client {owner}" if owner is not None else "its key is not registered"
        if not member.own_data and member.num_examples != self.sizes[member.client]:
            return f"has {member.num_examples} examples where the split gives it {self.sizes[member.client]}"
        return ""

    def _admit(self, node: int, member: c.Member) -> None:
        others = [n for n, known in self.joined.items() if known.client == member.client and n != node]
        for other in others:  # without keys, a client that was started again is another node, and the old one seems
            del self.joined[other]  # to be online for some time yet: the newest claim counts
            self._refuse(other, f"node {other} from now on: another is client {member.client}")
        self.joined[node] = member
        self.say(f"client {member.client} joined ({member.num_examples} examples; {member.versions})")

    def _refuse(self, node: int, reason: str) -> None:
        self.refused.add(node)
        self.say(f"refused {reason}")


def _clients(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:20]))
    return f"client{'s' * (len(numbers) != 1)} {shown}{f' and {len(numbers) - 20} more' if len(numbers) > 20 else ''}"
