"""Fully connected models. Each flattens its input, whatever the shape.

Layers are named fc1, fc2, ... and ``head``, the last one, in every model of the zoo.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import nn

from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.norms import Norm, norm_1d

Count = Annotated[int, Gt(0)]


def dense(
    features: int, hidden: Sequence[int], num_classes: int, *, dropout: float = 0.0, norm: Norm = "none"
) -> "OrderedDict[str, nn.Module]":
    """Layers of a multilayer perceptron by name: flatten, then fc, norm, ReLU and dropout for each width, then head.

    Args:
        features: entries of one flattened input.
        hidden: widths; may be empty.
        num_classes: width of the head.
        dropout: probability of dropping a hidden unit, in [0, 1); 0 adds no layer.
        norm: of each hidden layer, before its ReLU; ``none`` adds no layer.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, width in enumerate(hidden, start=1):
        layers[f"fc{i}"] = nn.Linear(features, width)
        if norm != "none":
            layers[f"fc_norm{i}"] = norm_1d(norm, width)
        layers[f"fc_relu{i}"] = nn.ReLU()
        if dropout:
            layers[f"fc_dropout{i}"] = Dropout(dropout)
        features = width
    layers["head"] = nn.Linear(features, num_classes)
    return layers


def linear(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Softmax regression: one linear layer."""
    return nn.Sequential(dense(math.prod(input_shape), [], num_classes))


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    hidden: list[Count] = [64, 64],  # noqa: B006 -- only read; a list, so that it shows as YAML writes it
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    norm: Norm = "none",
) -> nn.Module:
    """Multilayer perceptron with ReLU, optional normalisation before it and optional dropout after it.

    Args:
        input_shape: of one example.
        num_classes: number of logits.
        hidden: widths; ``[]`` is softmax regression.
        dropout: probability of dropping a hidden unit, in [0, 1).
        norm: of each hidden layer.
    """
    return nn.Sequential(dense(math.prod(input_shape), hidden, num_classes, dropout=dropout, norm=norm))


def two_nn(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "none") -> nn.Module:
    """The 2NN of the FedAvg paper: two hidden layers of 200, ReLU (199,210 parameters on MNIST).

    Source: McMahan et al. 2017, arXiv:1602.05629, section 3. Differs: none known; the paper gives no initialisation.
    """
    return nn.Sequential(dense(math.prod(input_shape), [200, 200], num_classes, norm=norm))


def lenet_300_100(input_shape: tuple[int, ...], num_classes: int, *, norm: Norm = "none") -> nn.Module:
    """LeNet-300-100 of the lottery ticket paper: hidden layers of 300 and 100, ReLU (266,610 parameters on MNIST).

    Source: Frankle, Carbin 2019, arXiv:1803.03635, figure 2. Differs: torch's initialisation, not Glorot normal.
    """
    return nn.Sequential(dense(math.prod(input_shape), [300, 100], num_classes, norm=norm))
