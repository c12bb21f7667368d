"""How the updates of a cohort become one. An aggregator is a fold, so updates need not be kept."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fedsim.params import check_alike
from fedsim.records import Params


class Aggregator(NamedTuple):
    """A fold over updates; ``finish`` of an accumulator that got nothing is None.

    start: () -> accumulator of nothing.
    add: (accumulator, stacked updates (clients, *shape), weights > 0, one each) -> accumulator; adds lane after lane.
    merge: (accumulator, accumulator of what comes after) -> accumulator. Parts of a cohort are folded apart, perhaps
        in other processes, so accumulators can be pickled. Neither argument is used afterwards.
    linear: the result is a weighted sum, so parts may be summed elsewhere, masked or encrypted on the way. A rule
        that needs single updates (a median, say) keeps them in its accumulator and says False.
    """

    start: Callable[[], Any]
    add: Callable[[Any, Params, Sequence[float]], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Params | None]
    linear: bool


@dataclass(frozen=True)
class _Sum:
    total: dict[str, Tensor]  # owned by this accumulator; added to in place
    weight: float


def weighted_mean() -> Aggregator:
    """``sum_k w_k u_k / sum_k w_k``, added up in the order of arrival in the updates' own dtype."""
    return Aggregator(_nothing_yet, _added, _merged, _mean, linear=True)


def _nothing_yet() -> _Sum:
    return _Sum({}, 0.0)


def _added(acc: _Sum, updates: Params, weights: Sequence[float]) -> _Sum:
    if wrong := [weight for weight in weights if not weight > 0]:
        raise ValueError(f"weight must be > 0, got {wrong[0]}")
    for name, tensor in updates.items():
        if len(tensor) != len(weights):
            raise ValueError(f"{name}: needs one update for each of {len(weights)} weights, got {len(tensor)}")
    if not weights:
        return acc
    lanes = {name: tensor.unbind() for name, tensor in updates.items()}
    total, weight, first = acc.total, acc.weight, 0
    if weight:
        check_alike(total, {name: lane[0] for name, lane in lanes.items()})
    else:
        total = {name: lane[0] * weights[0] for name, lane in lanes.items()}
        weight, first = weights[0], 1
    for i in range(first, len(weights)):
        for name, lane in lanes.items():
            total[name].add_(lane[i], alpha=weights[i])
        weight += weights[i]
    return _Sum(total, weight)


def _merged(acc: _Sum, later: _Sum) -> _Sum:
    if not acc.weight or not later.weight:
        return acc if acc.weight else later
    check_alike(acc.total, later.total)
    for name, tensor in later.total.items():
        acc.total[name].add_(tensor)
    return _Sum(acc.total, acc.weight + later.weight)


def _mean(acc: _Sum) -> Params | None:
    return {name: tensor / acc.weight for name, tensor in acc.total.items()} if acc.weight else None
