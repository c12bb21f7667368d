"""Convolutional models: 'same' convolutions, 2 x 2 max pooling after each group of them, then dense layers.

Layers are named conv1, norm1, conv2, ..., pool1, ..., fc1, ... and ``head``.
"""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from annotated_types import MinLen
from torch import nn

from fedsim.models.layers.norms import Norm, norm_2d
from fedsim.models.mlp import Count, dense


def image_shape(model: str, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``input_shape`` as (channels, height, width).

    Raises:
        ValueError: it has another length; ``model`` is named.
    """
    match input_shape:
        case (channels, height, width):
            return channels, height, width
    raise ValueError(f"model.name: {model} needs image inputs (channels, height, width), got shape {input_shape}")


def _convolutional(
    model: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    groups: Sequence[Sequence[int]],
    kernel: int,
    hidden: Sequence[int],
    norm: Norm,
) -> nn.Module:
    """A pool after each group of convolutions; ``groups`` holds their widths."""
    channels, height, width = image_shape(model, input_shape)
    shrink = 2 ** len(groups)
    if min(height, width) < shrink:
        raise ValueError(
            f"model.name: {model} halves its input {len(groups)} times and needs images of at least "
            f"{shrink} x {shrink}, got shape {input_shape}"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    number = itertools.count(1)
    for group, widths in enumerate(groups, start=1):
        for out in widths:
            i = next(number)
            layers[f"conv{i}"] = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
            layers[f"norm{i}"] = norm_2d(norm, out)
            layers[f"relu{i}"] = nn.ReLU()
            channels = out
        layers[f"pool{group}"] = nn.MaxPool2d(2)
    features = channels * (height // shrink) * (width // shrink)
    return nn.Sequential(layers | dense(features, hidden, num_classes))


def cnn(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    channels: Annotated[list[Count], MinLen(1)] = [32, 64],  # noqa: B006 -- only read; shown as in YAML
    kernel: Count = 5,
    hidden: Count = 512,
    norm: Norm = "none",
) -> nn.Module:
    """The CNN of the FedAvg paper: two pooled 5 x 5 convolutions, one dense layer (1,663,370 parameters on MNIST).

    Args:
        input_shape: (channels, height, width), at least 2^len(channels) high and wide.
        num_classes: number of logits.
        channels: width of each convolution; a 2 x 2 max pool follows each.
        kernel: side of the convolutions, odd.
        hidden: width of the dense layer.
        norm: after each convolution.

    Raises:
        ValueError: not an image, an image too small, or an even kernel.

    Source: McMahan et al. 2017, arXiv:1602.05629, section 3. Differs: the paper names ReLU for the dense layer only;
        here it follows the convolutions too. 'same' padding, which the paper's count of parameters implies.
    """
    if kernel % 2 == 0:
        raise ValueError(f"model.kernel: must be odd, got {kernel}")
    groups = [[width] for width in channels]
    return _convolutional("cnn", input_shape, num_classes, groups=groups, kernel=kernel, hidden=[hidden], norm=norm)


def conv_2(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "none") -> nn.Module:
    """Conv-2 of the lottery ticket paper: 64, 64, pool; dense 256, 256 (4.3 M parameters on CIFAR-10).

    Args:
        input_shape: (channels, height, width), at least 2 x 2.
        num_classes: number of logits.
        norm: after each convolution.

    Raises:
        ValueError: not an image, or too small.

    Source: Frankle, Carbin 2019, arXiv:1803.03635, figure 2. Differs: torch's initialisation, not Glorot normal.
    """
    return _lottery_ticket("conv-2", [64], input_shape, num_classes, norm)


def conv_4(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "none") -> nn.Module:
    """Conv-4 of the lottery ticket paper: 64, 64, pool, 128, 128, pool; dense 256, 256 (2.4 M parameters on CIFAR-10).

    Args and source as for :func:`conv_2`; at least 4 x 4.
    """
    return _lottery_ticket("conv-4", [64, 128], input_shape, num_classes, norm)


def conv_6(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "none") -> nn.Module:
    """Conv-6 of the lottery ticket paper: Conv-4 with 256, 256, pool after it (2.3 M parameters on CIFAR-10).

    Args and source as for :func:`conv_2`; at least 8 x 8. The paper prints 1.7 M; the layers it lists have 2,261,184
    weights.
    """
    return _lottery_ticket("conv-6", [64, 128, 256], input_shape, num_classes, norm)


def _lottery_ticket(
    model: str, widths: Sequence[int], input_shape: tuple[int, ...], num_classes: int, norm: Norm
) -> nn.Module:
    groups = [[width, width] for width in widths]
    return _convolutional(model, input_shape, num_classes, groups=groups, kernel=3, hidden=[256, 256], norm=norm)
