import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers import dropouts
from fedsim.models.layers.dropouts import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
    replace_dropout,
    unkeyed,
)
from fedsim.models.layers.keyed import key_names, step_keys

TORCHS = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
    nn.AlphaDropout: AlphaDropout,
    nn.FeatureAlphaDropout: FeatureAlphaDropout,
}
MASKED = [  # layer of torch, shape of an input, shape of a mask
    (nn.Dropout, (5,), (5,)),
    (nn.Dropout, (3, 4, 2), (3, 4, 2)),
    (nn.Dropout1d, (7, 3), (7,)),  # without a batch axis
    (nn.Dropout1d, (5, 4, 3), (5, 4)),
    (nn.Dropout2d, (5, 4, 3), (5, 4)),  # not without a batch axis, but of one spatial axis
    (nn.Dropout2d, (5, 4, 3, 2), (5, 4)),
    (nn.Dropout2d, (5, 4), (5, 4)),  # deprecated in torch, and still found in models
    (nn.Dropout3d, (7, 3, 2, 2), (7,)),  # without a batch axis
    (nn.Dropout3d, (5, 4, 3, 2, 2), (5, 4)),
    (nn.Dropout3d, (7, 4, 3), (7,)),  # deprecated in torch
    (nn.AlphaDropout, (5,), (5,)),
    (nn.AlphaDropout, (3, 4, 2), (3, 4, 2)),
    (nn.FeatureAlphaDropout, (5, 4, 3, 2, 2), (5, 4)),
    (nn.FeatureAlphaDropout, (5, 4, 3, 2), (5, 4)),  # torch's page says: without a batch axis; its code does this
    (nn.FeatureAlphaDropout, (5, 4), (5, 4)),
]
ids = [f"{layer.__name__}-{len(shape)}" for layer, shape, _ in MASKED]
masked = pytest.mark.parametrize(("layer", "shape", "mask"), MASKED, ids=ids)


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


@masked
@pytest.mark.parametrize("p", [0.2, 0.6])
@pytest.mark.filterwarnings("ignore:dropout[23]d")
def test_with_torchs_own_mask_each_layer_is_torchs(
    layer: type[nn.Dropout], shape: tuple[int, ...], mask: tuple[int, ...], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients. The mask is that of torch's layer on ones, where only what is kept is positive."""
    theirs, ours = layer(p), TORCHS[layer](p)
    x, upstream = (rng.normal(key, *shape, dtype=torch.float64) for key in (1, 2))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with rng.torch_seeded(6):
        kept = theirs(torch.ones(shape)) > 0
    assert kept.any() and not kept.all()
    drawn = kept[(..., *[0] * (len(shape) - len(mask)))]
    assert torch.equal(drawn.reshape(*mask, *[1] * (len(shape) - len(mask))).expand(shape), kept)
    asked: list[tuple[int, ...]] = []

    def uniform(key: Tensor, *shape: int) -> Tensor:
        asked.append(shape)
        return torch.where(drawn, p, p - 1e-6)

    with rng.torch_seeded(6):
        expected = theirs(inputs[0])
    monkeypatch.setattr(dropouts.rng, "uniform", uniform)
    got = ours(inputs[1])
    assert asked == [mask]
    expected.backward(upstream)
    got.backward(upstream)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-12, atol=0)


@masked
def test_each_entry_or_channel_has_its_own_draw(
    layer: type[nn.Dropout], shape: tuple[int, ...], mask: tuple[int, ...]
) -> None:
    """A slow loop. Alpha dropout as in the paper: y = a * (x * d + alpha * (1 - d)) + b, d = 1 with probability q."""
    p = 0.4
    x = rng.normal(1, *shape, dtype=torch.float64)
    out, key = run(TORCHS[layer](p), x, 5), rng.fold(5, "")
    q, alpha = 1 - p, -1.7580993408473766
    a = (q + alpha**2 * q * (1 - q)) ** -0.5
    b = -a * (1 - q) * alpha
    for i, index in enumerate(itertools.product(*map(range, mask))):
        d = 1 if float(rng.uniform(key, math.prod(mask))[i]) >= p else 0
        for value, got in zip(x[index].reshape(-1).tolist(), out[index].reshape(-1).tolist(), strict=True):
            alphas = a * (value * d + alpha * (1 - d)) + b
            expected = alphas if "Alpha" in layer.__name__ else value * d / (1 - p)
            assert got == pytest.approx(expected, rel=1e-14, abs=1e-14)
    assert out.dtype == x.dtype


@pytest.mark.parametrize("layer", [Dropout1d, Dropout2d, Dropout3d])
def test_the_rate_of_dropped_channels_is_p_and_the_mean_stays(layer: type[Dropout1d]) -> None:
    """n = 200,000 channels; both intervals are 5 standard deviations wide: false alarms below 6e-7 each, key fixed."""
    n, p = 200_000, 0.3
    shape = {Dropout1d: (400, 500, 2), Dropout2d: (400, 500, 2, 1), Dropout3d: (400, 500, 1, 2, 1)}[layer]
    out = run(layer(p), torch.ones(shape), 11).reshape(n, 2)
    assert torch.equal(out[:, 0], out[:, 1])
    assert abs(int((out[:, 0] == 0).sum()) - n * p) < 5 * math.sqrt(n * p * (1 - p))
    assert abs(float(out.double().mean()) - 1) < 5 * math.sqrt(p / (1 - p) / n)


@pytest.mark.parametrize("layer", [AlphaDropout, FeatureAlphaDropout])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_zero_and_variance_one(layer: type[AlphaDropout], p: float) -> None:
    """n = 10^6 normal inputs; 5 standard errors, estimated from the sample: false alarms below 6e-7 each, key fixed."""
    n = 10**6
    out = run(layer(p), rng.normal(3, 1000, 1000, dtype=torch.float64), 11).reshape(-1)
    squares = (out - out.mean()) ** 2
    assert abs(float(out.mean())) < 5 * float(out.std()) / math.sqrt(n)
    assert abs(float(squares.mean()) - 1) < 5 * float(squares.std()) / math.sqrt(n)
    dropped = int(out.unique(return_counts=True)[1].max()) / n  # the only value that comes more than a few times
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / n)


@masked
def test_every_layer_is_the_identity_in_evaluation_and_keeps_the_dtype(
    layer: type[nn.Dropout], shape: tuple[int, ...], mask: tuple[int, ...]
) -> None:
    x = rng.normal(4, *shape)
    assert torch.equal(run(TORCHS[layer](0.6).eval(), x, 1), x)
    assert torch.equal(run(TORCHS[layer](0.0), x, 1), x)
    assert run(TORCHS[layer](0.5), x.bfloat16(), 1).dtype == torch.bfloat16


@masked
def test_every_layer_gives_a_client_under_vmap_what_it_has_alone_and_a_row_what_it_has_in_a_longer_batch(
    layer: type[nn.Dropout], shape: tuple[int, ...], mask: tuple[int, ...]
) -> None:
    model, step = nn.Sequential(TORCHS[layer](0.5)), torch.tensor([7, -1, 2**61])
    x = rng.normal(3, 3, *shape)
    together = vmap(lambda x, key: run(model, x, key))(x, step)
    assert torch.equal(together, torch.stack([run(model, x[c], int(step[c])) for c in range(3)]))
    assert len({tuple(out.reshape(-1).tolist()) for out in together}) == 3
    assert torch.equal(run(model, x[0], 9)[:2], run(model, x[0][:2], 9))


@pytest.mark.parametrize("layer", TORCHS)
def test_in_place_means_what_it_means_in_torch(layer: type[nn.Dropout]) -> None:
    """Torch's alpha layers take ``inplace`` and leave the input alone."""
    shape = (6, 5, 2, 2, 2) if layer is nn.Dropout3d else (6, 5, 2)
    if layer is nn.Dropout2d:
        shape = (6, 5, 2, 2)
    model = nn.Sequential(layer(0.5, inplace=True))
    theirs, ours = (rng.normal(1, *shape) for _ in range(2))
    with rng.torch_seeded(1):
        out = model(theirs)
    written = out.data_ptr() == theirs.data_ptr()
    assert written is ("Alpha" not in layer.__name__)
    replace_dropout(model)
    before = ours.clone()
    out = run(model, ours, 1)
    assert (out.data_ptr() == ours.data_ptr()) is written
    assert torch.equal(ours, before) is not written
    assert torch.equal(out, run(nn.Sequential(TORCHS[layer](0.5)), before, 1))


def test_channels_need_enough_axes() -> None:
    for shape in [(4,), (2, 3, 4, 5)]:
        with pytest.raises(RuntimeError):
            nn.Dropout1d()(torch.ones(shape))
        with pytest.raises(ValueError, match="Dropout1d needs an input of 2 or 3 axes, got shape"):
            Dropout1d(0.5)(torch.ones(shape))
    for layer in (Dropout2d, FeatureAlphaDropout):
        with pytest.raises(ValueError, match=rf"{layer.__name__} needs an input of 2 axes or more, got shape \(4,\)"):
            layer(0.5)(torch.ones(4))


def test_replace_dropout_swaps_every_dropout_of_torch_and_keeps_p_mode_and_inplace() -> None:
    class Mine(nn.Dropout):
        pass

    layers = [layer(0.1 * (i + 1), inplace=i % 2 == 0) for i, layer in enumerate(TORCHS)]
    model = nn.Sequential(nn.Linear(4, 4), *layers[:3], nn.Sequential(*layers[3:], nn.Dropout(0.0).eval(), Mine(0.5)))
    paths = ("1", "2", "3", "4.0", "4.1", "4.2", "4.3")
    assert replace_dropout(model) == paths
    new = [model.get_submodule(path) for path in paths]
    assert [type(layer) for layer in new] == [*TORCHS.values(), Dropout]
    assert [layer.p for layer in new] == [*(layer.p for layer in layers), 0.0]
    assert [layer.training for layer in new] == [True] * 6 + [False]
    assert [layer.inplace for layer in new] == [True, False, True, False, False, False, False]
    assert key_names(model) == tuple(f"{path}.key" for path in paths)
    assert unkeyed(model) == ("4.4 (Mine)",)
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
    with pytest.raises(ValueError, match=r"got a bare nn\.AlphaDropout"):
        replace_dropout(nn.AlphaDropout())


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
