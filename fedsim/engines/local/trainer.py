"""Training one task of a cohort by a plan: what this process, a worker or a Ray actor does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedsim import params as p
from fedsim import rng, wire
from fedsim.engines.engine import Job, client_key
from fedsim.engines.folding import Part, alone, fold
from fedsim.engines.local.plan import LARGEST_CHUNK, Plan
from fedsim.errors import ClientError, FedsimError
from fedsim.records import Broadcast, ClientUpdate, Indices, Params, Partition, StackedUpdate
from fedsim.training import masking
from fedsim.training.client import opened, train_client
from fedsim.training.stacked import Group, Trained, group_of, train_stacked
from fedsim.training.steps import Step, step_of
from fedsim.training.stopping import places
from fedsim.transforms.outgoing import outgoing

Task = Sequence[Sequence[int]]  # blocks of clients
Watch = Callable[[int], None]


@dataclass(frozen=True)
class Trainer:
    """A job and the way to do it.

    mixes: whether the model mixes the examples of a batch, as batch norm does; clients of a group then have one size.
    """

    job: Job
    plan: Plan
    step: Step
    mixes: bool

    def train(
        self,
        broadcast: Broadcast,
        task: Task,
        states: Mapping[int, Params],
        key: int,
        watch: Watch = lambda client: None,
    ) -> list[Part]:
        """One part for each block of a task; arguments as for :meth:`train_all`."""
        return list(self.train_all(broadcast, [task], states, key, watch))

    def train_all(
        self,
        broadcast: Broadcast,
        tasks: Sequence[Task],
        states: Mapping[int, Params],
        key: int,
        watch: Watch = lambda client: None,
    ) -> Iterator[Part]:
        """One part for each block of the tasks.

        Args:
            broadcast: on the job's device.
            tasks: from :func:`fedsim.engines.local.plan.tasks`.
            states: of the clients that have one.
            key: of the round.
            watch: told the first client of each group before it is trained.

        Raises:
            ClientError: a client's training failed, or diverged.
        """
        if self.job.work.stopping is not None or broadcast.probe:
            blocks = (block for task in tasks for block in task)
            yield from (fold(self.job, broadcast, self._plainly(broadcast, own, states, key, watch)) for own in blocks)
            return
        for portion in _portions(tasks):
            clients = [client for task in portion for block in task for client in block]
            drawn, done = self._group(broadcast, clients, states, key), 0
            for task in portion:
                count = sum(map(len, task))
                own, done = slice(done, done + count), done + count
                results = self._results(broadcast, clients[own], drawn.lanes(own.start, own.stop), key, watch)
                if len(task) == 1:  # one block, perhaps in several groups: fold each as it comes
                    yield fold(self.job, broadcast, results)
                    continue
                whole = list(results)  # several blocks are one chunk, which is in memory anyway
                yield from (fold(self.job, broadcast, _of(whole, set(block))) for block in task)

    def _results(
        self, broadcast: Broadcast, clients: Sequence[int], whole: Group, key: int, watch: Watch
    ) -> Iterator[StackedUpdate]:
        work, pool = self.job.work, self.job.data.train
        for start, end in groups(whole.sizes, self.plan.chunk, self.mixes):
            own = clients[start:end]
            watch(own[0])
            seeded = rng.torch_seeded(client_key(key, own[0])) if work.seeded else nullcontext()
            with _naming(broadcast.round, own), seeded:
                trained = train_stacked(work, self.step, broadcast, pool, whole.lanes(start, end))
            stacked = _stacked_update(broadcast, own, sizes_of(self.job.data.partition, own), trained)
            yield from self._sent(broadcast, stacked, whole.states[start:end], key)

    def _sent(
        self, broadcast: Broadcast, trained: StackedUpdate, states: Sequence[Params], key: int
    ) -> Iterator[StackedUpdate]:
        """What clients send of what they have trained; one by one if it is compressed. ``states``: from before."""
        if self.job.compression is None:
            yield trained
            return
        for lane, (client, state) in enumerate(zip(trained.clients, states, strict=True)):
            with _naming(broadcast.round, [client]):
                one = _lane(broadcast, trained, lane)
                update = outgoing(self.job.compression, broadcast, one, state, client_key(key, client))
            yield alone(update, wire.sent_up(update, broadcast))

    def _plainly(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int, watch: Watch
    ) -> Iterator[StackedUpdate]:
        """Each client in the plain loop: one that stops early knows only then how many steps it takes."""
        fresh = self.job.strategy.local.init(broadcast.params)
        for client in clients:
            watch(client)
            data, state = self.job.data.client(client), states.get(client) or fresh
            with _naming(broadcast.round, [client]):
                own = client_key(key, client)
                trained = train_client(self.job.work, broadcast, client, data, state=state, key=own)
                update = outgoing(self.job.compression, broadcast, trained, state, own)
            yield alone(update, wire.sent_up(update, broadcast))

    def _group(self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int) -> Group:
        """Batches, keys, states and starts of these clients."""
        work, partition, device = self.job.work, self.job.data.partition, self.job.data.train.labels.device
        keys = rng.fold_tensor(rng.as_tensor(rng.fold(key, "client")), torch.tensor(clients)).to(device)
        fresh = self.job.strategy.local.init(broadcast.params)  # nobody changes a state in place
        own = tuple(states.get(client) or fresh for client in clients)
        if work.tickets is None:
            sizes = sizes_of(partition, clients)
            rows = torch.from_numpy(rows_of(partition, clients, sizes)).to(device)
            return group_of(work, rows, sizes, keys, own)
        held = [self._parted(client) for client in clients]
        sizes, rows = tuple(len(trained) for trained, _ in held), pad_sequence([t for t, _ in held], batch_first=True)
        begun = []
        for client, (_, judged), state in zip(clients, held, own, strict=True):
            with _naming(broadcast.round, [client]):
                begun.append(opened(work, broadcast, self.job.data.train.take(judged.to(device)), state))
        opened_states, starts = zip(*begun, strict=True)
        return group_of(work, rows.to(device), sizes, keys, opened_states, starts=starts)

    def _parted(self, client: int) -> tuple[Tensor, Tensor]:
        """Where in the pool the examples lie that a client trains on, and those it is judged by."""
        rows = torch.from_numpy(self.job.data.partition.client(client))
        trained, judged = places(self.job.work.validation, len(rows), client)
        return rows[trained], rows[judged]


def trainer(job: Job, plan: Plan, *, mixes: bool) -> Trainer:
    """Make the trainer of a job, which lies on the device where it is to be trained.

    Raises:
        ValueError: the plan's path cannot take the model.
    """
    return Trainer(job, plan, step_of(job.work, plan.path, compiled=plan.compiled), mixes)


def groups(sizes: Sequence[int], chunk: int, one_size: bool) -> Iterator[tuple[int, int]]:
    """Ranges [start, end) of at most ``chunk`` clients; of one number of examples each if ``one_size``."""
    start = 0
    while start < len(sizes):
        end = min(start + chunk, len(sizes))
        if one_size:
            end = next((i for i in range(start, end) if sizes[i] != sizes[start]), end)
        yield start, end
        start = end


def _portions(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Tasks in portions of a few dozen clients, whose batches are drawn at one go: that costs little more than one."""
    portion: list[Task] = []
    for task in tasks:
        portion.append(task)
        if sum(len(block) for own in portion for block in own) >= LARGEST_CHUNK:
            yield portion
            portion = []
    if portion:
        yield portion


def sizes_of(partition: Partition, clients: Sequence[int]) -> tuple[int, ...]:
    """Numbers of examples of these clients."""
    ids = np.asarray(clients)
    return tuple((partition.offsets[ids + 1] - partition.offsets[ids]).tolist())


def rows_of(partition: Partition, clients: Sequence[int], sizes: Sequence[int]) -> Indices:
    """Where the clients' examples lie, int64 (clients, longest); a shorter row repeats its last entry."""
    position = np.minimum(np.arange(max(sizes)), np.asarray(sizes)[:, None] - 1)
    rows: Indices = partition.indices[partition.offsets[list(clients)][:, None] + position]
    return rows


def _stacked_update(
    broadcast: Broadcast, clients: Sequence[int], sizes: tuple[int, ...], trained: Trained
) -> StackedUpdate:
    return StackedUpdate(
        clients=tuple(clients),
        update=trained.update,
        buffers=trained.buffers,
        num_examples=sizes,
        metrics={"train_loss": trained.train_loss},
        states=trained.states,
        bytes_up=_bytes_up(broadcast, len(clients), trained),
        kept=trained.kept,
    )


def _bytes_up(broadcast: Broadcast, clients: int, trained: Trained) -> tuple[int, ...]:
    """What each client sends. Without masks of their own all send as much."""

    def of(lane: int) -> int:
        update, buffers, kept = (p.lanes(own, lane) for own in (trained.update, trained.buffers, trained.kept))
        return wire.update_bytes(update, buffers, ("train_loss",), masks=broadcast.masks, kept=kept)

    return tuple(map(of, range(clients))) if trained.kept else (of(0),) * clients


def _lane(broadcast: Broadcast, stacked: StackedUpdate, lane: int) -> ClientUpdate:
    """The result of one client (views)."""
    return ClientUpdate(
        client=stacked.clients[lane],
        update=p.lanes(stacked.update, lane),
        buffers=p.lanes(stacked.buffers, lane),
        num_examples=stacked.num_examples[lane],
        metrics={name: values[lane] for name, values in stacked.metrics.items()},
        state=p.lanes(stacked.states, lane),
        mask_version=masking.version(broadcast),
        kept=p.lanes(stacked.kept, lane),
    )


def _of(results: Sequence[StackedUpdate], block: set[int]) -> Iterator[StackedUpdate]:
    """The lanes of a block, which follow each other."""
    for result in results:
        lanes = [i for i, client in enumerate(result.clients) if client in block]
        if lanes:
            yield _cut(result, slice(lanes[0], lanes[-1] + 1))


def _cut(result: StackedUpdate, lanes: slice) -> StackedUpdate:
    clients = result.clients[lanes]
    return StackedUpdate(
        clients=clients,
        update=p.lanes(result.update, lanes),
        buffers=p.lanes(result.buffers, lanes),
        num_examples=result.num_examples[lanes],
        metrics={name: values[lanes] for name, values in result.metrics.items()},
        states=p.lanes(result.states, lanes),
        bytes_up=result.bytes_up[lanes],
        kept=p.lanes(result.kept, lanes),
    )


@contextmanager
def _naming(round: int, group: Sequence[int]) -> Iterator[None]:
    """Turn what goes wrong in a group's training into an error that names its client."""
    try:
        yield
    except FedsimError:
        raise
    except Exception as error:
        others = f" (or one of the {len(group) - 1} trained beside it)" if len(group) > 1 else ""
        raise ClientError(round, group[0], f"{type(error).__name__}: {error}{others}") from error
