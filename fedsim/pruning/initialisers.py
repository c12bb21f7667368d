"""Other initial values for a lottery ticket: a control that tells whether its own mattered."""

import torch
from torch import Tensor

from fedsim import rng
from fedsim.pruning import masks
from fedsim.records import Params


def resampled(initial: Params, kept: Params, key: int) -> Params:
    """A ticket's surviving initial values, drawn anew for its entries: layer by layer, with replacement.

    Args:
        initial: the ticket's initial parameters.
        kept: its masks.
        key: of this draw; each layer draws from the key that its name makes of this one.

    Returns:
        Parameters: 0 where pruned, and as they were where no mask is.

    Raises:
        ValueError: the masks do not fit.

    Source: Frankle, Carbin 2019, arXiv:1803.03635, appendix on a ticket's initialisation. Differs: none known; that it
        is with replacement is our reading.
    """
    pruned = masks.applied(initial, kept)
    return {name: _drawn(pruned[name], kept[name], key, name) if name in kept else pruned[name] for name in pruned}


def _drawn(values: Tensor, mask: Tensor, key: int, name: str) -> Tensor:
    left = values[mask]
    which = rng.uniform(rng.fold(key, name), len(left), dtype=torch.float64) * len(left)
    drawn = values.clone()
    drawn[mask] = left[which.long().to(left.device)]
    return drawn
