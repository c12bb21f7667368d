"""M-CifarNet, eight convolutions without a pool between them, on which dynamic channel pruning is measured."""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge, Len, Lt
from torch import nn

from fedsim.models.convolutional import image_shape
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.norms import Norm, norm_2d
from fedsim.models.mlp import Count

_STAGE = (0, 0, 1, 1, 1, 2, 2, 2)  # whose width each convolution has
_STRIDES = (1, 1, 2, 1, 1, 2, 1, 1)
_DROPPED = (3, 6)  # convolutions with dropout behind them


def m_cifarnet(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    channels: Annotated[list[Count], Len(3, 3)] = [64, 128, 192],  # noqa: B006 -- only read; shown as in YAML
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
    norm: Norm = "batch",
) -> nn.Module:
    """M-CifarNet: eight 3 x 3 convolutions, two of them striding, and a mean over pixels (1.3 M parameters).

    Layers are conv0, norm0, relu0, ..., and ``head``. The first convolution has no padding; where a stride of 2 meets
    an even size, one row and column of zeros come at the far end only, as in TensorFlow.

    Args:
        input_shape: (channels, height, width), at least 3 x 3.
        num_classes: number of logits.
        channels: width of convolutions 0 to 1, 2 to 4, and 5 to 7.
        dropout: probability behind convolutions 3 and 6, in [0, 1).
        norm: after each convolution; ``none`` gives the convolutions biases instead.

    Raises:
        ValueError: not an image, or too small.

    Source: Gao et al. 2019, arXiv:1810.05331, appendix, as in the authors' code. Differs: a linear layer behind the
        mean, which is its 1 x 1 convolution; torch's initialisation and constants of batch norm.
    """
    return _cifarnet("m-cifarnet", input_shape, num_classes, channels=channels, dropout=dropout, norm=norm)


def m_cifarnet_small(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    channels: Annotated[list[Count], Len(3, 3)] = [16, 32, 48],  # noqa: B006 -- only read; shown as in YAML
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    norm: Norm = "batch",
) -> nn.Module:
    """M-CifarNet of a quarter of its widths, without dropout, for small images (82 thousand parameters).

    Args and source as for :func:`m_cifarnet`.
    """
    return _cifarnet("m-cifarnet-small", input_shape, num_classes, channels=channels, dropout=dropout, norm=norm)


def _cifarnet(
    model: str, input_shape: tuple[int, ...], num_classes: int, *, channels: list[int], dropout: float, norm: Norm
) -> nn.Module:
    before, *size = image_shape(model, input_shape)
    if min(size) < 3:
        raise ValueError(f"model.name: {model} needs images of at least 3 x 3, got shape {input_shape}")
    size = [side - 2 for side in size]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (stage, stride) in enumerate(zip(_STAGE, _STRIDES, strict=True)):
        width, padding = channels[stage], min(i, 1)
        if stride == 2:
            padding = 0
            layers[f"pad{i}"] = nn.ZeroPad2d((size[1] % 2, 1, size[0] % 2, 1))  # left, right, top, bottom
            size = [-(-side // 2) for side in size]
        layers[f"conv{i}"] = nn.Conv2d(before, width, 3, stride=stride, padding=padding, bias=norm == "none")
        layers[f"norm{i}"] = norm_2d(norm, width)
        layers[f"relu{i}"] = nn.ReLU()
        if dropout and i in _DROPPED:
            layers[f"dropout{i}"] = Dropout(dropout)
        before = width
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(before, num_classes)}
    return nn.Sequential(layers)
