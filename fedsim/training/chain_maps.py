"""Layers of a chain that work on feature maps, (1, batch, channels, height, width), in channels_last memory.

They take one client at a time: torch has no stacked convolution that is faster than one after another.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.records import Params
from fedsim.training.chain_layers import Keys, Saved, Sink

_aten = torch.ops.aten
_convolution_backward = _aten.convolution_backward.default
_max_pool, _max_pool_backward = _aten.max_pool2d_with_indices.default, _aten.max_pool2d_with_indices_backward.default
_avg_pool, _avg_pool_backward = _aten.avg_pool2d.default, _aten.avg_pool2d_backward.default
_group_norm_backward = _aten.native_group_norm_backward.default

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """Where a convolution or a pool looks, (vertical, horizontal)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair


@dataclass(frozen=True)
class Conv:
    """Two-dimensional convolution with zero padding, by torch's own kernels."""

    weight: str
    bias: str | None
    window: Window
    groups: int
    input_slope: bool = True

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See ``Layer``."""
        maps, weight = x[0].contiguous(memory_format=torch.channels_last), local[self.weight][0]
        bias = None if self.bias is None else local[self.bias][0]
        w = self.window
        return F.conv2d(maps, weight, bias, w.stride, w.padding, w.dilation, self.groups).unsqueeze(0), (maps,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See ``Layer``."""
        weight, w = local[self.weight][0], self.window
        wanted = [self.input_slope, True, self.bias is not None]
        below, to_weight, to_bias = _convolution_backward(
            slope[0],
            saved[0],
            weight,
            [len(weight)],
            w.stride,
            w.padding,
            w.dilation,
            False,
            (0, 0),
            self.groups,
            wanted,
        )
        sink.add(self.weight, to_weight.unsqueeze(0))
        if self.bias is not None:
            sink.add(self.bias, to_bias.unsqueeze(0))
        return below.unsqueeze(0) if self.input_slope else slope


@dataclass(frozen=True)
class GreyConv:
    """A first convolution, of one channel, as one matrix product: torch's kernel needs five times as long for it."""

    weight: str
    bias: str | None
    window: Window

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See ``Layer``. Saves the columns."""
        columns, (height, width) = _columns(x[0, :, 0], self.window)
        weight = local[self.weight].flatten(2)[0]
        bias = weight.new_zeros(()) if self.bias is None else local[self.bias][0]
        y = torch.addmm(bias, columns.t(), weight.t())
        return y.view(1, -1, height, width, len(weight)).permute(0, 1, 4, 2, 3), (columns,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See ``Layer``."""
        rows = slope[0].permute(0, 2, 3, 1).flatten(0, 2)
        sink.add(self.weight, (saved[0] @ rows).t().reshape(local[self.weight].shape))
        if self.bias is not None:
            sink.add(self.bias, rows.sum(0, keepdim=True))
        return slope


def _columns(images: Tensor, window: Window) -> tuple[Tensor, Pair]:
    """What a window sees: images (batch, height, width) -> (kernel entries, batch * positions), and the output's size.

    One strided copy, in which whole lines stay together; ``F.unfold`` took nine times as long.
    """
    (down, across), (sy, sx), (py, px), (dy, dx) = window.kernel, window.stride, window.padding, window.dilation
    images = F.pad(images, (px, px, py, py))
    batch, height, width = images.shape
    out = ((height - dy * (down - 1) - 1) // sy + 1, (width - dx * (across - 1) - 1) // sx + 1)
    seen = images.as_strided((down, across, batch, *out), (dy * width, dx, height * width, sy * width, sx))
    return seen.reshape(down * across, -1), out


@dataclass(frozen=True)
class MaxPool:
    """Largest entry of each window. ``window.dilation`` is 1."""

    window: Window

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See ``Layer``."""
        w = self.window
        y, places = _max_pool(x[0], w.kernel, w.stride, w.padding)
        return y.unsqueeze(0), (x[0], places)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See ``Layer``."""
        (x, places), w = saved, self.window
        below: Tensor = _max_pool_backward(slope[0], x, w.kernel, w.stride, w.padding, w.dilation, False, places)
        return below.unsqueeze(0)


@dataclass(frozen=True)
class AvgPool:
    """Mean of each window. ``window.dilation`` is 1."""

    window: Window
    count_padding: bool
    divisor: int | None

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See ``Layer``."""
        return _avg_pool(x[0], *self._options()).unsqueeze(0), (x[0],)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See ``Layer``."""
        below: Tensor = _avg_pool_backward(slope[0], saved[0], *self._options())
        return below.unsqueeze(0)

    def _options(self) -> tuple[Pair, Pair, Pair, bool, bool, int | None]:
        w = self.window
        return w.kernel, w.stride, w.padding, False, self.count_padding, self.divisor


@dataclass(frozen=True)
class GroupNorm:
    """Group norm with a scale and a shift per channel."""

    weight: str
    bias: str
    groups: int
    eps: float
    input_slope: bool = True

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See ``Layer``."""
        x, weight, bias = x[0], local[self.weight][0], local[self.bias][0]
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), self.groups, self.eps)
        return y.unsqueeze(0), (x, mean, rstd)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See ``Layer``."""
        (x, mean, rstd), weight = saved, local[self.weight][0]
        wanted = [self.input_slope, True, True]
        below, to_weight, to_bias = _group_norm_backward(
            _laid_out_as(x, slope[0]), x, mean, rstd, weight, *_sizes(x), self.groups, wanted
        )
        sink.add(self.weight, to_weight.unsqueeze(0))
        sink.add(self.bias, to_bias.unsqueeze(0))
        return below.unsqueeze(0) if self.input_slope else slope


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Batch, channels, positions."""
    return x.shape[0], x.shape[1], x[0, 0].numel()


def _laid_out_as(x: Tensor, slope: Tensor) -> Tensor:
    """Group norm's backward pass reads both in the layout of ``x``, whatever the slope's own."""
    if x.is_contiguous() or x.dim() != 4:
        return slope.contiguous()
    return slope.contiguous(memory_format=torch.channels_last)
