"""The two baselines of a federation: all of its data in one place, and each client on its own.

Both train the same model from the same start on the federation's own training examples, with the same optimizer, batch
size, epochs per round and rounds, and are tested on the same held-out examples. Nothing of a model stays with a client,
since there is but one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsim import rng
from fedsim.engines.engine import Engine
from fedsim.federation import Federation, RoundResult, run, start, with_spread
from fedsim.records import ClientEvaluation, Partition, RoundRecord, ServerState

Line = tuple[RoundRecord, tuple[ClientEvaluation, ...]]  # what a round adds to a run folder


def centralised(federation: Federation) -> Federation:
    """The federation in which one client holds the examples of all; every client's held-out examples stay its own.

    One round is ``local_epochs`` passes over all examples, whatever share of the clients the federation samples.
    """
    held = federation.data.partition
    together = Partition(offsets=np.array([0, len(held.indices)]), indices=held.indices)
    data = replace(federation.data, partition=together)
    return _of_one(replace(federation, data=data))


def _of_one(federation: Federation) -> Federation:
    work = replace(federation.work, kept=(), tickets=None)
    return replace(federation, work=work, clients_per_round=1, sampling="fixed", compression=None)


def train_centralised(
    federation: Federation, engine: Engine, on_round: Callable[[RoundRecord], None]
) -> tuple[list[Line], ServerState]:
    """Train on all data in one place: the lines of every round, and the final state."""
    return _trained(centralised(federation), engine, on_round)


@dataclass(frozen=True)
class Alone:
    """One client's training: a record and the evaluation on its own held-out examples, if it has any, per round."""

    client: int
    records: tuple[RoundRecord, ...]
    evaluations: tuple[ClientEvaluation, ...]


def alone(federation: Federation, client: int) -> Federation:
    """The federation that consists of one client; its held-out data are still everybody's, and the client's own."""
    data = federation.data
    own = replace(data, partition=_only(data.partition, client), test_partition=_only(data.test_partition, client))
    seed = rng.fold(federation.seed, "alone", client)
    return _of_one(replace(federation, seed=seed, data=own))


def _only(partition: Partition, client: int) -> Partition:
    indices = partition.client(client)
    return Partition(offsets=np.array([0, len(indices)]), indices=indices)


def each_alone(federation: Federation, engine: Engine) -> Iterator[Alone]:
    """Train every client on its own, one after another, in order."""
    for client in range(federation.data.num_clients):
        lines, _ = _trained(alone(federation, client), engine)
        evaluations = tuple(replace(e, client=client) for _, own in lines for e in own)
        yield Alone(client, tuple(record for record, _ in lines), evaluations)


def _trained(
    single: Federation, engine: Engine, on_round: Callable[[RoundRecord], None] | None = None
) -> tuple[list[Line], ServerState]:
    """Run a federation of one; nothing is sent, and of a round nothing but its lines is kept."""
    lines: list[Line] = []

    def take(result: RoundResult) -> None:
        if result.record.round:
            record = replace(result.record, bytes_up=0, bytes_down=0)
            lines.append((record, result.evaluations))
            if on_round:
                on_round(record)

    return lines, run(single, start(single), engine, take)


def merged(all_alone: Sequence[Alone]) -> Iterator[Line]:
    """The rounds of all clients side by side, as the lines of a run folder.

    ``loss`` and ``accuracy`` are means over clients of their own models' on everybody's held-out data; the
    ``client_accuracy_*`` are of each client's own model on the client's own held-out data. ``sparsity`` and
    ``remaining`` are means, too: of one method, all prune in the same rounds. Nothing is sent.
    """
    for records in zip(*(one.records for one in all_alone), strict=True):
        round = records[0].round
        evaluations = tuple(e for one in all_alone for e in one.evaluations if e.round == round)
        record = RoundRecord(
            round=round,
            loss=_mean([r.loss for r in records]),
            accuracy=_mean([r.accuracy for r in records]),
            train_loss=_mean([r.train_loss for r in records]),
            clients=len(records),
            seconds=sum(r.seconds for r in records),
            bytes_up=0,
            bytes_down=0,
            sparsity=_mean([r.sparsity for r in records]),
            remaining={name: sum(r.remaining[name] for r in records) / len(records) for name in records[0].remaining},
        )
        yield with_spread(record, np.array([e.accuracy for e in evaluations])), evaluations


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
