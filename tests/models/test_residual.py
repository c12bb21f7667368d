import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from fedsim import params, rng
from fedsim.models.residual import Block, resnet, resnet_8, resnet_20


def convolution(x: Tensor, conv: nn.Conv2d, stride: int) -> Tensor:
    """3 x 3 with padding 1, as one matrix product over patches."""
    height, width = (-(-side // stride) for side in x.shape[2:])
    patches = F.unfold(x, 3, padding=1, stride=stride)
    out = conv.weight.reshape(conv.out_channels, -1) @ patches
    out = out if conv.bias is None else out + conv.bias[:, None]
    return out.reshape(len(x), conv.out_channels, height, width)


def by_hand(model: nn.Module, x: Tensor, blocks: int) -> Tensor:
    y = torch.relu(model.norm1(convolution(x, model.conv1, 1)))
    for stage in (1, 2, 3):
        for i in range(1, blocks + 1):
            block = model.get_submodule(f"stage{stage}.block{i}")
            stride = 2 if stage > 1 and i == 1 else 1
            inner = torch.relu(block.norm1(convolution(y, block.conv1, stride)))
            branch = block.norm2(convolution(inner, block.conv2, 1))
            shortcut = torch.zeros_like(branch)
            shortcut[:, : y.shape[1]] = y[:, :, ::stride, ::stride]
            y = torch.relu(shortcut + branch)
    return y.mean((2, 3)) @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize(("norm", "depth"), [("group", 8), ("layer", 14), ("none", 14)])
def test_resnet_equals_its_formula_written_out(norm: str, depth: int) -> None:
    model = resnet((2, 9, 7), 5, depth=depth, norm=norm).double()
    x = rng.normal(1, 2, 2, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(model(x), by_hand(model, x, (depth - 2) // 6), rtol=1e-9, atol=1e-11)


def test_the_named_depths_are_resnets_of_that_depth() -> None:
    for factory, depth in ((resnet_8, 8), (resnet_20, 20)):
        named, plain = factory((1, 8, 8), 10), resnet((1, 8, 8), 10, depth=depth)
        shapes = [{n: p.shape for n, p in model.named_parameters()} for model in (named, plain)]
        assert shapes[0] == shapes[1]
        layers = [m for m in named.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(layers) == depth


def test_the_default_norm_is_group_norm_without_buffers() -> None:
    model = resnet((1, 8, 8), 10, depth=8)
    assert not list(model.buffers())
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 7


def test_without_a_norm_the_convolutions_have_biases() -> None:
    convolutions = [m for m in resnet((1, 8, 8), 10, depth=8, norm="none").modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convolutions)
    convolutions = [m for m in resnet((1, 8, 8), 10, depth=8, norm="layer").modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in convolutions)


@pytest.mark.parametrize("depth", [2, 7, 9, 11, 18, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"model.depth: must be 6n \+ 2 .*, got {depth}"):
        resnet((1, 8, 8), 10, depth=depth)


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model.name: resnet needs image inputs .*, got shape \(28, 28\)"):
        resnet((28, 28), 10)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
def test_gradients_of_a_widening_block_equal_finite_differences(norm: str) -> None:
    with rng.torch_seeded(4):
        block = Block(2, 3, stride=2, norm=norm).double()
    trainable, buffers = params.of(block)
    x = rng.normal(1, 2, 2, 5, 4, dtype=torch.float64)

    def out(x: Tensor, *values: Tensor) -> Tensor:
        held = {name: b.clone() for name, b in buffers.items()}
        return functional_call(block, {**dict(zip(trainable, values, strict=True)), **held}, (x,))

    assert gradcheck(out, [x.requires_grad_(), *(p.requires_grad_() for p in trainable.values())])


def test_a_block_takes_its_input_as_it_is_with_the_signs_it_has() -> None:
    with rng.torch_seeded(4):
        block = Block(2, 3, stride=2, norm="none").double()
    x = rng.normal(1, 2, 2, 5, 4, dtype=torch.float64)
    inner = convolution(torch.relu(convolution(x, block.conv1, 2)), block.conv2, 1)
    shortcut = torch.cat([x[:, :, ::2, ::2], torch.zeros(2, 1, 3, 2, dtype=torch.float64)], 1)
    torch.testing.assert_close(block(x), torch.relu(shortcut + inner), rtol=1e-9, atol=1e-11)
