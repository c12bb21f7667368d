"""DropConnect as a law: a mask for each example, or the mean over masks in evaluation.

A mask for each batch needs no law: it is :class:`~fedsim.models.layers.dropouts.Dropout` as a noise on the weight.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.keyed import Keyed
from fedsim.models.layers.weights import Affine, Stochastic, StochasticLinear

_FLOOR = 1e-20  # of a variance: for the gradients of its root, and nothing in float32 beside a mean


class DropConnect(Affine, Keyed):
    """In training each example has a mask of its own for the weight: ``y = (W * kept / (1 - p)) x + b``.

    Entry (n, o, i) of the masks uses draw ``(n * out + o) * in + i`` of ``self.key``, so rows added at the end of a
    batch change no other row. The masks take batch * out * in numbers of memory.

    Args:
        p: probability of a dropped weight, in [0, 1).
        per_example: draw such masks; else training is the plain law (with masks from a noise).
        moments: in evaluation return ``E[relu(u)]`` of :func:`expected_relu` in the place of ``W x + b``.
    """

    regularizer = "dropconnect"

    def __init__(self, p: float, *, per_example: bool, moments: bool) -> None:
        super().__init__()
        self.p, self.per_example, self.moments = p, per_example, moments

    def forward(self, layer: Stochastic, x: Tensor, weight: Tensor) -> Tensor:
        """(batch, ..., in) to (batch, ..., out)."""
        assert isinstance(layer, StochasticLinear)  # the only one it is put into
        if self.training and self.per_example:
            return _masked_apart(layer, x, weight, self.key, self.p)
        mean = layer.affine(x, weight, layer.bias)
        if self.training or not self.moments:
            return mean
        return expected_relu(mean, self.p / (1.0 - self.p) * F.linear(x.square(), weight.square()))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p}, per_example={self.per_example}, moments={self.moments}"


def _masked_apart(layer: StochasticLinear, x: Tensor, weight: Tensor, key: Tensor, p: float) -> Tensor:
    kept = rng.uniform(key, len(x), *weight.shape) >= p
    weights = torch.where(kept, weight / (1.0 - p), 0.0)
    product: Tensor = torch.einsum("noi,n...i->n...o", weights, x)
    return product if layer.bias is None else product + layer.bias


def expected_relu(mean: Tensor, variance: Tensor) -> Tensor:
    """``E[max(u, 0)] = m Phi(m / s) + s phi(m / s)`` for ``u ~ N(m, s^2)``.

    Args:
        mean: m, any shape.
        variance: s^2 >= 0, of the same shape.

    Returns:
        Tensor of that shape; ``max(m, 0)`` where the variance is 0, up to 1e-10.

    Source: Wan et al. 2013, "Regularization of Neural Networks using DropConnect", section 3.2 (moments only).
        Differs: they average the activation over about a thousand draws of u (unverified number); for ReLU the mean has
        this closed form, which needs none.

    >>> expected_relu(torch.tensor([-3.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, 0.0]))
    tensor([0.0000, 0.3989, 3.0000])
    """
    deviation = variance.clamp(min=_FLOOR).sqrt()
    ratio = mean / deviation
    density = torch.exp(-0.5 * ratio.square()) / math.sqrt(2.0 * math.pi)
    expected: Tensor = mean * torch.special.ndtr(ratio) + deviation * density
    return expected
