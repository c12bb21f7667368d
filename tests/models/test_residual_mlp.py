import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsim import rng
from fedsim.models import places
from fedsim.models.residual_mlp import residual_mlp


def normed(x, norm, module):
    """The norms by their formulas, with scales and shifts."""
    if norm == "none":
        return x
    axis = 0 if norm == "batch" else 1
    mean, var = x.mean(axis, keepdim=True), x.var(axis, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * module.weight + module.bias


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_it_equals_its_formula_written_out(norm):
    model = residual_mlp((2, 3), 4, depth=3, width=5, norm=norm).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(rng.normal(rng.fold(1, name), *parameter.shape, dtype=torch.float64))
    x = rng.normal(2, 7, 2, 3, dtype=torch.float64)

    def linear(layer, x):
        return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    y = torch.relu(normed(linear(model.fc1, x.reshape(7, 6)), norm, model.norm1))
    for block in (model.stage1.block1, model.stage1.block2, model.stage1.block3):
        inner = torch.relu(normed(linear(block.fc1, y), norm, block.norm1))
        y = torch.relu(y + normed(linear(block.fc2, inner), norm, block.norm2))
    assert torch.allclose(model(x), linear(model.head, y), rtol=1e-9, atol=1e-11)


def test_it_has_two_layers_a_block_and_two_more_and_biases_without_a_norm():
    model = residual_mlp((6,), 4, depth=5)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 12
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Linear))
    normed = residual_mlp((6,), 4, depth=5, norm="layer")
    assert [m.bias is None for m in normed.modules() if isinstance(m, nn.Linear)] == [True] * 11 + [False]
    assert residual_mlp((6,), 4)(torch.ones(2, 6)).shape == (2, 4)


def test_regularisers_find_its_blocks():
    found = places.blocks(residual_mlp((6,), 4, depth=2))
    assert [block.branch for block in found] == ["stage1.block1.norm2", "stage1.block2.norm2"]
    assert [block.shortcut for block in found] == ["stage1.block1.shortcut", "stage1.block2.shortcut"]


def test_a_hundred_blocks_with_a_norm_have_a_finite_loss_at_first():
    with rng.torch_seeded(1):
        model = residual_mlp((6,), 4, depth=100, norm="layer")
    assert F.cross_entropy(model(rng.normal(1, 8, 6)), torch.arange(8) % 4) < 10
