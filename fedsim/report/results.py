"""What a run has come to.

The numbers follow from the rounds, by the same function that writes summary.json: while a run goes on, or after it was
killed, the summary in the folder is older than the rounds. From the summary come the facts that rounds do not hold.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
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

    planned: rounds the config asks for. rounds_to_target: None without a target, or if it was not reached.
    bytes_up, bytes_down, seconds: all rounds together. error: why the run failed.
    """

    name: str
    status: str
    planned: int
    rounds: tuple[RoundRecord, ...]
    initial: Point
    final: Point
    best: Point
    target: float | None
    rounds_to_target: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    error: str | None

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
    found = summarize(rounds, initial, planned=train.get("rounds") or 0, target=target)
    return Results(
        name=str(config.get("name") or run.path.name),
        status=str(summary.get("status") or "running"),
        planned=found["rounds"],
        rounds=tuple(rounds),
        initial=_point(found["initial"]),
        final=_point(found["final"]),
        best=_point(found["best"]),
        target=target,
        rounds_to_target=found.get("rounds_to_target"),
        bytes_up=found["totals"]["bytes_up"],
        bytes_down=found["totals"]["bytes_down"],
        seconds=found["totals"]["seconds"],
        error=summary.get("error"),
    )


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
    traffic = accumulate(r.bytes_up + r.bytes_down for r in found.rounds)
    xs: Iterable[float] = (r.round for r in found.rounds) if against == "round" else traffic
    measured = [(float(x), getattr(r, field)) for x, r in zip(xs, found.rounds, strict=True)]
    if field in ("loss", "accuracy") and found.rounds and found.rounds[0].round > 0:
        measured.insert(0, (0.0, getattr(found.initial, field)))
    pairs = [(x, float(y)) for x, y in measured if y is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]
