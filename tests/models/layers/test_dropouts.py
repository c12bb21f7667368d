import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers.dropouts import Dropout, replace_dropout, unkeyed
from fedsim.models.layers.keyed import key_names, step_keys


def run(model: nn.Module, x: Tensor, step_key: int | Tensor) -> Tensor:
    out = functional_call(model, step_keys(key_names(model), step_key), (x,))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_the_rate_of_zeros_is_p_and_the_mean_stays(p: float) -> None:
    """n = 10^6 draws; both intervals are 5 standard deviations wide: false alarms below 6e-7 each, key fixed."""
    n = 10**6
    out = run(Dropout(p), torch.ones(n), 11)
    zeros = int((out == 0).sum())
    assert abs(zeros - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert abs(float(out.double().mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)


def test_each_entry_is_zero_or_scaled_as_its_own_draw_says() -> None:
    x = rng.normal(1, 3, 4, dtype=torch.float64)
    out = run(Dropout(0.4), x, 5)
    key = rng.fold(5, "")
    for i, (value, got) in enumerate(zip(x.reshape(-1).tolist(), out.reshape(-1).tolist(), strict=True)):
        draw = float(rng.uniform(key, i + 1)[i])
        assert got == (value / (1 - 0.4) if draw >= 0.4 else 0.0)
    assert out.dtype == torch.float64


def test_gradients_pass_through_kept_entries_only() -> None:
    x = rng.normal(1, 50).requires_grad_()
    out = run(Dropout(0.25), x, 2)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (out != 0) / 0.75)


def test_vmap_gives_each_client_the_mask_it_has_alone() -> None:
    model = nn.Sequential(Dropout(0.5), nn.ReLU(), Dropout(0.3))
    x = rng.normal(3, 4, 8, 5).abs() + 0.1  # (clients, batch, features)
    step = torch.tensor([7, -1, 2**61, 8])
    together = vmap(lambda x, key: run(model, x, key))(x, step)
    alone = torch.stack([run(model, x[c], int(step[c])) for c in range(4)])
    assert torch.equal(together, alone)


def test_other_steps_and_other_layers_have_other_masks() -> None:
    """Two independent masks of 2000 at p = 0.5 agree in 1000 +- 22; 5 standard deviations: false alarms below 6e-7."""
    ones = torch.ones(2000)
    model = nn.ModuleDict({"a": Dropout(0.5), "b": Dropout(0.5)})
    first, second = step_keys(key_names(model), 1), step_keys(key_names(model), 2)
    masks = [functional_call(Dropout(0.5), {"key": k}, (ones,)) > 0 for k in (*first.values(), *second.values())]
    for i in range(4):
        for j in range(i):
            assert abs(int((masks[i] == masks[j]).sum()) - 1000) < 5 * math.sqrt(500)


def test_rows_added_to_a_batch_change_no_other_row() -> None:
    x = rng.normal(3, 6, 2, 5)
    assert torch.equal(run(Dropout(0.5), x, 4)[:3], run(Dropout(0.5), x[:3], 4))


@settings(deadline=None, max_examples=30)
@given(key=st.integers(0, 2**64 - 1), shape=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_p_zero_and_evaluation_are_the_identity_bit_for_bit(key: int, shape: list[int]) -> None:
    x = rng.normal(key, *shape)
    assert torch.equal(run(Dropout(0.0), x, key), x)
    assert torch.equal(run(Dropout(0.9).eval(), x, key), x)


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_a_p_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got"):
        Dropout(p)


def test_replace_dropout_swaps_every_elementwise_dropout_and_keeps_p_and_mode() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.7), nn.Dropout2d(0.1)), nn.Dropout(0.0).eval()
    )
    assert replace_dropout(model) == ("1", "2.0", "3")
    layers = [model[1], model.get_submodule("2.0"), model[3]]
    assert [type(layer) for layer in layers] == [Dropout] * 3
    assert [(layer.p, layer.training) for layer in layers] == [(0.2, True), (0.7, True), (0.0, False)]
    assert key_names(model) == ("1.key", "2.0.key", "3.key")
    assert unkeyed(model) == ("2.1 (Dropout2d)",)
    assert replace_dropout(model) == ()


def test_a_dropout_under_two_names_becomes_two_layers() -> None:
    shared = nn.Dropout(0.5)
    model = nn.Sequential(shared, nn.Identity(), shared)
    assert replace_dropout(model) == ("0", "2")
    assert model[0] is not model[2]


def test_replace_dropout_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"got a bare nn\.Dropout"):
        replace_dropout(nn.Dropout(0.5))
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got 1.0"):
        replace_dropout(nn.Sequential(nn.Dropout(1.0)))


def test_unkeyed_names_every_torch_layer_that_draws_and_none_that_does_not() -> None:
    model = nn.ModuleDict(
        {
            "alpha": nn.AlphaDropout(0.1),
            "zero": nn.Dropout2d(0.0),
            "lstm": nn.LSTM(2, 2, num_layers=2, dropout=0.1),
            "gru": nn.GRU(2, 2),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
            "rrelu": nn.RReLU(),
            "plain": nn.Dropout(0.1),
            "keyed": Dropout(0.1),
        }
    )
    names = (
        "alpha (AlphaDropout)",
        "lstm (LSTM)",
        "attention (MultiheadAttention)",
        "rrelu (RReLU)",
        "plain (Dropout)",
    )
    assert unkeyed(model) == names
