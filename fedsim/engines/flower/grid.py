"""A Flower Grid inside one process: runs any Message-API ``ClientApp`` without Ray, SuperLink or sockets.

Flower's strategies and fedsim's own loop talk to it like to any other Grid. Node ids are a range and contexts are made
when a message arrives, so nodes that are never addressed, or keep no state, cost nothing.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
    UserConfig,
    UserConfigValue,
)
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedsim.engines.flower.process import RUN_ID, SERVER_NODE, task_identity

PAUSE_S = 0.5  # between two looks at the nodes, by somebody who waits for more
LOOKS = 5

Record = ArrayRecord | MetricRecord | ConfigRecord


class ClientAppError(Error):
    """The error of a reply whose client raised; ``cause`` is the exception itself, which only one process can share."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(cause).__name__}: {cause}")
        self.cause = cause


class InProcessGrid(Grid):
    """Delivers messages to one client app, one after another, each in the context of its node.

    - The client app is called with its own copy of the message, and the sender gets a copy of the reply: neither sees
      what the other changes afterwards. Bytes of arrays are immutable and shared.
    - A node's ``context.state`` persists between its messages, unless handling one fails: then it is as before.
      Changes to the rest of a context are forgotten.
    - What a client raises becomes an error reply with a :class:`ClientAppError`; ``KeyboardInterrupt`` and
      ``SystemExit`` pass through.
    - A message is answered while it is pushed. Nothing waits, so no time to live ever ends here.

    Messages can only be made under ``task_identity()``, which is a matter of the sender, not of the grid.

    Args:
        client_app: any app of Flower's Message API.
        num_nodes: number of nodes, >= 1. Node ``nodes[i]`` has partition-id i.
        run_config: the same for every node.
        run_id: of the run all messages belong to.
        watch: is shown every message and its reply. What it raises ends the run.

    Attributes:
        nodes: node ids, ascending; the same in every run.
        states: content of ``context.state`` of each node that has any. May be read and changed between messages.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        *,
        run_config: Mapping[str, UserConfigValue] | None = None,
        run_id: int = RUN_ID,
        watch: Callable[[Message, Message], None] | None = None,
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"num_nodes must be >= 1, got {num_nodes}")
        self.nodes = range(SERVER_NODE + 1, SERVER_NODE + 1 + num_nodes)
        self.states: dict[int, RecordDict] = {}
        self._client_app = client_app
        self._run_config = dict(run_config or {})
        self._run = Run.create_empty(run_id)
        self._watch = watch
        self._looked, self._looks = time.monotonic(), 0
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run; contexts of later messages carry its id."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message; the same as ``Message(...)``, which Flower prefers."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """Ids of all nodes, ascending; every node is always online.

        Raises:
            RuntimeError: this was called again and again, with pauses and no message in between. Flower's strategies
                wait like this for the nodes that they need, and here no more will ever come.
        """
        now = time.monotonic()
        self._looks = self._looks + 1 if now - self._looked >= PAUSE_S else 0
        self._looked = now
        if self._looks >= LOOKS:
            raise RuntimeError(f"the server waits for more nodes than the {len(self.nodes)} there are")
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Answer the messages in order, keep the replies for ``pull_messages``, and return the messages' ids."""
        replies = [self._answer(message) for message in messages]
        self._replies.update({reply.metadata.reply_to_message_id: reply for reply in replies})
        return [reply.metadata.reply_to_message_id for reply in replies]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Hand over the replies to these messages, in the order asked for. Each can be pulled once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Replies in the order of the messages.

        Args:
            messages: taken one by one, so a generator's messages need not exist together.
            timeout: in seconds. Messages not delivered by then are dropped without reply; a client is never stopped.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        return [self._answer(message) for message in itertools.takewhile(lambda _: time.monotonic() < end, messages)]

    def _answer(self, message: Message) -> Message:
        self._looks = 0
        self._give_id(message)
        if message.metadata.dst_node_id not in self.nodes:
            reason = f"no node {message.metadata.dst_node_id}; node ids are {self.nodes[0]} to {self.nodes[-1]}"
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, reason), reply_to=message)
        else:
            try:
                reply = self._run_client(message)
            except Exception as error:  # whatever it is: the sender decides what a failed client means
                reply = Message(ClientAppError(error), reply_to=message)
        self._give_id(reply)
        if self._watch is not None:
            self._watch(message, reply)
        return reply

    def _run_client(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        config: UserConfig = {"partition-id": node - self.nodes[0], "num-partitions": len(self.nodes)}
        state = _copied(self.states.get(node, RecordDict()))
        context = Context(self._run.run_id, node, config, state, dict(self._run_config))
        with task_identity(self._run.run_id, node):
            reply = self._client_app(_received(message), context)
        if not isinstance(reply, Message):
            raise TypeError(f"a client app must return a Message, got {type(reply).__name__}")
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise ValueError("a client app must return a reply to the message it got")
        if context.state:
            self.states[node] = context.state
        else:
            self.states.pop(node, None)
        return _received(reply) if reply.has_content() else reply

    def _give_id(self, message: Message) -> None:
        """Number the message, as a SuperLink would; senders match replies to messages by it."""
        message.metadata.__dict__["_message_id"] = str(next(self._ids))  # Flower has no setter


def _received(message: Message) -> Message:
    """The message as the other side gets it."""
    return make_message(copy.copy(message.metadata), _copied(message.content))


def _copied(content: RecordDict) -> RecordDict:
    """The same, no mutable object shared: Flower's strategies put one ``RecordDict`` into all their messages."""
    return RecordDict({name: _copied_record(record) for name, record in content.items()})


def _copied_record(record: Record) -> Record:
    """Copies of Arrays and lists; numbers, text and bytes cannot change.

    Written into the new record's own dict, since it would check key and type of each value once more: a quarter of
    what a message of eight arrays costs.
    """
    own = record.copy()
    own.__dict__["_data"] = {key: copy.copy(value) for key, value in record.items()}
    return own
