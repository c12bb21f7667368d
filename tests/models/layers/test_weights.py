import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.layers.attaching import attach
from fedsim.models.layers.weights import (
    Affine,
    Stochastic,
    StochasticConv2d,
    StochasticLinear,
    add_noise,
    can_be_noisy,
    set_law,
)

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "rows": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 5)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (3, 2, 7, 6)),
    "reflect": (lambda: nn.Conv2d(2, 4, (3, 1), padding=(1, 0), padding_mode="reflect", bias=False), (3, 2, 5, 5)),
}
layers = pytest.mark.parametrize("name", LAYERS)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor if self.training else weight


class Plus(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1.0 if self.training else weight


class Law(Affine):
    regularizer = "mine"

    def forward(self, layer: Stochastic, x: Tensor, weight: Tensor) -> Tensor:
        return layer.affine(x, -weight, None)


class Other(Affine):
    regularizer = "yours"


def made(name: str) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
    make, shape = LAYERS[name]
    with rng.torch_seeded(1):
        layer = make()
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer, rng.normal(2, *shape)


@layers
def test_without_noise_it_is_torchs_layer_bit_for_bit(name: str) -> None:
    layer, x = made(name)
    expected, names = layer(x), [*layer.state_dict()]
    add_noise(layer, "times", Times(1.0))
    assert type(layer) in (StochasticLinear, StochasticConv2d)
    assert torch.equal(layer(x), expected) and [*layer.state_dict()] == names
    assert torch.equal(layer.eval()(x), expected)


@layers
def test_noises_work_on_the_weight_in_order_and_in_training_only(name: str) -> None:
    layer, x = made(name)
    plain, weight = layer(x), layer.weight.detach().clone()
    add_noise(layer, "times", Times(3.0))
    add_noise(layer, "plus", Plus())
    if isinstance(layer, nn.Linear):
        expected = F.linear(x, 3.0 * weight + 1.0, layer.bias)
    else:
        moved = copy.deepcopy(layer)
        moved.__class__ = nn.Conv2d
        moved.weight.data = 3.0 * weight + 1.0
        expected = moved(x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.eval()(x), plain)
    assert torch.equal(layer.weight, weight)


def test_a_law_says_how_the_weight_is_applied() -> None:
    layer, x = made("linear")
    add_noise(layer, "times", Times(2.0))
    set_law(layer, Law())
    assert torch.equal(layer(x), F.linear(x, -2.0 * layer.weight))


def test_a_layer_takes_one_law_and_one_noise_of_a_name() -> None:
    layer, _ = made("linear")
    set_law(layer, Law())
    with pytest.raises(ValueError, match="mine and yours both say how a layer applies its weight"):
        set_law(layer, Other())
    add_noise(layer, "times", Times(2.0))
    with pytest.raises(ValueError, match="the model has times already, at a StochasticLinear"):
        add_noise(layer, "times", Times(3.0))


def test_hooks_children_and_mode_stay() -> None:
    layer, x = made("linear")
    attach(layer.eval(), "twice", Times(1.0))
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("called"))
    add_noise(layer, "times", Times(2.0))
    set_law(layer, Law())
    layer(x)
    assert seen == ["called"] and not any(module.training for module in layer.modules())
    assert isinstance(layer.twice, Times)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_it_can_be_copied_and_sent(again: object) -> None:
    assert callable(again)
    for name in ("linear", "conv"):
        layer, x = made(name)
        add_noise(layer, "times", Times(2.0))
        other = again(layer)
        assert type(other) is type(layer) and torch.equal(other(x), layer(x))


def test_only_torchs_own_classes_are_changed() -> None:
    class Mine(nn.Linear):
        pass

    assert can_be_noisy(nn.Linear(1, 1)) and can_be_noisy(nn.Conv2d(1, 1, 1))
    others = [Mine(1, 1), nn.LSTM(1, 1), nn.Embedding(2, 1), nn.Conv1d(1, 1, 1), nn.MultiheadAttention(2, 1).out_proj]
    assert not any(can_be_noisy(other) for other in others)
    noisy = nn.Linear(1, 1)
    add_noise(noisy, "times", Times(2.0))
    assert can_be_noisy(noisy)
