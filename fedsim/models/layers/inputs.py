"""Layers that stand before all others, and work on the inputs of a model."""

import torch
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.keyed import Keyed


class Cutout(Keyed):
    """Zero a square of each image in training: ``x[i, :, top : top + length, left : left + length] = 0``.

    Its centre is uniform over the pixels, so part of it may fall outside. With an even side the centre is the pixel to
    the lower right of the middle. Image i uses draws 2 i and 2 i + 1 of ``self.key``. The identity in evaluation.

    Args:
        length: side of the square in pixels, from 1 to the smaller side of an image; None is a third of that, rounded:
            3 on 8 x 8, 9 on 28 x 28, 11 on 32 x 32.

    Raises:
        ValueError: the input is not (batch, channels, height, width), or length is out of range.

    Source: DeVries, Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout",
        arXiv:1708.04552, section 3. Differs: ``length`` is the side; one revision of the authors' code cuts a square
        with a side of twice that. Their side for 32 x 32 is 16 or 8, by data set (unverified).
    """

    def __init__(self, length: int | None = None) -> None:
        super().__init__()
        if length is not None and length < 1:
            raise ValueError(f"length must be >= 1, got {length}")
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) with squares of zeros; same shape and dtype."""
        length = self._side(x)
        if not self.training:
            return x
        places = rng.uniform(self.key, x.shape[0], 2)
        rows, columns = (_hit(places[:, axis], x.shape[2 + axis], length) for axis in (0, 1))
        return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], 0.0, x)

    def _side(self, x: Tensor) -> int:
        if x.dim() != 4:
            raise ValueError(f"cutout needs images (batch, channels, height, width), got shape {tuple(x.shape)}")
        smaller = min(x.shape[2:])
        length = max(1, round(smaller / 3)) if self.length is None else self.length
        if length > smaller:
            raise ValueError(f"cutout.length must be at most the smaller side of an image, {smaller}, got {length}")
        return length

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"length={self.length}"


def _hit(u: Tensor, side: int, length: int) -> Tensor:
    """Which of ``side`` pixels are within ``length`` around the centre ``floor(u * side)``: bool (batch, side)."""
    top = (u * side).floor() - length // 2
    behind = torch.arange(side, device=u.device) - top[:, None]
    return (behind >= 0) & (behind < length)


class MixingKey(Keyed):
    """Has a key from which batches are mixed before the model sees them; does nothing itself."""

    def forward(self, x: Tensor) -> Tensor:
        """``x``."""
        return x
