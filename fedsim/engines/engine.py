"""What an engine is, and the part that all engines share: how results of single clients become a cohort's."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from fedsim.data.federated import FederatedData
from fedsim.errors import DivergedError
from fedsim.records import Broadcast, ClientUpdate, CohortUpdate, Examples, Params
from fedsim.rng import fold
from fedsim.strategies.strategy import Strategy, weight
from fedsim.training.client import LocalWork
from fedsim.training.evaluate import Scores

OnNan = Literal["fail", "skip"]

REMEDY = "lower train.optimizer.lr, or set train.on_nan: skip, and run again"


@dataclass(frozen=True)
class Job:
    """All an engine needs to train any cohort of one federation."""

    work: LocalWork
    data: FederatedData
    strategy: Strategy
    on_nan: OnNan


class Cohorts(Protocol):
    """What the round loop asks of a running engine."""

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """Train the clients (ascending) from the broadcast and aggregate what they return.

        states: of the clients that have one. key: of the round; client k trains with ``fold(key, "client", k)``.
        """

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """Score the broadcast model on every example."""


class Engine(Protocol):
    """Where cohorts run. An engine may wrap the whole loop, as Flower's server does."""

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """Get ready, call ``loop`` once with running cohorts, clean up whatever happens."""

    def describe(self) -> dict[str, Any]:
        """What environment.json says of this engine."""


def client_key(round_key: int, client: int) -> int:
    """Key of a client in a round."""
    return fold(round_key, "client", client)


def collect(
    job: Job, broadcast: Broadcast, updates: Iterable[ClientUpdate], *, bytes_up: Callable[[], int], bytes_down: int
) -> CohortUpdate:
    """Fold client updates, as they arrive, into the cohort's result.

    Args:
        job: strategy and rule for updates that are not finite.
        broadcast: what the clients started from; integer buffers (batch-norm counters) keep its values, since the
            mean of a count means nothing.
        updates: in ascending order of client, so that sums are always added up in the same order.
        bytes_up: called at the end, for engines that count while updates arrive.
        bytes_down: all clients together.

    Returns:
        The cohort's update. Metrics are means weighted by examples.

    Raises:
        DivergedError: an update or a training loss is not finite and the job says ``fail``.
    """
    aggregate = job.strategy.aggregator
    updates_sum, buffers_sum = aggregate.start(), aggregate.start()
    done: list[ClientUpdate] = []
    skipped: list[int] = []
    for result in updates:
        moved = _moved(result.buffers, broadcast.buffers)
        wrong = _not_finite(result, moved)
        if wrong and job.on_nan == "fail":
            raise DivergedError(broadcast.round, result.client, f"training diverged: {wrong} ({REMEDY})")
        if wrong:
            skipped.append(result.client)
            continue
        share = weight(job.strategy.weighting, result.num_examples)
        updates_sum = aggregate.add(updates_sum, result.update, share)
        buffers_sum = aggregate.add(buffers_sum, moved, share)
        done.append(_without_tensors(result))
    return CohortUpdate(
        update=aggregate.finish(updates_sum),
        buffers=_advanced(broadcast.buffers, aggregate.finish(buffers_sum)),
        clients=tuple(result.client for result in done),
        num_examples=tuple(result.num_examples for result in done),
        skipped=tuple(skipped),
        metrics=_mean_metrics(done),
        states={result.client: result.state for result in done if result.state},
        bytes_up=bytes_up(),
        bytes_down=bytes_down,
    )


def _not_finite(result: ClientUpdate, moved: Params) -> str | None:
    """What is NaN or infinite in a result, in words; None if nothing is."""
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            return f"{name} is {value}"
    for what, tensors in (("update", result.update), ("buffer", moved), ("state", result.state)):
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                return f"the {what} {name} is not finite"
    return None


def _moved(buffers: Params, before: Params) -> Params:
    """How far each floating-point buffer has moved; exactly 0 for one that has not, even if it holds an infinity."""
    floating = {name: b for name, b in buffers.items() if b.is_floating_point()}
    return {n: torch.zeros_like(b) if torch.equal(b, before[n]) else b - before[n] for n, b in floating.items()}


def _advanced(buffers: Params, moved: Params | None) -> Params | None:
    """Buffers after the mean move. What nobody moved, a frozen parameter say, stays bit for bit."""
    if moved is None:
        return None
    return {n: b + moved[n] if n in moved and bool(moved[n].any()) else b for n, b in buffers.items()}


def _without_tensors(result: ClientUpdate) -> ClientUpdate:
    """The small part of a result, so that memory does not grow with the cohort."""
    return ClientUpdate(result.client, {}, {}, result.num_examples, result.metrics, result.state)


def _mean_metrics(done: list[ClientUpdate]) -> dict[str, float]:
    total = sum(result.num_examples for result in done)
    names = done[0].metrics if done else ()
    return {n: sum(r.metrics[n] * r.num_examples for r in done) / total for n in names}
