"""What a run comes to: final and best metrics, totals, rounds to target."""

from collections.abc import Sequence
from dataclasses import dataclass
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
    best_round, best = None, float("-inf")
    for point in evaluated:
        if point.accuracy is None:
            continue
        if point.accuracy >= target:
            if best_round is None:
                return float(point.round)
            return best_round + (target - best) / (point.accuracy - best) * (point.round - best_round)
        best_round, best = point.round, max(best, point.accuracy)
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
        result |= {"target_accuracy": target, "rounds_to_target": rounds_to_target(points, target)}
    return result
