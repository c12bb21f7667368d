"""What a run comes to: final and best metrics, totals, rounds to target."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from fedsim.records import RoundRecord

Status = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Metrics:
    """Held-out loss and accuracy after a round; round 0 is the model before any training."""

    round: int
    loss: float | None
    accuracy: float | None


def rounds_to_target(evaluated: Sequence[Metrics], target: float) -> float | None:
    """After how many rounds the best accuracy so far first reached the target, interpolated between evaluations.

    With ``a_i = max_{j <= i} accuracy_j`` and the first i that has ``a_i >= target``:
    ``r_{i-1} + (target - a_{i-1}) / (a_i - a_{i-1}) * (r_i - r_{i-1})``; ``r_0`` if i = 0.

    Args:
        evaluated: in order of round; those without an accuracy are passed over.
        target: accuracy in (0, 1].

    Returns:
        Rounds, or None if the target was not reached.

    Source: McMahan et al. 2017, section 3 (monotonic curve, linear interpolation). Differs: none.

    >>> rounds_to_target([Metrics(0, None, 0.1), Metrics(1, None, 0.5), Metrics(2, None, 0.7)], 0.6)
    1.5
    """
    return _reached([(point.round, point.accuracy) for point in evaluated], target)


def bytes_to_target(rounds: Sequence[RoundRecord], evaluated: Sequence[Metrics], target: float) -> float | None:
    """Bytes sent in both directions when the best accuracy so far first reached the target.

    As :func:`rounds_to_target`, with what was sent up to and including round r_i in place of r_i. That is where the
    curve of accuracy by traffic crosses the target.

    Args:
        rounds: every round from the first one on.
        evaluated, target: as for :func:`rounds_to_target`; round 0 has sent nothing.

    Returns:
        Bytes, or None if the target was not reached.
    """
    total = accumulate(r.bytes_up + r.bytes_down for r in rounds)
    sent = {0: 0} | {r.round: so_far for r, so_far in zip(rounds, total, strict=True)}
    return _reached([(sent[point.round], point.accuracy) for point in evaluated], target)


def _reached(points: Iterable[tuple[int, float | None]], target: float) -> float | None:
    """Where on the first axis the running maximum of the second reaches the target."""
    best_at, best = None, float("-inf")
    for at, accuracy in points:
        if accuracy is None:
            continue
        if accuracy >= target:
            return float(at) if best_at is None else best_at + (target - best) / (accuracy - best) * (at - best_at)
        best_at, best = at, max(best, accuracy)
    return None


def summarize(
    rounds: Sequence[RoundRecord], initial: Metrics | None, *, planned: int, target: float | None
) -> dict[str, Any]:
    """The part of summary.json that follows from the rounds.

    Args:
        rounds: every round so far.
        initial: of the model before any training, if it was evaluated.
        planned: ``train.rounds``.
        target: ``train.target_accuracy``.
    """
    evaluated = [Metrics(r.round, r.loss, r.accuracy) for r in rounds if r.accuracy is not None]
    final = evaluated[-1] if evaluated else None
    best = max(evaluated, key=lambda point: point.accuracy or 0.0, default=None)
    result: dict[str, Any] = {
        "rounds": planned,
        "rounds_done": len(rounds),
        "accuracy": final and final.accuracy,
        "loss": final and final.loss,
        "final": final and vars(final),
        "best": best and vars(best),
        "initial": initial and vars(initial),
        "totals": {
            "bytes_up": sum(r.bytes_up for r in rounds),
            "bytes_down": sum(r.bytes_down for r in rounds),
            "seconds": sum(r.seconds for r in rounds),
            "client_updates": sum(r.clients for r in rounds),
            "skipped_updates": sum(len(r.skipped) for r in rounds),
            "failed_updates": sum(len(r.failed) for r in rounds),
        },
    }
    if target is not None:
        points = [initial, *evaluated] if initial else evaluated
        result |= {
            "target_accuracy": target,
            "rounds_to_target": rounds_to_target(points, target),
            "bytes_to_target": bytes_to_target(rounds, points, target),
        }
    pruned = last_pruned(rounds)
    if pruned is not None:
        result |= {"sparsity": pruned.sparsity, "remaining": dict(pruned.remaining)}
    return result


def last_pruned(rounds: Sequence[RoundRecord]) -> RoundRecord | None:
    """The last round of which a sparsity is known; None if nothing was pruned."""
    return next((record for record in reversed(rounds) if record.sparsity is not None), None)
