"""Batch norms are found by class, whatever they are called; frozen ones are fixed maps in training, too."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.models import batch_norm
from fedsim.models.convolutional import cnn
from fedsim.models.mlp import mlp
from fedsim.models.residual import resnet_8


class Mine(nn.BatchNorm1d):
    """Somebody's own batch norm, with a tensor more."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.extra = nn.Parameter(torch.ones(1))


class Odd(nn.Module):
    """Batch norms without "bn" or "norm" in their names, and a layer that has it and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.bn_like = nn.Linear(4, 6)
        self.inner = nn.Sequential(nn.BatchNorm1d(6), nn.Tanh(), Mine(6))
        self.bare = nn.BatchNorm1d(6, affine=False)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.bare(self.inner(self.bn_like(x)))))
        return logits


HELD = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_tensors_are_those_of_batch_norms_by_class() -> None:
    expected = [f"inner.0.{name}" for name in HELD] + [f"inner.2.{name}" for name in [*HELD, "extra"]]
    expected += [f"bare.{name}" for name in HELD[2:]]
    assert sorted(batch_norm.tensors(Odd())) == sorted(expected)
    assert batch_norm.statistics(Odd()) == tuple(
        (f"{path}.running_mean", f"{path}.running_var") for path in ("inner.0", "inner.2", "bare")
    )
    assert batch_norm.tensors(nn.BatchNorm1d(3)) == tuple(HELD)  # the model itself is one


@pytest.mark.parametrize(
    "model", [mlp((8,), 3, norm="batch"), cnn((1, 8, 8), 3, norm="batch"), resnet_8((1, 8, 8), 3, norm="batch")]
)
def test_what_is_left_of_a_model_of_the_zoo_has_no_batch_norm(model: nn.Module) -> None:
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    names = batch_norm.tensors(model)
    assert norms and len(names) == 5 * norms == len(set(names))
    assert not [name for name in model.state_dict() if name not in names and name.rpartition(".")[2] in HELD[2:]]


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_a_model_without_is_refused_and_told_who_has_it(norm: str) -> None:
    for asked in (batch_norm.tensors, batch_norm.statistics, batch_norm.freeze):
        with pytest.raises(ValueError, match=r"^needs batch norm, but the model has none; mlp, .* norm: batch$"):
            asked(cnn((1, 8, 8), 3, norm=norm))


def test_statistics_cannot_be_used_where_none_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))
    assert batch_norm.tensors(model) == ("1.weight", "1.bias")
    for asked in (batch_norm.statistics, batch_norm.freeze):
        with pytest.raises(ValueError, match=r"^needs running statistics, but the batch norm 1 keeps none$"):
            asked(model)


def frozen() -> nn.Module:
    """With statistics, scales and shifts that are not those of a new layer."""
    with rng.torch_seeded(1):
        model = Odd().double()
    for number, name in enumerate(batch_norm.tensors(model)):
        tensor = model.state_dict()[name]
        if tensor.is_floating_point():
            tensor.copy_(0.5 + rng.uniform(number, *tensor.shape, dtype=torch.float64))
    batch_norm.freeze(model)
    return model


@pytest.mark.parametrize("carried", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_frozen_batch_norm_is_its_closed_form_in_training_and_keeps_every_bit(carried) -> None:
    model = carried(frozen()).train()
    x, layer = 3 * rng.normal(2, 7, 6, dtype=torch.float64) - 1, model.inner[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = {name: layer.state_dict()[name] for name in HELD}
    expected = (x - own["running_mean"]) / torch.sqrt(own["running_var"] + 1e-5) * own["weight"] + own["bias"]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[:1]), expected[:1], rtol=1e-12, atol=1e-12)  # one example will do
    model(rng.normal(3, 5, 4, dtype=torch.float64)).square().sum().backward()
    assert p.same_bits(before, model.state_dict())
    named = dict(model.named_parameters())
    assert {name for name, t in named.items() if t.grad is None} == set(batch_norm.tensors(model)) & named.keys()
    trainable, buffers = p.of(model)
    assert not trainable.keys() & set(batch_norm.tensors(model))
    assert set(batch_norm.tensors(model)) == buffers.keys()
