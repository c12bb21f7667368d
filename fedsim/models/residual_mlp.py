"""A residual network without convolutions, as deep as one likes."""

import math
from collections import OrderedDict

from torch import nn

from fedsim.models.layers.norms import Norm, norm_1d
from fedsim.models.mlp import Count
from fedsim.models.residual import Residual


class DenseBlock(Residual):
    """Two linear layers of the same width, (batch, width) to (batch, width), and the identity for shortcut."""

    def __init__(self, width: int, *, norm: Norm) -> None:
        super().__init__(("fc1", "fc2"))
        self.shortcut = nn.Identity()
        self.fc1 = _linear(width, width, norm)
        self.norm1 = norm_1d(norm, width)
        self.fc2 = _linear(width, width, norm)
        self.norm2 = norm_1d(norm, width)


def _linear(features: int, width: int, norm: Norm) -> nn.Linear:
    """Without a norm it needs a bias of its own."""
    return nn.Linear(features, width, bias=norm == "none")


def residual_mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    depth: Count = 4,
    width: Count = 64,
    norm: Norm = "none",
) -> nn.Module:
    """Residual multilayer perceptron: blocks ``relu(x + norm2(fc2(relu(norm1(fc1(x))))))`` between two linear layers.

    Args:
        input_shape: of one example, which is flattened.
        num_classes: number of logits.
        depth: number of blocks; the network has 2 depth + 2 linear layers.
        width: of every block.
        norm: after each linear layer but the last; ``none`` gives the linear layers biases instead.

    Source: the blocks of He et al. 2016, arXiv:1512.03385, figure 2, with linear layers. Differs: torch's
        initialisation. With it 1,000 blocks without a norm start at a loss of about 1e9; ``model.init: fixup`` trains.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        flatten=nn.Flatten(),
        fc1=_linear(math.prod(input_shape), width, norm),
        norm1=norm_1d(norm, width),
        relu1=nn.ReLU(),
    )
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        (f"block{i}", DenseBlock(width, norm=norm)) for i in range(1, depth + 1)
    )
    layers |= {"stage1": nn.Sequential(blocks), "head": nn.Linear(width, num_classes)}
    return nn.Sequential(layers)
