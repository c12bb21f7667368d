import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.norms import norm_1d, norm_2d, num_groups

EPSILON = 1e-5  # torch's default for all of them


def maps(batch: int, channels: int) -> Tensor:
    return 3.0 * rng.normal(5, batch, channels, 3, 2, dtype=torch.float64) - 1.0


def by_hand(x: Tensor, groups: int, scale: Tensor, shift: Tensor) -> Tensor:
    """Each group of each example minus its mean, over its root mean square, one after another."""
    out = torch.empty_like(x)
    width = x.shape[1] // groups
    for n in range(x.shape[0]):
        for g in range(groups):
            members = range(g * width, (g + 1) * width)
            numbers = [v for c in members for v in x[n, c].reshape(-1).tolist()]
            mean = sum(numbers) / len(numbers)
            variance = sum((v - mean) ** 2 for v in numbers) / len(numbers)
            for c in members:
                out[n, c] = (x[n, c] - mean) / (variance + EPSILON) ** 0.5 * scale[c] + shift[c]
    return out


@pytest.mark.parametrize(("name", "channels", "groups"), [("layer", 6, 1), ("group", 6, 1), ("group", 24, 3)])
def test_layer_and_group_norm_equal_the_closed_form(name: str, channels: int, groups: int) -> None:
    norm = norm_2d(name, channels).double()
    scale, shift = rng.normal(1, 2, channels, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
    x = maps(2, channels)
    torch.testing.assert_close(norm(x).detach(), by_hand(x, groups, scale, shift), rtol=1e-10, atol=1e-10)


def test_batch_norm_equals_the_closed_form_in_training_and_in_evaluation() -> None:
    norm = norm_2d("batch", 2).double()
    x = maps(3, 2)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    rows = slice(None), None, None
    expected = (x - mean[rows]) / torch.sqrt(variance[rows] + EPSILON)
    torch.testing.assert_close(norm(x).detach(), expected, rtol=1e-10, atol=1e-10)
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * x.var((0, 2, 3), unbiased=True)
    expected = (x - running_mean[rows]) / torch.sqrt(running_var[rows] + EPSILON)
    torch.testing.assert_close(norm.eval()(x).detach(), expected, rtol=1e-10, atol=1e-10)


def test_no_norm_returns_its_input_bit_for_bit_and_has_no_parameters() -> None:
    norm = norm_2d("none", 4)
    x = maps(2, 4)
    assert torch.equal(norm(x), x)
    assert not list(norm.parameters())


@settings(deadline=None, max_examples=100)
@given(channels=st.integers(1, 2048))
def test_groups_are_the_most_that_keep_the_rule(channels: int) -> None:
    groups = num_groups(channels)
    allowed = [g for g in range(1, 33) if channels % g == 0 and channels / g >= 8]
    assert groups == (max(allowed) if allowed else 1)


def test_group_norm_does_not_erase_maps_of_one_pixel() -> None:
    x = rng.normal(2, 3, 16, 1, 1)
    assert norm_2d("group", 16)(x).abs().mean() > 0.5


def test_an_unknown_norm_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="norm must be none, batch, group or layer, got 'instance'"):
        norm_2d("instance", 4)


UNITS = 3.0 * rng.normal(6, 5, 24, dtype=torch.float64) - 1.0


@pytest.mark.parametrize(("name", "groups"), [("layer", 1), ("group", 3)])
def test_layer_and_group_norm_of_units_equal_the_closed_form_and_torch(name: str, groups: int) -> None:
    norm = norm_1d(name, 24).double()
    scale, shift = rng.normal(1, 2, 24, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(scale)
        norm.bias.copy_(shift)
    expected = by_hand(UNITS[:, :, None], groups, scale, shift)[:, :, 0]
    torch.testing.assert_close(norm(UNITS).detach(), expected, rtol=1e-10, atol=1e-10)
    if name == "layer":
        torch_s = torch.nn.functional.layer_norm(UNITS, (24,), scale, shift)
    else:
        torch_s = torch.nn.functional.group_norm(UNITS, groups, scale, shift)
    torch.testing.assert_close(norm(UNITS).detach(), torch_s, rtol=1e-12, atol=1e-12)


def test_batch_norm_of_units_is_torch_s_over_the_batch() -> None:
    norm, mean, var = norm_1d("batch", 24).double(), torch.zeros(24).double(), torch.ones(24).double()
    expected = torch.nn.functional.batch_norm(UNITS, mean, var, training=True)
    torch.testing.assert_close(norm(UNITS).detach(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * UNITS.var(0), rtol=1e-12, atol=1e-12)


def test_no_norm_of_units_is_the_identity_and_an_unknown_one_is_refused() -> None:
    assert torch.equal(norm_1d("none", 24)(UNITS), UNITS)
    with pytest.raises(ValueError, match="norm must be none, batch, group or layer, got 'instance'"):
        norm_1d("instance", 4)
