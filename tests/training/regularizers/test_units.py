from typing import Any

import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.models import places
from fedsim.models.layers.maxout import Maxout
from fedsim.models.zoo import MODELS
from fedsim.training import regularizers as r
from fedsim.training.objective import PLAIN
from fedsim.training.steps import chain_of


def build(name: str, **keys: Any) -> nn.Module:
    with rng.torch_seeded(3):
        return MODELS[name](input_shape=(1, 8, 8), num_classes=3, **keys)


def cnn(norm: str = "none") -> nn.Module:
    return build("cnn", channels=[4, 6], kernel=3, hidden=8, norm=norm)


def maxed(model: nn.Module) -> list[str]:
    return [path.rpartition(".")[0] for path, m in model.named_modules() if isinstance(m, Maxout)]


def test_a_model_with_it_by_a_slow_loop() -> None:
    model, x = build("mlp", hidden=[5, 4]), rng.normal(1, 3, 1, 8, 8)
    assert r.bind(model, [r.maxout(pieces=3)], key=2) == PLAIN
    params = {name: tensor.tolist() for name, tensor in p.of(model)[0].items()}
    out = model(x).tolist()
    for row, found in zip(x.flatten(1).tolist(), out, strict=True):
        values = row
        for layer, units in (("fc1", 5), ("fc2", 4)):
            weight, bias = params[f"{layer}.weight"], params[f"{layer}.bias"]
            affine = [sum(w * v for w, v in zip(weight[i], values, strict=True)) + bias[i] for i in range(3 * units)]
            values = [max(affine[3 * i : 3 * i + 3]) for i in range(units)]
        weight, bias = params["head.weight"], params["head.bias"]
        expected = [sum(w * v for w, v in zip(weight[c], values, strict=True)) + bias[c] for c in range(3)]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("where", ["hidden", "convolutions", "all"])
def test_with_a_piece_of_zeros_it_is_relu(where: Any) -> None:
    """Bit for bit against ReLU of the layer's own outputs, and as the plain model up to rounding."""
    model, x = cnn(), rng.normal(1, 3, 1, 8, 8)
    plain = model(x)
    r.maxout(where=where).bind(model, PLAIN)
    layers = [model.get_submodule(path) for path in maxed(model)]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.data[1::2] = 0.0
        layer.register_forward_pre_hook(lambda layer, args: vars(layer).__setitem__("given", args[0]))
    assert torch.allclose(model(x), plain, rtol=1e-4, atol=1e-6)
    for layer in layers:
        own = type(layer).forward(layer, vars(layer)["given"])  # without what is attached
        assert torch.equal(layer(vars(layer)["given"]), own[:, ::2].relu())


def test_names_stay_and_shapes_say_how_many_pieces() -> None:
    model = cnn("group")
    before = p.of(model)[0]
    r.maxout(pieces=3, where="all").bind(model, PLAIN)
    after = p.of(model)[0]
    assert [*after] == [*before] and maxed(model) == ["conv1", "conv2", "fc1"]
    for layer in ("conv1", "conv2", "fc1"):
        for name in ("weight", "bias"):
            assert torch.equal(after[f"{layer}.{name}"][::3], before[f"{layer}.{name}"])
            assert len(after[f"{layer}.{name}"]) == 3 * len(before[f"{layer}.{name}"])
    for path in ("relu1", "relu2", "fc_relu1"):
        assert type(model.get_submodule(path)) is nn.Identity
    assert torch.isfinite(model(rng.normal(1, 2, 1, 8, 8))).all()
    assert model.get_submodule("conv1").out_channels == 12 and model.get_submodule("fc1").out_features == 24
    assert chain_of(model) is None  # so no path by hand is taken for a plain one


def test_other_layers_find_their_place_behind_the_max() -> None:
    model = cnn("group")
    r.bind(model, [r.dropout(p=0.3), r.maxout(where="all"), r.dropconnect(), r.targeted_dropout()])
    units = [*places.convolutions(model), *places.hidden(model)]
    assert [(unit.end, unit.activation) for unit in units] == [("relu1", None), ("relu2", None), ("fc_relu1", None)]
    assert "fc_relu1.dropout" in dict(model.named_modules())
    assert model(rng.normal(1, 2, 1, 8, 8)).shape == (2, 3)


def test_only_units_with_a_relu_change() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    r.maxout().bind(model, PLAIN)
    assert maxed(model) == ["2"] and isinstance(model[1], nn.Tanh)
    resnet = build("resnet", depth=8)
    r.maxout(where="convolutions").bind(resnet, PLAIN)
    assert maxed(resnet) == ["conv1"]


def test_a_relu_that_serves_elsewhere_stays_there() -> None:
    relu = nn.ReLU()
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 5), relu), "b": relu, "head": nn.Linear(5, 2)})
    r.maxout().bind(model, PLAIN)
    assert type(model["a"][1]) is nn.Identity and model["b"] is relu  # type: ignore[index]


def test_a_model_without_a_place_is_refused_unchanged() -> None:
    message = r"needs hidden linear layers followed by nn\.ReLU; mlp, 2nn, .* conv-6 have them"
    tanh = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    for model in (build("resnet", depth=8), build("linear"), tanh):
        with pytest.raises(ValueError, match=message):
            r.maxout().bind(model, PLAIN)
    assert tanh[0].out_features == 5
    with pytest.raises(ValueError, match=r"needs convolutions followed by nn\.ReLU; cnn, .* resnet have them"):
        r.maxout(where="convolutions").bind(build("mlp"), PLAIN)


def test_new_pieces_follow_the_key() -> None:
    weights = []
    for key in (1, 1, 2):
        model = cnn()
        r.bind(model, [r.maxout()], key=key)
        weights.append(p.of(model)[0]["fc1.weight"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
