from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedsim import rng
from fedsim.models.layers.keyed import key_names, step_keys
from fedsim.models.mlp import lenet_300_100, linear, mlp, two_nn


def test_linear_is_a_matrix_product_over_the_flattened_input() -> None:
    model = linear((2, 3, 1), 4).double()
    x = rng.normal(1, 5, 2, 3, 1, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in model.parameters())
    np.testing.assert_allclose(model(x).detach().numpy(), x.numpy().reshape(5, 6) @ weight.T + bias, rtol=1e-12)


def test_mlp_equals_numpy_layer_by_layer() -> None:
    model = mlp((3, 2), 4, hidden=[5, 7]).double()
    x = rng.normal(1, 6, 3, 2, dtype=torch.float64)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    assert list(weights) == [f"{layer}.{part}" for layer in ("fc1", "fc2", "head") for part in ("weight", "bias")]
    y = x.numpy().reshape(6, 6)
    for layer in ("fc1", "fc2"):
        y = np.maximum(y @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"], 0)
    y = y @ weights["head.weight"].T + weights["head.bias"]
    np.testing.assert_allclose(model(x).detach().numpy(), y, rtol=1e-10, atol=1e-12)


def test_mlp_without_hidden_layers_is_linear() -> None:
    assert [tuple(p.shape) for p in mlp((8,), 3, hidden=[]).parameters()] == [(3, 8), (3,)]


def test_mlp_without_dropout_has_no_keyed_layer_and_with_dropout_one_per_hidden_layer() -> None:
    assert key_names(mlp((8,), 3)) == ()
    assert key_names(mlp((8,), 3, hidden=[4, 5], dropout=0.5)) == ("fc_dropout1.key", "fc_dropout2.key")


def test_dropout_of_an_mlp_zeroes_hidden_units_by_step_key() -> None:
    model = mlp((8,), 3, hidden=[64], dropout=0.5)
    x = rng.normal(1, 4, 8)
    names = key_names(model)
    first, again, other = (functional_call(model, step_keys(names, key), (x,)) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    kept = rng.uniform(rng.fold(1, "fc_dropout1"), 4, 64) >= 0.5
    hidden = torch.relu(model.fc1(x)) * kept * 2
    torch.testing.assert_close(first, model.head(hidden))


@pytest.mark.parametrize("factory", [two_nn, lenet_300_100])
def test_paper_models_put_relu_between_layers_and_none_after_the_last(factory: Callable[..., nn.Module]) -> None:
    model = factory((1, 28, 28), 10)
    assert [type(m).__name__ for m in model] == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_a_norm_stands_between_each_hidden_layer_and_its_relu(norm: str) -> None:
    with rng.torch_seeded(1):
        model = mlp((3, 2), 4, hidden=[16, 8], norm=norm, dropout=0.5).double()
    layers = ["flatten", *(f"fc{part}{i}" for i in (1, 2) for part in ("", "_norm", "_relu", "_dropout")), "head"]
    assert list(dict(model.named_children())) == layers
    x = rng.normal(1, 6, 3, 2, dtype=torch.float64)
    y = x.flatten(1)
    for fc, size in ((model.fc1, 16), (model.fc2, 8)):
        y = y @ fc.weight.T + fc.bias
        grouped = y.view(6, max(1, size // 8) if norm == "group" else 1, -1)
        mean, var = (y.mean(0), y.var(0, unbiased=False)) if norm == "batch" else (None, None)
        if norm != "batch":
            mean = grouped.mean(2, keepdim=True).expand_as(grouped).reshape(6, size)
            var = grouped.var(2, unbiased=False, keepdim=True).expand_as(grouped).reshape(6, size)
        y = torch.relu((y - mean) / torch.sqrt(var + 1e-5))
    expected = y @ model.head.weight.T + model.head.bias
    for module in model:
        module.train(isinstance(module, nn.BatchNorm1d))  # without dropout, with the statistics of the batch
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factory", [mlp, two_nn, lenet_300_100])
def test_without_a_norm_the_first_weights_and_logits_are_what_they_were(factory: Callable[..., nn.Module]) -> None:
    with rng.torch_seeded(4):
        plain = factory((5,), 3)
    with rng.torch_seeded(4):
        normed = factory((5,), 3, norm="layer")
    assert "fc_norm1" not in dict(plain.named_children()) and "fc_norm2" in dict(normed.named_children())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, normed.state_dict()[name])
