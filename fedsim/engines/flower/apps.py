"""fedsim as two Flower apps: a client that trains on a message, and a server that runs fedsim's own round loop.

The apps know no runtime. ``run_in_process`` puts them on the in-process grid.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.engines.engine import Cohorts, Job, client_key
from fedsim.engines.flower import messages as m
from fedsim.engines.flower.grid import ClientAppError, InProcessGrid
from fedsim.engines.flower.process import RUN_ID, SERVER_NODE, quiet_log, task_identity
from fedsim.engines.folding import alone, blocks, fold, join
from fedsim.errors import ClientError
from fedsim.records import Broadcast, ClientUpdate, CohortUpdate, Examples, Params, StackedUpdate
from fedsim.training import masking
from fedsim.training.client import train_client
from fedsim.training.evaluate import Scores, score
from fedsim.transforms.outgoing import outgoing, reading

CHUNK = 16  # messages under way at once; bounds the replies in memory, does not change the result


def client_app(job: Job) -> ClientApp:
    """A client: trains on every ``train`` message with the data of its node's ``partition-id``.

    Its state lives in ``context.state``, where every runtime of Flower keeps it between the node's messages; it is
    never in a message.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        held = m.read_state(context.state)
        broadcast, client, key = m.read_train(message.content, lambda _: masking.known(held))
        if client != context.node_config["partition-id"]:
            raise ValueError(f"got a message for client {client}, being {context.node_config['partition-id']}")
        state = masking.without_known(held) or job.strategy.local.init(broadcast.params)
        trained = train_client(job.work, broadcast, client, job.data.client(client), state=state, key=key)
        result = outgoing(job.compression, broadcast, trained, state, key)
        context.state = m.state_content({**result.state, **masking.remembered(broadcast.masks)})
        return Message(m.update_content(result, None if broadcast.probe else broadcast.masks), reply_to=message)

    return app


def server_app(loop: Callable[[Cohorts], None], cohorts: Callable[[Grid], Cohorts]) -> ServerApp:
    """A server: calls ``loop`` once, with the cohorts that ``cohorts`` makes of its grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        loop(cohorts(grid))

    return app


@dataclass(frozen=True)
class GridCohorts:
    """Cohorts whose clients are nodes of a grid.

    nodes: node id of each client.
    states: ``context.state`` by node, where the server can reach it. The round loop owns all client states, because it
        saves them with its checkpoints: they are laid down here before a client trains, and taken away after. So are
        the masks that a client knows already.
    """

    grid: Grid
    job: Job
    nodes: Sequence[int]
    states: MutableMapping[int, RecordDict]

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """See ``Cohorts.run_cohort``. Bytes are those of message contents as Flower serialises them."""
        packed, known = m.packed_for(broadcast, clients), masking.remembered(broadcast.masks)
        cohort = blocks(self.job.data.partition.offsets, clients)
        contents = {k: m.train_content(packed[k], k, client_key(key, k)) for block in cohort for k in block}
        laid = {k: states.get(k, {}) | ({} if k in broadcast.unaware else known) for k in clients}

        def results(block: Sequence[int]) -> Iterator[StackedUpdate]:
            for start in range(0, len(block), CHUNK):
                chunk = {k: contents[k] for k in block[start : start + CHUNK]}
                self.states.update({self.nodes[k]: m.state_content(laid[k]) for k in chunk})
                for client, content in self._exchange(chunk, broadcast.round):
                    update = self._update(content, broadcast, client, client_key(key, client))
                    yield alone(update, m.content_bytes(content))

        down = sum(m.content_bytes(content) for content in contents.values())
        parts = (fold(self.job, broadcast, results(block)) for block in cohort)
        return join(self.job, broadcast, parts, bytes_down=down)

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """See ``Cohorts.evaluate``; on the server, like in every engine."""
        return score(self.job.work.model, broadcast.params, broadcast.buffers, examples)

    def _exchange(self, contents: Mapping[int, RecordDict], round: int) -> Iterator[tuple[int, RecordDict]]:
        """Send every client its content and give back the contents of their replies, in the same order."""
        sent = {
            client: Message(content, self.nodes[client], MessageType.TRAIN, group_id=str(round))
            for client, content in contents.items()
        }
        replies = {r.metadata.reply_to_message_id: r for r in self.grid.send_and_receive(sent.values())}
        for client, message in sent.items():
            reply = replies.pop(message.metadata.message_id, None)
            if reply is None:
                raise ClientError(round, client, "no reply")
            if reply.has_error():
                cause = reply.error.cause if isinstance(reply.error, ClientAppError) else None
                raise ClientError(round, client, str(reply.error.reason)) from cause
            yield client, reply.content

    def _update(self, content: RecordDict, broadcast: Broadcast, client: int, key: int) -> ClientUpdate:
        """The update of a reply, with the state that its client keeps."""
        state = masking.without_known(m.read_state(self.states.pop(self.nodes[client], RecordDict())))
        try:
            tickets, read = self.job.work.tickets is not None, reading(self.job.compression, broadcast, key)
            update = m.read_update(content, broadcast, client, tickets=tickets, reading=read)
            return replace(update, state=state)
        except ValueError as error:
            raise ClientError(broadcast.round, client, f"the reply is not a valid update: {error}") from error


def run_in_process(job: Job, loop: Callable[[Cohorts], None]) -> None:
    """Run the loop as a ServerApp and each client as a node of an in-process grid; what the loop raises comes out."""
    grid = InProcessGrid(client_app(job), job.data.num_clients)
    context = Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {})
    with quiet_log(), task_identity():
        server_app(loop, lambda own: GridCohorts(own, job, grid.nodes, grid.states))(grid, context)
