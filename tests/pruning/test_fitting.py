"""The model that parameters belong to, by their shapes, and first parameters of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from smaller import some
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.models.zoo import MODELS
from fedsim.pruning.channels import groups, shrunk
from fedsim.pruning.fitting import fits, fitted, redrawn

SHAPE = (1, 12, 12)


def cnn(norm="batch", seed=1):
    with rng.torch_seeded(seed):
        return MODELS["cnn"](input_shape=SHAPE, num_classes=3, channels=[4, 6], kernel=3, hidden=5, norm=norm)


def tensors(model):
    params, buffers = p.of(model)
    return {**params, **buffers}


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_a_model_that_lost_channels_is_found_by_the_shapes_of_its_parameters(norm, seed):
    model = cnn(norm)
    small = shrunk(model, some(groups(model, SHAPE), seed), SHAPE)
    found = fitted(model, tensors(small), SHAPE)
    assert {n: t.shape for n, t in tensors(found).items()} == {n: t.shape for n, t in tensors(small).items()}
    found.load_state_dict(tensors(small), strict=False)
    x = rng.normal(3, 2, *SHAPE)
    assert torch.equal(found.eval()(x), small.eval()(x))
    assert fits(found, tensors(small)) and fits(small, tensors(found))


def test_one_channel_that_is_gone_is_seen():
    model = cnn()
    small = fitted(model, tensors(shrunk(model, {"conv1": torch.arange(3), "fc1": torch.arange(4)}, SHAPE)), SHAPE)
    assert (small.conv1.out_channels, small.conv2.in_channels, small.head.in_features) == (3, 3, 4)


def test_the_model_itself_is_returned_where_nothing_is_gone_and_never_changed():
    model = cnn()
    before = {n: t.clone() for n, t in tensors(model).items()}
    assert fitted(model, tensors(model), SHAPE) is model
    fitted(model, tensors(shrunk(model, {"conv1": torch.tensor([1, 3])}, SHAPE)), SHAPE)
    assert p.same_bits(tensors(model), before)


def test_parameters_that_are_missing_or_unknown_say_nothing_and_other_shapes_are_refused():
    model = cnn()
    own = tensors(model)
    assert fits(model, {**own, "unknown": torch.zeros(3)}) and fits(model, {})
    assert not fits(model, {"head.weight": own["head.weight"][:2]})
    with pytest.raises(ValueError, match=r"head.weight: shape \(2, 5\) fits neither"):
        fitted(model, {**own, "head.weight": own["head.weight"][:2]}, SHAPE)
    larger = {**own, "fc1.weight": torch.zeros(7, own["fc1.weight"].shape[1])}
    with pytest.raises(ValueError, match="fc1"):
        fitted(model, larger, SHAPE)


def test_a_small_model_is_drawn_as_torch_draws_one_of_its_size():
    small = shrunk(cnn("none"), {"conv1": torch.arange(3), "conv2": torch.arange(2)}, SHAPE)
    params, buffers = redrawn(small, 11)
    with rng.torch_seeded(11):
        expected = nn.ModuleList([nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 3), nn.Linear(params["fc1.weight"].shape[1], 5)])
        expected.append(nn.Linear(5, 3))
    paths = ("conv1", "conv2", "fc1", "head")
    for path, layer in zip(paths, expected, strict=True):
        assert torch.equal(params[f"{path}.weight"], layer.weight) and torch.equal(params[f"{path}.bias"], layer.bias)
    assert not buffers and not p.same_bits(redrawn(small, 12)[0], params)


def test_norms_begin_anew():
    model = cnn()
    with torch.no_grad():
        for tensor in tensors(model).values():
            tensor.add_(3)
    params, buffers = redrawn(model, 1)
    for path in ("norm1", "norm2"):
        assert torch.equal(params[f"{path}.weight"], torch.ones_like(params[f"{path}.weight"]))
        assert not bool(params[f"{path}.bias"].any()) and not bool(buffers[f"{path}.running_mean"].any())


def test_a_layer_that_cannot_be_drawn_is_named():
    class Scaled(nn.Linear):
        pass

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match="1 is a Own, which has no reset_parameters"):
        redrawn(nn.Sequential(Scaled(2, 2), Own()), 1)
