import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.layers.dropblock import DropBlock
from fedsim.models.zoo import MODELS
from fedsim.training.objective import PLAIN
from fedsim.training.regularizers import REGULARIZERS, bind
from fedsim.training.regularizers.dropblock import dropblock


def placed(model: nn.Module) -> dict[str, float]:
    """Paths of the layers it was put behind, and the rate there."""
    return {
        path.removesuffix(".dropblock"): module.drop
        for path, module in model.named_modules()
        if isinstance(module, DropBlock)
    }


def bound(name: str, shape: tuple[int, ...] = (1, 16, 16), *, keys: dict | None = None, **options) -> nn.Module:
    model = MODELS[name](shape, 3, **(keys or {}))
    assert bind(model, [dropblock(**options)]) == PLAIN
    return model


def test_in_a_plain_stack_it_is_behind_the_activations_of_the_last_stages():
    assert placed(bound("cnn", drop=0.2)) == {"relu1": 0.05, "relu2": 0.2}
    assert placed(bound("cnn", drop=0.2, groups=1)) == {"relu2": 0.2}
    assert placed(bound("conv-6", drop=0.2)) == {"relu3": 0.05, "relu4": 0.05, "relu5": 0.2, "relu6": 0.2}
    deep = bound("cnn", (1, 32, 32), keys={"channels": [2, 2, 2, 2]}, drop=0.64, groups=9)
    assert placed(deep) == pytest.approx({"relu1": 0.01, "relu2": 0.04, "relu3": 0.16, "relu4": 0.64})


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_in_residual_blocks_it_is_behind_both_norms_and_on_the_shortcut(norm):
    parts = ("norm1", "norm2", "shortcut")
    last = {f"stage3.block{i}.{part}": 0.2 for i in (1, 2) for part in parts}
    before = {f"stage2.block{i}.{part}": 0.05 for i in (1, 2) for part in parts}
    assert placed(bound("resnet", keys={"depth": 14, "norm": norm}, drop=0.2)) == last | before
    assert placed(bound("resnet", keys={"depth": 14, "norm": norm}, drop=0.2, groups=1)) == last
    everywhere = placed(bound("resnet", keys={"depth": 14, "norm": norm}, drop=0.2, groups=3))
    assert everywhere.keys() - (last | before).keys() == {
        "relu1",
        *(f"stage1.block{i}.{part}" for i in (1, 2) for part in parts),
    }


class Projecting(nn.Module):
    """A block of somebody's, with a convolution in its shortcut."""

    branch = "norm"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + self.shortcut(x))


def test_a_shortcut_with_a_convolution_has_it_once():
    layers = OrderedDict(block=Projecting(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(3, 2))
    model = nn.Sequential(layers)
    bind(model, [dropblock(drop=0.3)])
    assert placed(model) == {"block.norm": 0.3, "block.shortcut": 0.3}
    assert model(rng.normal(1, 4, 2, 5, 5)).shape == (4, 2)


def test_options_reach_the_layers():
    model = bound("cnn", drop=0.3, block_size=5, normalise="example", gamma="exact", schedule="constant")
    layer = model.get_submodule("relu2.dropblock")
    assert (layer.block_size, layer.normalise, layer.gamma, layer.schedule) == (5, "example", "exact", "constant")
    assert not layer.mixes_examples
    default = bound("cnn").get_submodule("relu2.dropblock")
    assert (default.drop, default.block_size, default.schedule) == (0.1, 3, "linear") and default.mixes_examples


def test_masks_commute_with_the_activation_behind_a_norm():
    """Behind the norm of a block, whose activation is a function, or behind the activation: the same."""
    x = rng.normal(1, 4, 3, 6, 6)
    layer = DropBlock(0.3, 2)
    assert torch.allclose(torch.relu(layer(x)).mean(), layer(torch.relu(x)).mean(), rtol=1e-6)
    assert torch.equal(torch.relu(layer(x)), layer(torch.relu(x)))


def test_of_drop_0_the_model_is_untouched_and_without_convolutions_it_is_refused():
    model = MODELS["cnn"]((1, 16, 16), 3)
    before = str(copy.deepcopy(model))
    assert bind(model, [REGULARIZERS["dropblock"](drop=0.0)]) == PLAIN
    assert str(model) == before
    with pytest.raises(ValueError, match=r"needs convolutions; cnn, conv-2, conv-4, conv-6 and resnet have them"):
        bind(MODELS["mlp"]((1, 8, 8), 3), [dropblock()])
