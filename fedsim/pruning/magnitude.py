"""Magnitude pruning while the model trains on: the weights of lowest magnitude go, little by little or at once."""

from typing import Annotated, Literal

from annotated_types import Gt, Lt

from fedsim import params as p
from fedsim import rng
from fedsim.pruning import criteria, masks
from fedsim.pruning.budgets import rescaled
from fedsim.pruning.pruning import Change, Moment, Pruning, masks_of, with_masks
from fedsim.pruning.schedules import cubic
from fedsim.records import Params

Scope = Literal["layer", "global", "filter"]
Then = Literal["fine-tune", "scratch"]


def magnitude(
    *,
    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.8,
    every: Annotated[int, Gt(0)] = 1,
    start: Annotated[int, Gt(0)] = 1,
    end: Annotated[int, Gt(0)] | None = None,
    scope: Scope = "layer",
    output: bool = True,
    then: Then = "fine-tune",
) -> Pruning:
    """Magnitude pruning: the server removes the weights of lowest magnitude, gradually, and training goes on.

    Before round t the sparsity rises to ``s (1 - (1 - (t - start) / (end - start))^3)``, 0 before ``start``, s from
    ``end`` on. With ``end = start`` all go at once, and the rounds after it fine-tune what is left.

    Args:
        sparsity: s in (0, 1), the share of prunable weights (all of two axes or more) that is 0 in the end.
        every: rounds from one pruning to the next, >= 1.
        start: rounds after which pruning begins.
        end: rounds after which the sparsity is reached, >= ``start``; null: after three quarters of all rounds.
        scope: rank within each ``layer``, all weights together (``global``), or within each ``filter``, as targeted
            dropout does in training.
        output: whether the last layer is pruned, too.
        then: ``fine-tune`` the weights that are left, or, once ``end`` is reached, begin anew under these masks from
            ``scratch``, with newly drawn weights whose deviation is that of as many inputs as are left.

    Raises:
        ValueError: ``end`` is below ``start``.

    Source: Zhu, Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1; Han et al. 2015, arXiv:1506.02626,
        for magnitudes; ``filter``: Gomez et al. 2019, arXiv:1905.13678; ``scratch``: Liu et al. 2019,
        arXiv:1810.05270. Differs: what is pruned is the federation's
        average, between rounds; the last sparsity is reached at ``end`` whatever ``every`` is.
    """
    if end is not None and end < start:
        raise ValueError(f"end must be >= start ({start}), got {end}")

    def before(moment: Moment) -> Change | None:
        last = max(start, 3 * moment.rounds // 4) if end is None else end
        done = moment.round - 1  # rounds
        if not (start <= done <= last and ((done - start) % every == 0 or done == last)):
            return None
        target = cubic(done, start, last, sparsity) if last > start else sparsity
        found = masks_of(moment.memory)
        kept = masks.ones(moment.params, _names(moment.params, output)) if found is None else found.kept
        pruned = _pruned(moment.params, kept, target)
        if masks.counts(pruned) == masks.counts(kept):
            return None
        memory = with_masks(moment.memory, pruned)
        if then == "scratch" and done == last:
            return Change(*_anew(moment, pruned), memory, restarted=True)
        return Change(p.masked(moment.params, pruned), moment.buffers, memory)

    def _pruned(params: Params, kept: Params, target: float) -> Params:
        if scope == "filter":
            return criteria.by_column(params, kept, target)
        scores = criteria.magnitude(params, kept)
        if scope == "layer":
            return criteria.lowest(scores, kept, criteria.to_sparsity(kept, target))
        remove = criteria.globally(scores, kept, criteria.to_overall(kept, target))
        return criteria.lowest(scores, kept, remove)

    return Pruning(before)


def _anew(moment: Moment, kept: Params) -> tuple[Params, Params]:
    """First parameters and buffers under these masks."""
    key = rng.fold(moment.key, "scratch")
    params, buffers = moment.fresh(key)
    drawn = {name: rescaled(mask, rng.fold(key, name), params[name].dtype) for name, mask in kept.items()}
    return {**params, **drawn}, buffers


def _names(params: Params, output: bool) -> tuple[str, ...]:
    names = masks.prunable(params)
    return names if output or len(names) == 1 else names[:-1]
