"""How the updates of a cohort become one. An aggregator is a fold, so updates need not be kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fedsim.params import check_alike
from fedsim.records import Params


class Aggregator(NamedTuple):
    """A fold over updates; ``finish`` of an accumulator that got nothing is None.

    linear: the result is a weighted sum, so parts may be summed elsewhere, masked or encrypted on the way. A rule
        that needs single updates (a median, say) keeps them in its accumulator and says False.
    """

    start: Callable[[], Any]
    add: Callable[[Any, Params, float], Any]
    finish: Callable[[Any], Params | None]
    linear: bool


@dataclass(frozen=True)
class _Sum:
    total: dict[str, Tensor]  # owned by this accumulator; added to in place
    weight: float


def weighted_mean() -> Aggregator:
    """``sum_k w_k u_k / sum_k w_k``, added up in the order of arrival in the updates' own dtype."""
    return Aggregator(_nothing_yet, _added, _mean, linear=True)


def _nothing_yet() -> _Sum:
    return _Sum({}, 0.0)


def _added(acc: _Sum, update: Params, weight: float) -> _Sum:
    if not weight > 0:
        raise ValueError(f"weight must be > 0, got {weight}")
    if not acc.weight:
        return _Sum({name: tensor * weight for name, tensor in update.items()}, weight)
    check_alike(acc.total, update)
    for name, tensor in update.items():
        acc.total[name].add_(tensor, alpha=weight)
    return _Sum(acc.total, acc.weight + weight)


def _mean(acc: _Sum) -> Params | None:
    return {name: tensor / acc.weight for name, tensor in acc.total.items()} if acc.weight else None
