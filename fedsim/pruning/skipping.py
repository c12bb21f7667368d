"""Inference that leaves out what gates suppress: each example computes its winning channels, from non-zero ones."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.models.layers.fbs import Gate, GatedConv2d, saliency, winners


class SkippingConv2d(nn.Module):
    """What a :class:`GatedConv2d` computes in evaluation mode, by a smaller convolution for each example.

    Of the weight it takes ``W[kept][:, used]``: the channels whose gates are open, and those of its input that are not
    all 0. Batch norm's running statistics are in the weight and in the shift already. It has no gradient.

    Args:
        conv: with batch norm that keeps running statistics, or without a norm, and padded with zeros.
    """

    def __init__(self, conv: GatedConv2d) -> None:
        super().__init__()
        scale, shift = _folded(conv)
        self.gate: Gate = conv.gate
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.register_buffer("weight", conv.weight.detach() * scale[:, None, None, None])
        self.register_buffer("shift", shift)
        self.register_buffer("density", conv.density)

    weight: Tensor
    shift: Tensor
    density: Tensor

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels_in, height, width) to (batch, channels, height', width')."""
        summary = saliency(x)
        g: Tensor = self.gate(summary)
        opened = winners(g, self.density) & (g > 0)
        rows = [self._one(*each) for each in zip(torch.split(x, 1), summary, g, opened, strict=True)]
        return torch.cat(rows)

    def _one(self, x: Tensor, summary: Tensor, g: Tensor, opened: Tensor) -> Tensor:
        kept, used = opened.nonzero().flatten(), summary.nonzero().flatten()
        used = used if len(used) else used.new_zeros(1)  # of an input of zeros any channel will do
        weight = self.weight if len(kept) == len(self.weight) else self.weight.index_select(0, kept)
        if len(used) < x.shape[1]:
            weight, x = weight.index_select(1, used), x.index_select(1, used)
        shift = self.shift.index_select(0, kept)
        y = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation)
        full = y.new_zeros(1, len(self.weight), *y.shape[2:])
        return full.index_copy_(1, kept, y * g.index_select(0, kept)[:, None, None])


def skipping(model: nn.Module) -> nn.Module:
    """A copy for evaluation whose gated convolutions skip, equal to the model up to rounding.

    Where the last winner and the next gate are equal up to rounding, the two may choose differently.

    Convolutions with group norm stay as they are: its statistics need the channels that would be skipped.

    Args:
        model: with gated convolutions, in any mode; not changed.

    Raises:
        ValueError: none of its convolutions can skip.
    """
    copied = copy.deepcopy(model).eval()
    found = {path: one for path, one in copied.named_modules() if isinstance(one, GatedConv2d) and _can_skip(one)}
    if not found:
        raise ValueError("needs gated convolutions with batch norm or without a norm, padded with zeros")
    for path, conv in found.items():
        if not path:
            return SkippingConv2d(conv).eval()
        above, _, name = path.rpartition(".")
        copied.get_submodule(above)._modules[name] = SkippingConv2d(conv).eval()
    return copied


def _can_skip(conv: GatedConv2d) -> bool:
    fixed = isinstance(conv.norm, _BatchNorm) and conv.norm.running_var is not None
    return (fixed or type(conv.norm) is nn.Identity) and conv.padding_mode == "zeros" and conv.groups == 1


def _folded(conv: GatedConv2d) -> tuple[Tensor, Tensor]:
    """Scale and shift behind the convolution, (channels,) each."""
    beta = conv.beta.detach()
    if not isinstance(conv.norm, _BatchNorm):
        return torch.ones_like(beta), beta.clone()
    mean, variance = conv.norm.running_mean, conv.norm.running_var
    assert mean is not None and variance is not None  # as _can_skip has found
    scale = torch.rsqrt(variance + conv.norm.eps)
    return scale, beta - mean * scale
