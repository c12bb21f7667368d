"""Lottery tickets: prune the trained weights of lowest magnitude, rewind the others, train again."""

from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from fedsim import params as p
from fedsim import rng
from fedsim.models import places
from fedsim.pruning import criteria, masks
from fedsim.pruning.initialisers import resampled
from fedsim.pruning.pruning import Change, Moment, Pruning, due, masks_of, with_masks
from fedsim.pruning.schedules import by_kind
from fedsim.records import Params

Rate = Annotated[float, Gt(0), Lt(1)]
Control = Literal["none", "reinit", "resample", "random-mask"]
Scope = Literal["layer", "global"]
REWOUND, REWOUND_BUFFERS = "rewound/", "rewound-buffers/"  # in the memory: what is rewound to


def lottery_ticket(
    *,
    rate: Rate = 0.2,
    every: Annotated[int, Gt(0)] = 5,
    output_rate: Annotated[float, Ge(0), Lt(1)] | None = None,
    conv_rate: Annotated[float, Ge(0), Lt(1)] | None = None,
    levels: Annotated[int, Gt(0)] | None = None,
    rewind: Annotated[int, Ge(0)] = 0,
    scope: Scope = "layer",
    control: Control = "none",
) -> Pruning:
    """Lottery tickets: every so many rounds prune a part of the remaining weights and rewind the others.

    After each ``every`` rounds the server removes, of what remains in each layer of the averaged model, the ``rate`` of
    lowest magnitude, and sets the rest back to what it was at the start: ``w <- m * w_0``. So a run trains
    ceil(rounds / every) networks, to be held against each other after as many rounds.

    Args:
        rate: in (0, 1), of the remaining weights, at each level.
        every: rounds that a network is trained for, >= 1. One-shot pruning has ``levels: 1`` and a high ``rate``.
        output_rate: of the last layer; null: half of ``rate``.
        conv_rate: of convolutions; null: ``rate``. The paper has 0.1 for Conv-2 and Conv-4, 0.15 for Conv-6.
        levels: how often to prune at most; null: as often as there are rounds.
        rewind: round whose weights survivors go back to, below ``every``; 0: the initial ones.
        scope: rank within each layer, or all weights together (``rate`` is that of all then).
        control: what to hold tickets against: ``reinit`` rewinds to newly drawn weights, ``resample`` deals the
            survivors' initial weights anew within each layer, ``random-mask`` removes as many of each layer at random.

    Raises:
        ValueError: ``rewind`` is not below ``every``, or given with ``reinit``.

    Source: Frankle, Carbin 2019, "The Lottery Ticket Hypothesis", arXiv:1803.03635, section 2 (strategy 1), appendix D
        and F; rewinding to a later round: Frankle et al. 2019, arXiv:1903.01611. Differs: the model that is pruned is
        the federation's average; ``train.schedule`` runs over all rounds and does not begin anew with each network.
    """
    if rewind >= every:
        raise ValueError(f"rewind must be below every ({every}), got {rewind}")
    if rewind and control == "reinit":
        raise ValueError(f"rewind goes with no control reinit, which draws new weights; got {rewind}")

    def rates(moment: Moment, kept: Params) -> dict[str, float]:
        shapes, head = {name: mask.shape for name, mask in kept.items()}, f"{places.head(moment.model)}.weight"
        of_conv = rate if conv_rate is None else conv_rate
        return by_kind(shapes, head, convolution=of_conv, dense=rate, output=output_rate)

    def before(moment: Moment) -> Change | None:
        if rewind and moment.round == rewind + 1:
            return Change(moment.params, moment.buffers, _remembered(moment.memory, moment.params, moment.buffers))
        return pruned(moment) if due(moment.round, moment.rounds, every) and below(moment.memory) else None

    def below(memory: Params) -> bool:
        found = masks_of(memory)
        return levels is None or found is None or found.version < levels

    def pruned(moment: Moment) -> Change:
        found = masks_of(moment.memory)
        kept = masks.ones(moment.params, masks.prunable(moment.params)) if found is None else found.kept
        scores = (
            criteria.random(moment.params, kept, rng.fold(moment.key, "mask"))
            if control == "random-mask"
            else criteria.magnitude(moment.params, kept)
        )
        if scope == "layer":
            remove = criteria.layerwise(kept, rates(moment, kept))
        else:
            remove = criteria.globally(scores, kept, round(rate * sum(masks.counts(kept).values())))
        kept = criteria.lowest(scores, kept, remove)
        weights, buffers = _recalled(moment.memory)
        if control == "reinit":
            weights, buffers = moment.fresh(rng.fold(moment.key, "reinit"))
        elif control == "resample":
            weights = resampled(weights, kept, rng.fold(moment.key, "resample"))
        return Change(p.masked(weights, kept), buffers, with_masks(moment.memory, kept), restarted=True)

    return Pruning(before, partial(_remembered, {}))


def _remembered(memory: Params, params: Params, buffers: Params) -> Params:
    """The memory, with these as what is rewound to."""
    weights = {REWOUND + name: tensor for name, tensor in params.items()}
    return {**memory, **weights, **{REWOUND_BUFFERS + name: tensor for name, tensor in buffers.items()}}


def _recalled(memory: Params) -> tuple[Params, Params]:
    def under(prefix: str) -> Params:
        return {name.removeprefix(prefix): tensor for name, tensor in memory.items() if name.startswith(prefix)}

    return under(REWOUND), under(REWOUND_BUFFERS)
