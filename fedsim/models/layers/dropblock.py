"""DropBlock: dropout of squares of feature maps, where a single pixel could be guessed from its neighbours."""

import math
from collections import Counter
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.keyed import Ramped

Normalise = Literal["batch", "example"]
Gamma = Literal["paper", "exact"]
Schedule = Literal["linear", "constant"]

NEWTON_STEPS = 7  # as exact as twelve, on maps up to 40 x 40 with blocks up to 9 x 9 and rates up to 0.99


class DropBlock(Ramped):
    """Zero squares of feature maps in training, and scale the rest: ``y = x * kept * count(kept) / count_ones(kept)``.

    A square of side ``block_size`` begins at each place where it fits with probability gamma, independently for each
    example and channel; along an axis shorter than that it is as long as the axis. ``paper`` has ``gamma = rate * H * W
    / (b_h * b_w * (H - b_h + 1) * (W - b_w + 1))``, which counts overlaps twice, so that fewer are dropped; ``exact``
    makes the expected share of dropped entries the rate. Cells at the border are in fewer squares, and dropped less.
    A map of one pixel stays as it is, and so does everything in evaluation.

    Args:
        drop: the rate, in [0, 1).
        block_size: side of a square in pixels, >= 1, odd or even.
        normalise: over the ``batch`` (then a row of it depends on the others), or each ``example`` by itself.
        gamma: see above.
        schedule: the rate is ``progress * drop`` (``linear``), or always ``drop`` (``constant``).

    Raises:
        ValueError: drop or block_size is out of range, or the input is not (batch, channels, height, width).

    Source: Ghiasi, Lin, Le 2018, "DropBlock: A regularization method for convolutional networks", arXiv:1810.12890,
        algorithm 1 and eq. 1. Differs: squares are told by their corner, not their centre, so that even sides work;
        the schedule follows the federation's rounds rather than steps; ``example`` and ``exact`` are ours.
    """

    def __init__(
        self,
        drop: float,
        block_size: int,
        *,
        normalise: Normalise = "batch",
        gamma: Gamma = "paper",
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__()
        if not 0.0 <= drop < 1.0:
            raise ValueError(f"drop must be in [0, 1), got {drop}")
        if block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {block_size}")
        self.drop, self.block_size = drop, block_size
        self.normalise, self.gamma, self.schedule = normalise, gamma, schedule
        self.mixes_examples = normalise == "batch"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) with squares of zeros; same shape and dtype."""
        if x.dim() != 4:
            raise ValueError(f"DropBlock needs (batch, channels, height, width), got shape {tuple(x.shape)}")
        if not self.training or self.drop == 0.0 or x.shape[2:].numel() == 1:
            return x
        dropped = self._dropped(x)
        counted = (0, 1, 2, 3) if self.normalise == "batch" else (1, 2, 3)
        ones = (~dropped).sum(counted, keepdim=True)
        total = dropped.numel() if self.normalise == "batch" else x.shape[1:].numel()
        scale = total / ones.clamp(min=1).double()  # where nothing is left there is nothing to scale
        return torch.where(dropped, 0.0, x * scale.to(x.dtype))

    def _dropped(self, x: Tensor) -> Tensor:
        """Bool, in the shape of ``x``. Seed i uses half of draw i / 2 of ``self.key``."""
        height, width = x.shape[2:]
        b_h, b_w = min(self.block_size, height), min(self.block_size, width)
        progress = self.progress.double()
        rate = self.drop * progress if self.schedule == "linear" else torch.full_like(progress, self.drop)
        gamma = (exact_gamma if self.gamma == "exact" else paper_gamma)(rate, (height, width), (b_h, b_w))
        seeds = rng.coins(self.key, gamma, *x.shape[:2], height - b_h + 1, width - b_w + 1)
        padded = F.pad(seeds, (b_w - 1, b_w - 1, b_h - 1, b_h - 1))
        return _any_of(_any_of(padded, b_h, 2), b_w, 3)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"drop={self.drop}, block_size={self.block_size}"


def _any_of(flags: Tensor, window: int, axis: int) -> Tensor:
    """Whether any of ``window`` neighbours is true: max pooling of bools, by a few shifts that double the window."""
    reached = 1
    while reached < window:
        by = min(reached, window - reached)
        left = flags.shape[axis] - by
        flags, reached = flags.narrow(axis, 0, left) | flags.narrow(axis, by, left), reached + by
    return flags


def paper_gamma(rate: Tensor, sides: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Probability of a square at a place where it fits, if squares would not overlap.

    Args:
        rate: share to be dropped, float64 (), in [0, 1).
        sides: height and width of the map.
        block: height and width of a square, no longer than the map's.

    Returns:
        Float64 (), at most ``rate``.
    """
    places = math.prod(side - own + 1 for side, own in zip(sides, block, strict=True))
    return rate * (math.prod(sides) / (math.prod(block) * places))


def exact_gamma(rate: Tensor, sides: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """The gamma with which the expected share of dropped entries is ``rate``.

    A cell in n squares is kept with probability ``(1 - gamma)^n``. Newton's method finds the root u of ``log(mean over
    cells of e^(n u)) = log(1 - rate)``, then ``gamma = 1 - e^u``. The left side is convex and grows, so that from
    u = 0 each step comes closer and none goes too far.

    Args, Returns: as for :func:`paper_gamma`.
    """
    squares, share = (torch.tensor(part, dtype=torch.float64, device=rate.device) for part in _squares(sides, block))
    target, u = torch.log1p(-rate), torch.zeros_like(rate)
    for _ in range(NEWTON_STEPS):
        terms = share * torch.exp(squares * u[..., None])
        kept = terms.sum(-1)
        u = u - (torch.log(kept) - target) * kept / (terms * squares).sum(-1)
    return -torch.expm1(u.clamp(max=0.0))


@lru_cache(maxsize=256)
def _squares(sides: tuple[int, int], block: tuple[int, int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """In how many squares a cell can be, and the share of the cells that are in so many."""
    along = [
        [min(i, side - own) - max(0, i - own + 1) + 1 for i in range(side)]
        for side, own in zip(sides, block, strict=True)
    ]
    counts = Counter(row * column for row in along[0] for column in along[1])
    return tuple(counts), tuple(n / math.prod(sides) for n in counts.values())
