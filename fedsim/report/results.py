"""What a run has come to.

The numbers follow from the rounds, by the same function that writes summary.json: while a run goes on, or after it was
killed, the summary in the folder is older than the rounds. From the summary come the facts that rounds do not hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

from fedsim.records import RoundRecord
from fedsim.runs import RunFolder
from fedsim.summary import Metrics, summarize


@dataclass(frozen=True)
class Point:
    """Held-out loss and accuracy after one round; round 0 is before training. All None: not evaluated."""

    round: int | None = None
    loss: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Results:
    """Headline numbers of one run, with its rounds.

    kind: federated, one of the two baselines (centralised, alone), or flower-app. planned: rounds that were asked for.
    rounds_to_target, bytes_to_target: None without a target, or if it was not reached.
    sparsity: share of prunable weights that is gone in the end; None if nothing was pruned.
    bytes_up, bytes_down, seconds: all rounds together. error: why the run failed.
    """

    name: str
    kind: str
    status: str
    planned: int
    rounds: tuple[RoundRecord, ...]
    initial: Point
    final: Point
    best: Point
    target: float | None
    rounds_to_target: float | None
    bytes_to_target: float | None
    sparsity: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    error: str | None

    @property
    def standing(self) -> str:
        """The status as far as a folder can tell: one that is killed leaves the same as one that goes on."""
        return "running or killed" if self.status == "running" else self.status

    @property
    def traffic(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down

    @property
    def epsilon(self) -> float | None:
        """Privacy spent up to the last round that states it."""
        return next((r.epsilon for r in reversed(self.rounds) if r.epsilon is not None), None)


def results(run: RunFolder) -> Results:
    """Read the summary and the rounds of a run, which may still be going on.

    Raises:
        DataError: a file of the run is damaged.
    """
    rounds, summary, config = run.rounds(), run.summary(), run.config()
    train = config.get("train") or {}
    target, first = train.get("target_accuracy"), summary.get("initial")
    initial = Metrics(0, first.get("loss"), first.get("accuracy")) if first else None
    found = summarize(rounds, initial, planned=_planned(config, summary), target=target)
    return Results(
        name=str(config.get("name") or run.path.name),
        kind=str(summary.get("kind") or "federated"),  # older folders do not say
        status=str(summary.get("status") or "running"),
        planned=found["rounds"],
        rounds=tuple(rounds),
        initial=_point(found["initial"]),
        final=_point(found["final"]),
        best=_point(found["best"]),
        target=target,
        rounds_to_target=found.get("rounds_to_target"),
        bytes_to_target=found.get("bytes_to_target"),
        sparsity=found.get("sparsity"),
        bytes_up=found["totals"]["bytes_up"],
        bytes_down=found["totals"]["bytes_down"],
        seconds=found["totals"]["seconds"],
        error=summary.get("error"),
    )


def _planned(config: Mapping[str, Any], summary: Mapping[str, Any]) -> int:
    """Rounds, or iterations of a transfer, that were asked for."""
    transfer = config.get("transfer") or {}
    return transfer.get("iterations") or (config.get("train") or {}).get("rounds") or summary.get("rounds") or 0


def _point(facts: Mapping[str, Any] | None) -> Point:
    return Point(**facts) if facts else Point()


def curve(found: Results, field: str, against: str) -> tuple[list[float], list[float]]:
    """One quantity along the run, only where it was measured.

    Args:
        found: the run.
        field: a field of RoundRecord; loss and accuracy begin with the model before training.
        against: "round", or "bytes" sent in both directions up to and including the round.

    Returns:
        x and y, of equal length, x ascending.
    """
    measured = [(float(r.round), getattr(r, field)) for r in found.rounds]
    if field in ("loss", "accuracy") and found.rounds and found.rounds[0].round > 0:
        measured.insert(0, (0.0, getattr(found.initial, field)))
    pairs = [(x, float(y)) for x, y in measured if y is not None]
    sent = _traffic(found) if against == "bytes" else {}
    return [sent.get(x, x) for x, _ in pairs], [y for _, y in pairs]


def _traffic(found: Results) -> dict[float, float]:
    """Bytes sent in both directions up to and including each round, from round 0."""
    total = accumulate(r.bytes_up + r.bytes_down for r in found.rounds)
    return {0.0: 0.0} | {float(r.round): float(sent) for r, sent in zip(found.rounds, total, strict=True)}


def mean_curve(several: Sequence[Results], field: str, against: str) -> tuple[list[float], list[float], list[float]]:
    """The mean over runs, and its spread, at the rounds at which all of them were measured.

    Args:
        several: at least two runs.
        field: as for :func:`curve`.
        against: as for :func:`curve`; for "bytes", x is the mean over the runs of what each had sent by that round.

    Returns:
        x, mean and sample standard deviation (divisor n - 1), of equal length, x ascending.
    """
    curves = [dict(zip(*curve(found, field, "round"), strict=True)) for found in several]
    rounds = [x for x in curves[0] if all(x in own for own in curves)]
    values = [[own[x] for own in curves] for x in rounds]
    sent = [_traffic(found) for found in several]
    xs = [fmean(own[x] for own in sent) for x in rounds] if against == "bytes" else rounds
    return xs, [fmean(v) for v in values], [stdev(v) for v in values]
