"""Convolutions that gate their channels example by example: feature boosting and suppression (FBS)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETA, SPREAD = 0.1, 0.05  # first shift, and standard deviation of the first predictors

# Densities are multiples of 0.01 or so in float32: 0.3 of 10 channels must be 3 of them, not 4.
_SLACK = 1e-6


class Gate(nn.Module):
    """Predicts how much each output channel matters: ``g = relu(s phi + rho)``.

    phi starts small, from torch's generator, and rho at 1, so that at first all channels matter about alike.
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.empty(channels_in, channels))
        self.rho = nn.Parameter(torch.ones(channels))
        nn.init.trunc_normal_(self.phi, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)

    def forward(self, summary: Tensor) -> Tensor:
        """(batch, channels_in) to (batch, channels), >= 0."""
        return F.relu(summary @ self.phi + self.rho)


class GatedConv2d(nn.Conv2d):
    """A convolution, the norm behind it, and gates: ``y = wta_k(g(x)) * (norm(conv(x)) + beta)``, before the ReLU.

    ``g = relu(ss(x) phi + rho)`` with ss(x) the mean of |x| over the pixels of each input channel, and wta_k keeps the
    ``k = ceil(density * channels)`` largest of an example, the first of equals. The other channels are exactly 0. The
    gradient goes through the gates that were kept, as if the choice were constant.

    It is made of an ``nn.Conv2d`` by :func:`gate`, which leaves the name of its weight. ``density`` is a persistent
    buffer (): whoever lowers it decides for training and evaluation alike.

    Source: Gao et al. 2019, "Dynamic Channel Pruning: Feature Boosting and Suppression", arXiv:1810.05331, eq. of
        section 3. Differs: none; the authors' code does not multiply beta by g.
    """

    gate: Gate
    norm: nn.Module
    beta: Tensor
    density: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, height, width) to (batch, channels, height', width')."""
        g: Tensor = self.gate(saliency(x))
        kept = winners(g.detach(), self.density)
        pi = torch.where(kept, g, 0.0)
        y: Tensor = self.norm(super().forward(x)) + self.beta[:, None, None]
        return torch.where(kept[..., None, None], pi[..., None, None] * y, 0.0)


def gate(conv: nn.Conv2d, norm: nn.Module | None) -> None:
    """Make ``conv`` a :class:`GatedConv2d`, in place, with ``norm`` as its own.

    The norm loses scale and shift, whose part the gates and beta have now. So does the convolution its bias: without a
    norm it becomes beta, and behind one beta starts at 0.1.

    Args:
        conv: of torch's own class. norm: batch or group norm, or None.
    """
    like, channels = conv.weight, conv.out_channels
    shift = torch.full((channels,), BETA)
    if norm is None and conv.bias is not None:
        shift = conv.bias.detach().clone()
    conv.register_parameter("bias", None)
    conv.__class__ = GatedConv2d
    conv.add_module("gate", Gate(conv.in_channels, channels).to(like))
    conv.add_module("norm", nn.Identity() if norm is None else _without_affine(norm))
    conv.register_parameter("beta", nn.Parameter(shift.to(like)))
    conv.register_buffer("density", torch.ones((), device=like.device))


def saliency(x: Tensor) -> Tensor:
    """Mean of |x| over the pixels of each channel: (batch, channels, height, width) to (batch, channels)."""
    return x.abs().mean((-2, -1))


def winners(g: Tensor, density: Tensor) -> Tensor:
    """The ``count(density, channels)`` largest of each example, the first of equals: bool in the shape of ``g``.

    Args:
        g: (..., channels), >= 0. density: scalar tensor () in (0, 1]; it may be batched by ``torch.func.vmap``.
    """
    order = torch.argsort(g, dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1) < count(density, g.shape[-1])


def count(density: Tensor, channels: int) -> Tensor:
    """``ceil(density * channels)``, at least 1; float64 tensor ().

    >>> [int(count(torch.tensor(d), 10)) for d in (0.3, 0.31, 0.01, 1.0)]
    [3, 4, 1, 10]
    """
    return torch.ceil((density.double() - _SLACK) * channels).clamp(min=1)


def _without_affine(norm: nn.Module) -> nn.Module:
    norm.affine = False  # type: ignore[assignment] # what torch's norms call it
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    return norm
