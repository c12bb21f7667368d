"""Fixup: deep residual networks without normalisation, by their first weights and by scalars between layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.models import places
from fedsim.models.layers.attaching import attach, attach_first
from fedsim.models.residual import Residual

SCALARS_RATE = 0.1  # of the step size of other parameters


class FixupBlock(Residual):
    """A residual block with a scalar in front of every layer with weights and every activation, and one that scales.

    ``y = relu(shortcut(x + bias1a) + scale * layer_m(... relu(layer_1(x + bias1a) + bias1b) ...) + bias_mb)``

    The branch, with its scale and last bias, goes through the block's last norm, which is the identity: a layer behind
    it works on all of the branch.

    blocks: how many the whole network has.
    """

    blocks: int
    scale: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """As the block that it was, with the scalars."""
        x, last = x + self._scalar("bias1a"), len(self.weights)
        inner = x
        for i, (layer, norm) in enumerate(self.layers(), 1):
            inner = layer(F.relu(inner) + self._scalar(f"bias{i}a") if i > 1 else inner)
            inner = norm((inner * self.scale if i == last else inner) + self._scalar(f"bias{i}b"))
        return F.relu(self.shortcut(x) + inner)

    def reset_parameters(self) -> None:
        """Biases 0, scale 1, the last weights 0, the others normal with variance 2 / fan-out * blocks^(-1/(m-1))."""
        layers = [layer for layer, _ in self.layers()]
        for layer in layers[:-1]:
            nn.init.kaiming_normal_(_weight(layer), mode="fan_out", nonlinearity="relu")
        with torch.no_grad():
            for layer in layers[:-1]:
                _weight(layer).mul_(self.blocks ** (-1 / (2 * len(layers) - 2)))
            _weight(layers[-1]).zero_()
            for name in self.scalars():
                self._scalar(name).fill_(float(name == "scale"))

    def scalars(self) -> tuple[str, ...]:
        """Names of its scalars."""
        return (*(f"bias{i}{where}" for i in range(1, len(self.weights) + 1) for where in "ab"), "scale")

    def _scalar(self, name: str) -> Tensor:
        found: Tensor = getattr(self, name)  # under a transform of torch.func it is no nn.Parameter
        return found


class Shift(nn.Module):
    """``x + bias`` with a scalar, 0 at first."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(like.new_zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x + self.bias

    def reset_parameters(self) -> None:
        """To 0."""
        nn.init.zeros_(self.bias)


def fixup(model: nn.Module) -> None:
    """Give a freshly built residual network Fixup's first weights and scalars, in place; draws from torch's generator.

    - The last linear layer is 0, weight and bias, and so is the last layer of every branch: logits are 0.
    - Other layers of a branch are drawn from N(0, 2 / fan-out), and scaled by L^(-1/(2m-2)); L is the number of blocks
      of the network, m the number of layers with weights of a branch. What is outside of branches stays as it is.
    - Blocks become :class:`FixupBlock`. The first layer and the last linear layer get a scalar too, behind and in
      front. Layers but the last lose their biases.

    Parameters keep their names: ``stage1.block1.conv1.weight``; ``stage1.block1.bias1a`` and ``conv1.shift.bias`` are
    new.

    Scalars should learn with a tenth of the step size: see :func:`scalar_rates`.

    Raises:
        ValueError: the model has no residual blocks, or one of a single layer, or norms.

    Source: Zhang, Dauphin, Ma 2019, "Fixup Initialization", arXiv:1901.09321, and the authors' code for CIFAR.
        Differs: there the bias of the last layer learns as slowly as the scalars, since it is picked by its name.
        Step sizes, weight decay and mixup are the config's.
    """
    blocks = [module for module in model.modules() if isinstance(module, Residual)]
    _check(model, blocks)
    for block in blocks:
        _change(block, len(blocks))
    head = model.get_submodule(places.head(model))
    for parameter in head.parameters(recurse=False):
        nn.init.zeros_(parameter)
    for layer in _outside(blocks, model, head):
        layer.register_parameter("bias", None)
        attach(layer, "shift", Shift(_weight(layer)))
    before, like = places.before_head(model), _weight(head)
    if before:
        attach(model.get_submodule(before[0]), "shift", Shift(like))
    else:
        attach_first(head, "shift", Shift(like))


def scalar_rates(model: nn.Module) -> dict[str, float]:
    """Names of Fixup's scalars, and the factor on their steps, 1/10; {} for a model without any."""
    found: dict[str, float] = {}
    for path, module in model.named_modules():
        names = module.scalars() if isinstance(module, FixupBlock) else ("bias",) if isinstance(module, Shift) else ()
        found |= {f"{path}.{name}".lstrip("."): SCALARS_RATE for name in names}
    return found


def _check(model: nn.Module, blocks: list[Residual]) -> None:
    if not blocks:
        raise ValueError("needs residual blocks; resnet, resnet-8, resnet-20 and residual-mlp have them")
    norms = [norm for block in blocks for _, norm in block.layers() if not isinstance(norm, nn.Identity)]
    if norms:
        raise ValueError(f"model.norm: must be none with init: fixup, got blocks with {type(norms[0]).__name__}")
    if min(len(block.weights) for block in blocks) < 2:
        raise ValueError("needs residual blocks of two layers or more, of which the last can start at 0")


def _change(block: Residual, blocks: int) -> None:
    layers = [layer for layer, _ in block.layers()]
    for layer in layers:
        layer.register_parameter("bias", None)
    block.__class__ = FixupBlock
    assert isinstance(block, FixupBlock)
    block.blocks = blocks
    for name in block.scalars():
        block.register_parameter(name, nn.Parameter(_weight(layers[0]).new_empty(1)))
    block.reset_parameters()


def _outside(blocks: list[Residual], model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The layers with weights that are in no block, but for the last linear layer."""
    inside = {id(module) for block in blocks for module in block.modules()} | {id(head)}
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and id(m) not in inside]


def _weight(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter("weight")
