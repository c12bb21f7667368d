"""Training with few connections from the start to the end, of which some move to where gradients are large: RigL."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from fedsim import params as p
from fedsim import rng
from fedsim.pruning import criteria, masks
from fedsim.pruning.pruning import Change, Moment, Pruning, due, masks_of, with_masks
from fedsim.pruning.schedules import cosine
from fedsim.records import Params

Init = Literal["erdos-renyi", "uniform"]


def rigl(
    *,
    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.8,
    every: Annotated[int, Gt(0)] = 5,
    share: Annotated[float, Ge(0), Lt(1)] = 0.3,
    until: Annotated[float, Gt(0), Le(1)] = 0.75,
    init: Init = "erdos-renyi",
) -> Pruning:
    """RigL: random connections at first; every so many rounds the weakest move to where the gradient is largest.

    After t rounds, each layer drops ``share / 2 * (1 + cos(pi t / T))`` of its weights, those of lowest magnitude, and
    grows as many where the cohort's gradient is largest, from 0. So the sparsity of each layer never changes. A move
    costs one pass over the data of the next round's cohort, and its dense gradients.

    Args:
        sparsity: in (0, 1), the share of prunable weights (all of two axes or more) that is 0; of each layer one stays.
        every: rounds from one move to the next, >= 1.
        share: of a layer's weights that would move at the start, in [0, 1); 0: the random connections stay.
        until: T is this part of all rounds, in (0, 1]; after it nothing moves.
        init: ``erdos-renyi``: smaller layers are denser; ``uniform``: all have one sparsity.

    Source: Evci, Gale, Menick, Castro, Elsen 2020, "Rigging the lottery: making all tickets winners",
        arXiv:1911.11134, algorithm 1. Differs: rounds and the federation's average take the place of steps and weights;
        the gradient is of all examples of the cohort; ``uniform`` prunes the first layer, too.
    """

    def before(moment: Moment) -> Change | None:
        found = masks_of(moment.memory)
        if found is None:
            return _changed(moment, _drawn(moment.params, sparsity, init, rng.fold(moment.key, "mask")))
        moving = cosine(moment.round - 1, max(round(until * moment.rounds), 1), share)
        if moving == 0 or not due(moment.round, moment.rounds, every):
            return None
        kept, _ = criteria.dropped_and_grown(moment.params, moment.probe(moment.params), found.kept, moving)
        return None if p.same_bits(kept, found.kept) else _changed(moment, kept)

    return Pruning(before, probes=True)


def _changed(moment: Moment, kept: Params) -> Change:
    return Change(p.masked(moment.params, kept), moment.buffers, with_masks(moment.memory, kept))


def _drawn(params: Params, sparsity: float, init: Init, key: int) -> Params:
    """Random masks."""
    kept = masks.ones(params, masks.prunable(params))
    layers = {name: 1 - density for name, density in _densities(kept, sparsity, init).items()}
    return criteria.lowest(criteria.random(params, kept, key), kept, criteria.to_sparsity(kept, layers))


def _densities(kept: Params, sparsity: float, init: Init) -> dict[str, float]:
    if init == "uniform":
        return dict.fromkeys(kept, 1 - sparsity)
    return criteria.erdos_renyi({name: mask.shape for name, mask in kept.items()}, sparsity)
