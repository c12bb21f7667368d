from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from fedsim import params, rng
from fedsim.models.convolutional import cnn, conv_2, conv_4, conv_6


def by_hand(model: nn.Module, x: Tensor, order: list[str]) -> Tensor:
    """Forward pass with scipy's correlation and numpy; ``order`` names the layers with weights and "pool"."""
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    y = x.numpy()
    for layer in order:
        if layer == "pool":
            n, c, h, w = y.shape
            y = y[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
            continue
        weight, bias = weights[f"{layer}.weight"], weights[f"{layer}.bias"]
        if weight.ndim == 4:
            rows = [
                [sum(correlate2d(i, k, mode="same") for i, k in zip(one, w, strict=True)) for w in weight] for one in y
            ]
            y = np.array(rows) + bias[:, None, None]
        else:
            y = y.reshape(len(y), -1) @ weight.T + bias
        y = y if layer == "head" else np.maximum(y, 0)
    return torch.from_numpy(y)


def test_cnn_equals_scipy_layer_by_layer() -> None:
    model = cnn((2, 9, 6), 3, channels=[3, 4], kernel=5, hidden=7).double()
    x = rng.normal(1, 2, 2, 9, 6, dtype=torch.float64)
    expected = by_hand(model, x, ["conv1", "pool", "conv2", "pool", "fc1", "head"])
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-9, atol=1e-11)


def test_conv_4_equals_scipy_layer_by_layer() -> None:
    model = conv_4((1, 4, 4), 3).double()
    x = rng.normal(1, 1, 1, 4, 4, dtype=torch.float64)
    order = ["conv1", "conv2", "pool", "conv3", "conv4", "pool", "fc1", "fc2", "head"]
    torch.testing.assert_close(model(x).detach(), by_hand(model, x, order), rtol=1e-9, atol=1e-11)


def test_the_small_cnn_of_the_quickstart_has_the_sizes_its_yaml_says() -> None:
    model = cnn((1, 8, 8), 10, channels=[16, 32], kernel=3, hidden=64)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "conv1.weight": (16, 1, 3, 3),
        "conv2.weight": (32, 16, 3, 3),
        "fc1.weight": (64, 32 * 2 * 2),
        "head.weight": (10, 64),
    }


def test_norms_stand_between_convolution_and_relu() -> None:
    model = cnn((1, 8, 8), 10, channels=[16], kernel=3, norm="group")
    assert [type(m).__name__ for m in model][:4] == ["Conv2d", "GroupNorm", "ReLU", "MaxPool2d"]
    assert next(name for name, _ in conv_2((1, 8, 8), 10, norm="batch").named_buffers()) == "norm1.running_mean"


def test_one_pixel_is_left_of_the_smallest_image_of_conv_6() -> None:
    model = conv_6((1, 8, 8), 10)
    assert model.fc1.in_features == 256
    assert model(rng.normal(1, 2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("factory", "name", "shape", "times", "least"),
    [(cnn, "cnn", (1, 8, 3), 2, 4), (conv_2, "conv-2", (3, 1, 9), 1, 2), (conv_6, "conv-6", (1, 7, 8), 3, 8)],
)
def test_an_image_too_small_is_refused(
    factory: Callable[..., nn.Module], name: str, shape: tuple[int, ...], times: int, least: int
) -> None:
    rule = rf"model.name: {name} halves its input {times} times and needs images of at least {least} x {least}, got"
    with pytest.raises(ValueError, match=rule):
        factory(shape, 10)


def test_inputs_that_are_no_images_are_refused() -> None:
    rule = r"^model.name: cnn needs image inputs \(channels, height, width\), got shape \(64,\)$"
    with pytest.raises(ValueError, match=rule):
        cnn((64,), 10)


def test_an_even_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.kernel: must be odd, got 4"):
        cnn((1, 8, 8), 10, kernel=4)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "layer"])
def test_gradients_equal_finite_differences(norm: str) -> None:
    with rng.torch_seeded(3):
        model = cnn((1, 4, 4), 3, channels=[2, 3], kernel=3, hidden=4, norm=norm).double()
    trainable, buffers = params.of(model)
    x = rng.normal(1, 3, 1, 4, 4, dtype=torch.float64)

    def logits(x: Tensor, *values: Tensor) -> Tensor:
        held = {name: b.clone() for name, b in buffers.items()}
        return functional_call(model, {**dict(zip(trainable, values, strict=True)), **held}, (x,))

    inputs = [x.requires_grad_(), *(p.requires_grad_() for p in trainable.values())]
    assert gradcheck(logits, inputs)
