"""DropBlock, as a regulariser: where in a model it is put, and how strong it is there."""

from collections.abc import Iterator
from functools import partial

from torch import nn

from fedsim.models import places
from fedsim.models.layers.attaching import attach
from fedsim.models.layers.dropblock import DropBlock, Gamma, Normalise, Schedule
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Count, Rate, Regularizer, needed, unbound


def dropblock(
    *,
    drop: Rate = 0.1,
    block_size: Count = 3,
    groups: Count = 2,
    normalise: Normalise = "batch",
    gamma: Gamma = "paper",
    schedule: Schedule = "linear",
) -> Regularizer:
    """DropBlock: squares of feature maps are zeroed behind the last convolutions, the rest scaled by total / kept.

    It stands behind each convolution with its norm and activation; in residual blocks behind the norm of each
    convolution, and on the shortcut. A stage of convolutions ends where the map shrinks; the rate in the last stage is
    ``drop``, and in each one before it a quarter of that behind it.

    Args:
        drop: share of a map to be dropped in the last stage, at the end, in [0, 1).
        block_size: side of a square in pixels, clipped to the map. The paper has 7 on maps of 14 x 14.
        groups: how many stages have it, the last ones.
        normalise: the scale is that of the whole ``batch``, as in the paper, or of each ``example``. With ``batch``
            only clients with equally many examples are trained side by side.
        gamma: rate of squares by the ``paper``'s formula, which drops a little less than ``drop`` since squares
            overlap, or ``exact``.
        schedule: the rate grows in proportion to rounds, up to ``drop`` in the last (``linear``), or is ``constant``.

    Raises:
        ValueError: when bound, if the model has no convolutions.

    Source: Ghiasi, Lin, Le 2018, arXiv:1810.12890, algorithm 1, eq. 1 and section 3.1; rates by group as in the
        authors' ResNet. Differs: it is in blocks of two convolutions and in plain stacks, too; see
        :class:`fedsim.models.layers.dropblock.DropBlock`.
    """
    make = partial(DropBlock, block_size=block_size, normalise=normalise, gamma=gamma, schedule=schedule)
    return Regularizer("layers", partial(_bind, make, drop, groups) if drop else unbound)


def _bind(make: partial[DropBlock], drop: float, groups: int, model: nn.Module, objective: Objective) -> Objective:
    found = dict(_ends(model, groups))
    if not found:
        raise needed("convolutions")
    for path, later in found.items():
        attach(model.get_submodule(path), "dropblock", make(drop / 4**later))
    return objective


def _ends(model: nn.Module, groups: int) -> Iterator[tuple[str, int]]:
    """Paths of modules behind which it is put, with how many stages come after theirs."""
    units, blocks = places.convolutions(model), places.blocks(model)
    shortcuts = [block.shortcut for block in blocks if block.shortcut]
    for unit, later in places.last_stages(units, groups):
        if not any(f"{unit.layer}.".startswith(f"{path}.") for path in shortcuts):
            yield unit.end, later
    last = max((unit.stage for unit in units), default=0)
    for block in blocks:
        if block.shortcut and last - block.stage < groups:
            yield block.shortcut, last - block.stage
