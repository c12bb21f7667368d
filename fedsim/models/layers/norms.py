"""The choice of normalisation, as one name for every model but those of sequences.

Batch norm mixes the examples of a batch and keeps running statistics (buffers), which differ between clients. The
others treat each example alone and keep nothing.
"""

from typing import Literal

from torch import nn

Norm = Literal["none", "batch", "group", "layer"]

_MAX_GROUPS = 32
_CHANNELS_PER_GROUP = 8


def norm_2d(name: Norm, channels: int) -> nn.Module:
    """Normalisation of feature maps (batch, channels, height, width), with a learned scale and shift per channel.

    Args:
        name: ``none`` (identity), ``batch``, ``group`` (see :func:`num_groups`), ``layer`` (one group of all channels).
        channels: >= 1.

    Returns:
        Module that keeps the shape.

    Raises:
        ValueError: unknown name.

    Source: Ioffe, Szegedy 2015, arXiv:1502.03167 (batch); Wu, He 2018, "Group Normalization", eq. 1 to 7,
        arXiv:1803.08494 (group; layer is its case of one group).
    """
    match name:
        case "none":
            return nn.Identity()
        case "batch":
            return nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(num_groups(channels), channels)
        case "layer":
            return nn.GroupNorm(1, channels)
    raise ValueError(f"norm must be none, batch, group or layer, got {name!r}")


def norm_1d(name: Norm, features: int) -> nn.Module:
    """Normalisation of hidden units (batch, features), with a learned scale and shift per unit.

    Args:
        name: as for :func:`norm_2d`; ``layer`` is over all units of an example, ``group`` over each group of them.
        features: >= 1.

    Returns:
        Module that keeps the shape.

    Raises:
        ValueError: unknown name.

    Source: as for :func:`norm_2d`; Ba, Kiros, Hinton 2016, "Layer Normalization", eq. 3, arXiv:1607.06450 (layer).
    """
    match name:
        case "none":
            return nn.Identity()
        case "batch":
            return nn.BatchNorm1d(features)
        case "group":
            return nn.GroupNorm(num_groups(features), features)
        case "layer":
            return nn.LayerNorm(features)
    raise ValueError(f"norm must be none, batch, group or layer, got {name!r}")


def num_groups(channels: int) -> int:
    """Groups of group norm: the most that divide ``channels``, at most 32, with at least 8 channels each; at least 1.

    Eight channels keep the statistics meaningful where the map is one pixel: a group of one number is always 0.

    Source: Wu, He 2018, table 3. Differs: the paper's default is 32 groups at every width.

    >>> [num_groups(c) for c in (1, 12, 16, 20, 64, 512)]
    [1, 1, 2, 2, 8, 32]
    """
    most = max(1, min(_MAX_GROUPS, channels // _CHANNELS_PER_GROUP))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)
