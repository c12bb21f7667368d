"""Residual networks for small images, as He et al. built them for CIFAR-10."""

from collections import OrderedDict
from typing import Annotated

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from fedsim.models.convolutional import image_shape
from fedsim.models.layers.norms import Norm, norm_2d

_WIDTHS = (16, 32, 64)


class Residual(nn.Module):
    """A residual block: ``relu(x' + norm_m(layer_m(... relu(norm_1(layer_1(x))))))`` with the shortcut x'.

    A subclass registers ``shortcut``, its layers with weights, and norm1, norm2, ... behind them.

    weights: names of the layers with weights, in order. branch: what ends the branch, for methods that work on it.
    """

    shortcut: nn.Module

    def __init__(self, weights: tuple[str, ...]) -> None:
        super().__init__()
        self.weights, self.branch = weights, f"norm{len(weights)}"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) to (batch, ...), as ``shortcut`` and layers make it."""
        inner = x
        for i, (layer, norm) in enumerate(self.layers()):
            inner = norm(layer(F.relu(inner) if i else inner))
        return F.relu(self.shortcut(x) + inner)

    def layers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each layer with weights, and the norm behind it."""
        return [(self.get_submodule(name), self.get_submodule(f"norm{i}")) for i, name in enumerate(self.weights, 1)]


class Block(Residual):
    """Two 3 x 3 convolutions and the parameter-free shortcut x'.

    Where the block strides or widens, x' takes every second pixel and adds channels of zeros at the end (option A).
    (batch, channels_in, height, width) to (batch, channels, ceil(height / stride), ceil(width / stride)).
    """

    def __init__(self, channels_in: int, channels: int, *, stride: int, norm: Norm) -> None:
        super().__init__(("conv1", "conv2"))
        self.shortcut = Shortcut(channels - channels_in, stride=stride)
        self.conv1 = _conv(channels_in, channels, norm, stride=stride)
        self.norm1 = norm_2d(norm, channels)
        self.conv2 = _conv(channels, channels, norm)
        self.norm2 = norm_2d(norm, channels)


class Shortcut(nn.Module):
    """Every ``stride``-th pixel, and channels of zeros at the end."""

    def __init__(self, added_channels: int, *, stride: int) -> None:
        super().__init__()
        self.added_channels, self.stride = added_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, channels + added, ceil(height / stride), ...)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added_channels))


def _conv(channels_in: int, channels: int, norm: Norm, *, stride: int = 1) -> nn.Conv2d:
    """3 x 3 convolution; without a norm it needs a bias of its own."""
    return nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=norm == "none")


def resnet(
    input_shape: tuple[int, ...], num_classes: int, *, depth: Annotated[int, Ge(8)] = 20, norm: Norm = "group"
) -> nn.Module:
    """Residual network for small images: 6n + 2 layers, 16, 32 and 64 channels, no parameters in the shortcuts.

    Args:
        input_shape: (channels, height, width), any size from 1 x 1.
        num_classes: number of logits.
        depth: 8, 14, 20, 26, ...
        norm: after each convolution; ``none`` gives the convolutions biases instead.

    Raises:
        ValueError: not an image, or a depth that is not 6n + 2.

    Source: He et al. 2016, arXiv:1512.03385, section 4.2, option A. Differs: group norm by default, since batch
        statistics differ between clients; torch's initialisation, not He normal.
    """
    channels, _, _ = image_shape("resnet", input_shape)
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"model.depth: must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    first = _WIDTHS[0]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=_conv(channels, first, norm), norm1=norm_2d(norm, first), relu1=nn.ReLU()
    )
    for stage, width in enumerate(_WIDTHS, start=1):
        before = _WIDTHS[max(stage - 2, 0)]
        layers[f"stage{stage}"] = _stage(
            before, width, blocks=(depth - 2) // 6, stride=1 if stage == 1 else 2, norm=norm
        )
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(_WIDTHS[-1], num_classes)}
    return nn.Sequential(layers)


def _stage(channels_in: int, channels: int, *, blocks: int, stride: int, norm: Norm) -> nn.Module:
    """``blocks`` blocks, of which the first strides and widens."""
    first = Block(channels_in, channels, stride=stride, norm=norm)
    others = [Block(channels, channels, stride=1, norm=norm) for _ in range(blocks - 1)]
    return nn.Sequential(OrderedDict((f"block{i}", block) for i, block in enumerate([first, *others], start=1)))


def resnet_8(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "group") -> nn.Module:
    """The resnet of depth 8 (about 75 thousand parameters)."""
    return resnet(input_shape, num_classes, depth=8, norm=norm)


def resnet_20(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "group") -> nn.Module:
    """The resnet of depth 20 (about 270 thousand parameters)."""
    return resnet(input_shape, num_classes, depth=20, norm=norm)
