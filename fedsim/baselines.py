"""Each client on its own: what a client reaches that takes part in no federation.

Every client trains the same model from the same start with the same optimizer, batch size, epochs per round and
rounds as in the federation, but takes part in every round, for nobody chooses it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedsim import rng
from fedsim.engines.engine import Engine
from fedsim.federation import Federation, RoundResult, run, start, with_spread
from fedsim.records import ClientEvaluation, Partition, RoundRecord


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
    return replace(federation, seed=seed, data=own, clients_per_round=1, sampling="fixed")


def _only(partition: Partition, client: int) -> Partition:
    indices = partition.client(client)
    return Partition(offsets=np.array([0, len(indices)]), indices=indices)


def each_alone(federation: Federation, engine: Engine) -> Iterator[Alone]:
    """Train every client on its own, one after another, in order."""
    for client in range(federation.data.num_clients):
        single, results = alone(federation, client), list[RoundResult]()
        run(single, start(single), engine, results.append)
        evaluations = tuple(replace(e, client=client) for result in results[1:] for e in result.evaluations)
        yield Alone(client, tuple(result.record for result in results[1:]), evaluations)


def merged(all_alone: Sequence[Alone]) -> Iterator[tuple[RoundRecord, tuple[ClientEvaluation, ...]]]:
    """The rounds of all clients side by side, as the lines of a run folder.

    ``loss`` and ``accuracy`` are means over clients of their own models' on everybody's held-out data; the
    ``client_accuracy_*`` are of each client's own model on the client's own held-out data. Nothing is sent.
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
        )
        yield with_spread(record, [e.accuracy for e in evaluations]), evaluations


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
