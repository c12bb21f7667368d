"""Reconstruction from second moments, against exhaustive search, scikit-learn and numpy on the data, and slow loops."""

import itertools
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn import functional as F

from fedsim import rng
from fedsim.pruning import reconstruction as r

CONVS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1, "stride": 2},
    "uneven": {"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 2), "dilation": (2, 1)},
    "same": {"kernel_size": (3, 2), "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}
keys = st.integers(0, 10**6)


def contributions(key, samples=40, channels=6):
    """Explicit ones, (samples, channels), of different sizes and not independent."""
    mixed = rng.normal(rng.fold(key, "mix"), channels, channels, dtype=torch.float64)
    return rng.normal(key, samples, channels, dtype=torch.float64) @ mixed


def stack(dtype=torch.float64, **conv):
    with rng.torch_seeded(1):
        layers = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, **conv), nn.ReLU(), nn.Flatten()
        wide = nn.Sequential(*layers)(torch.zeros(1, 1, 8, 8)).shape[1]
        return nn.Sequential(*layers, nn.Linear(wide, 4)).to(dtype)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images / 16.0)[:, None], torch.tensor(data.target)


@pytest.fixture(scope="module")
def trained(digits):
    with rng.torch_seeded(2):
        model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        ).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(40):
        batch = slice(step * 32, (step + 1) * 32)
        optimizer.zero_grad()
        F.cross_entropy(model(digits[0][batch]), digits[1][batch]).backward()
        optimizer.step()
    return model.requires_grad_(False)


# ---------------------------------------------------------------- moments


def slowly(layer, read, channels):
    """Contributions of single channels at all positions, (positions, channels, out), by calling the layer itself."""
    each = []
    for j in range(channels):
        alone = torch.zeros_like(read)
        if isinstance(layer, nn.Conv2d):
            alone[:, j] = read[:, j]
        else:
            width = read.shape[1] // channels
            alone[:, j * width : (j + 1) * width] = read[:, j * width : (j + 1) * width]
        z = layer(alone) - layer(torch.zeros_like(read))
        each.append(z.flatten(2).transpose(1, 2).flatten(0, 1) if z.dim() == 4 else z)
    return torch.stack(each, 1)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_of_a_convolution(conv, dtype, digits):
    model, x = stack(dtype, **CONVS[conv]).requires_grad_(False), digits[0][:7].to(dtype)
    found = r.moments(model, "2", 6, x, 0, positions=10**6)
    z = slowly(model[2], model[:2](x), 6).double()
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert found.total == len(z)
    torch.testing.assert_close(found.gram, torch.einsum("nio,njo->ij", z, z), **close)
    torch.testing.assert_close(found.target, torch.einsum("nio,njo->i", z, z), **close)
    # the weight that solves the whole problem is the layer's own
    weight = model[2].weight.flatten(1).double()
    torch.testing.assert_close(found.xx @ weight.T, found.xy, **close)


def test_moments_of_a_linear_layer_behind_a_flatten(digits):
    model, x = stack(kernel_size=3).requires_grad_(False), digits[0][:9]
    found = r.moments(model, "5", 5, x, 0)
    read = model[:5](x)
    z = slowly(model[5], read, 5)
    torch.testing.assert_close(found.gram, torch.einsum("nio,njo->ij", z, z))
    torch.testing.assert_close(found.xx, sum(torch.outer(row, row) for row in read))
    torch.testing.assert_close(found.xy, sum(torch.outer(row, model[5].weight @ row) for row in read))
    assert found.total == 9


def test_another_model_gives_what_is_to_be_reached(digits):
    model, x = stack(kernel_size=3).requires_grad_(False), digits[0][:5]
    first, second = r.moments(model, "2", 6, x, 4), stack(kernel_size=3).requires_grad_(False)
    second[0].weight[1] = 0
    found = r.moments(second, "2", 6, x, 4, original=model)
    everywhere = r.moments(second, "2", 6, x, 4, original=model, positions=10**6)
    y = (model[2](model[:2](x)) - model[2].bias[:, None, None]).transpose(0, 1).flatten(1)
    patches = F.unfold(second[:2](x), 3).transpose(0, 1).flatten(1)
    torch.testing.assert_close(everywhere.xy, patches @ y.T)
    z = slowly(second[2], second[:2](x), 6)
    target = y.reshape(5, 5, 6, 6).flatten(2).permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(everywhere.target, torch.einsum("no,nio->i", target, z))
    assert found.total == first.total == 50
    assert not torch.allclose(found.xy, first.xy)


def test_positions_are_drawn_from_each_image_without_replacement(monkeypatch):
    with rng.torch_seeded(0):
        model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    x = (2.0 ** torch.arange(16, dtype=torch.float64)).sqrt().reshape(1, 1, 4, 4).repeat(300, 1, 1, 1)
    model = model.double()
    counts = np.zeros(16)
    for image in range(300):
        found = r.moments(model, "0", 1, x[:1], image, positions=5)
        bits = [round(float(found.xx)) >> place & 1 for place in range(16)]  # a position twice would carry over
        assert sum(bits) == found.total == 5
        counts += bits
    assert all(abs(counts - 300 * 5 / 16) < 5 * np.sqrt(300 * 5 / 16))
    monkeypatch.setattr(r, "_CHUNK", 16)  # images one by one
    several = r.moments(model, "0", 1, x[:3], 0, positions=5)
    assert several.total == 15
    alone = r.moments(model, "0", 1, x[:1], 0, positions=5)
    assert float(several.xx) != pytest.approx(3 * float(alone.xx))


def test_sums_of_unequal_clients_are_those_of_all_together(digits, monkeypatch):
    model, x = stack(kernel_size=3), digits[0][:40]
    whole = r.moments(model, "2", 6, x, 0, positions=36)
    parts = [
        r.moments(model, "2", 6, x[s], k, positions=36)
        for k, s in enumerate([slice(0, 3), slice(3, 28), slice(28, 40)])
    ]
    total = reduce(r.Moments.plus, parts)
    monkeypatch.setattr(r, "_CHUNK", 36 * 54 * 7)  # batches of seven
    for one in (total, r.moments(model, "2", 6, x, 0, positions=36)):
        for left, right in zip(one, whole, strict=True):
            torch.testing.assert_close(left, right)


def test_the_model_is_as_before(digits):
    with rng.torch_seeded(0):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 2, 3)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two = (r.moments(model, "3", 3, digits[0][:4], 0) for _ in range(2))
    assert torch.equal(one.xx, two.xx)
    assert model.training
    assert not model[3]._forward_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- ThiNet


@given(keys, st.integers(0, 100))
@settings(max_examples=40)
def test_thinet_removes_what_costs_least_at_every_step(key, hundredth):
    z = contributions(key)
    gone = []
    for _ in range(min(6 * hundredth // 100, 5)):
        costs = {j: float(z[:, [*gone, j]].sum(1).square().sum()) for j in range(6) if j not in gone}
        gone.append(min(costs, key=costs.__getitem__))
    kept = r.thinet(z.T @ z, hundredth / 100)
    assert kept.tolist() == [j for j in range(6) if j not in gone]


@given(keys)
@settings(max_examples=40)
def test_thinet_is_exhaustive_search_where_channels_are_orthogonal(key):
    sizes = rng.uniform(key, 6, dtype=torch.float64) + 0.1
    gram = torch.diag(sizes)
    best = min(itertools.combinations(range(6), 3), key=lambda gone: float(sizes[list(gone)].sum()))
    assert r.thinet(gram, 0.5).tolist() == [j for j in range(6) if j not in best]


def test_thinet_sees_what_cancels():
    z = torch.tensor([[5.0, -5.0, 1.0, 1.5], [4.0, -4.1, 1.0, 1.5]])
    assert r.thinet(z.T @ z, 0.25).tolist() == [0, 1, 3]
    kept = r.thinet((z[:, :2].T @ z[:, :2]), 1.0).tolist()
    assert len(kept) == 1
    assert r.thinet(torch.ones(4, 4), 0.5).tolist() == [0, 1]  # of equal ones the last go


@given(keys)
@settings(max_examples=30)
def test_thinet_scales_are_least_squares_on_the_data(key):
    z, kept = contributions(key), torch.tensor([0, 2, 5])
    expected = np.linalg.lstsq(z[:, kept].numpy(), z.sum(1).numpy(), rcond=None)[0]
    np.testing.assert_allclose(r.thinet_scales(z.T @ z, kept).numpy(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- LASSO


def supports(gram, target, most):
    """Every set of channels that some lambda chooses, by its optimality: (lowest, highest lambda, set)."""
    for size in range(1, most + 1):
        for chosen in map(list, itertools.combinations(range(len(target)), size)):
            rest = [j for j in range(len(target)) if j not in chosen]
            inverse = np.linalg.inv(gram[np.ix_(chosen, chosen)])
            for signs in map(np.array, itertools.product([1, -1], repeat=size)):
                u, v = inverse @ target[chosen], inverse @ signs  # beta = u - lambda v
                across = gram[np.ix_(rest, chosen)]
                c, d = target[rest] - across @ u, across @ v  # correlation of the others: c + lambda d, at most lambda
                left = np.concatenate([signs * v, d - 1, -d - 1])  # left * lambda <= right
                right = np.concatenate([signs * u, -c, c])
                low = max([0.0, *(right[left < 0] / left[left < 0])])
                high = min([np.inf, *(right[left > 0] / left[left > 0])])
                if low < high:
                    yield low, high, chosen


@given(keys, st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_lasso_is_exhaustive_search_and_scikit_learns_on_the_data(key, keep):
    z = contributions(key, samples=30, channels=5)
    y = z.sum(1) + 3 * rng.normal(rng.fold(key, "y"), 30, dtype=torch.float64)
    kept = r.lasso_channels(z.T @ z, z.T @ y, keep).tolist()
    low, high, chosen = min(supports((z.T @ z).numpy(), (z.T @ y).numpy(), keep))
    assert kept == chosen
    alpha = (low + high) / 2 / 30  # its loss is the mean's
    fit = Lasso(alpha=alpha, fit_intercept=False, max_iter=10**6, tol=1e-12).fit(z.numpy(), y.numpy())
    assert np.flatnonzero(fit.coef_).tolist() == kept


def test_lasso_leaves_out_what_is_there_twice_or_not_at_all():
    z = contributions(3, channels=3)
    z = torch.cat([z, torch.zeros(40, 1, dtype=torch.float64), 0.5 * z[:, :1]], 1)
    kept = r.lasso_channels(z.T @ z, z.T @ z.sum(1), 3).tolist()
    assert 3 not in kept
    assert not {0, 4} <= set(kept)
    assert r.lasso_channels(torch.zeros(4, 4), torch.zeros(4), 2).tolist() == [0, 1]
    assert r.lasso_channels(z.T @ z, z.T @ z.sum(1), 5).tolist() == [0, 1, 2, 3, 4]


@given(keys, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_channels_in_another_order_leave_the_same_ones(key, keep):
    z, order = contributions(key), rng.permutation(rng.fold(key, "order"), 6)
    y, moved = z.sum(1) + z[:, 1], z[:, order]
    lasso = order[r.lasso_channels(moved.T @ moved, moved.T @ y, keep)]
    assert lasso.sort().values.tolist() == r.lasso_channels(z.T @ z, z.T @ y, keep).tolist()
    greedy = order[r.thinet(moved.T @ moved, keep / 6)]
    assert greedy.sort().values.tolist() == r.thinet(z.T @ z, keep / 6).tolist()


@pytest.mark.parametrize("scale", [1e-14, 1e8])
def test_the_unit_of_the_outputs_does_not_matter(scale):
    z = contributions(5)
    gram, target = z.T @ z, z.T @ (z.sum(1) + z[:, 0])
    for keep in range(1, 6):
        assert torch.equal(r.lasso_channels(gram * scale, target * scale, keep), r.lasso_channels(gram, target, keep))


# ---------------------------------------------------------------- least squares


def test_columns_of_channels():
    assert r.columns_of(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_least_squares_is_numpys_on_the_unfolded_images(trained, digits):
    x = digits[0][:200]
    found = r.moments(trained, "2", 12, x, 0, positions=10**6)
    columns = r.columns_of(torch.tensor([0, 3, 4, 7, 9, 10]), 9)
    read = trained[:2](x)
    patches = F.unfold(read, 3).transpose(1, 2).flatten(0, 1).numpy()
    y = patches @ trained[2].weight.flatten(1).numpy().T
    expected = np.linalg.lstsq(patches[:, columns], y, rcond=1e-9)[0].T
    weight = r.least_squares(found.xx, found.xy, columns, ridge=1e-12).numpy()

    def error(w):
        return np.square(patches[:, columns] @ w.T - y).sum()

    assert error(weight) == pytest.approx(error(expected), rel=1e-6)


def test_least_squares_of_inputs_that_are_zero():
    x = rng.normal(0, 20, 3, dtype=torch.float64) * torch.tensor([1.0, 0.0, 2.0])
    y = x @ torch.tensor([[1.0], [5.0], [-3.0]], dtype=torch.float64)
    found = r.least_squares(x.T @ x, x.T @ y, torch.arange(3))
    np.testing.assert_allclose(found.numpy(), [[1, 0, -3]], atol=1e-6)
    assert r.least_squares(torch.zeros(2, 2), torch.zeros(2, 1), torch.arange(2)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("method", ["thinet", "lasso", "linear"])
def test_the_next_layer_is_nearer_than_after_plain_removal(method, trained, digits):
    """On digits that the sums have not seen."""
    path, channels, each = ("5", 8, 36) if method == "linear" else ("2", 12, 9)
    clients = [digits[0][:100], digits[0][100:900], digits[0][900:1400]]
    found = reduce(r.Moments.plus, [r.moments(trained, path, channels, x, k) for k, x in enumerate(clients)])
    keep = channels // 2
    kept = r.thinet(found.gram, 0.5) if method == "thinet" else r.lasso_channels(found.gram, found.target, keep)
    layer, columns = trained.get_submodule(path), r.columns_of(kept, each)
    read = trained[: int(path)](digits[0][1400:])
    x = F.unfold(read, 3).transpose(1, 2).flatten(0, 1) if path == "2" else read
    weight = layer.weight.flatten(1)
    y = x @ weight.T

    def error(w):
        return float((x[:, columns] @ w.T - y).square().sum() / y.square().sum())

    removed, solved = error(weight[:, columns]), error(r.least_squares(found.xx, found.xy, columns))
    scales = r.thinet_scales(found.gram, kept).repeat_interleave(each)
    assert solved < error(weight[:, columns] * scales) < removed
    assert solved < 0.7 * removed


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: r.moments(m, "1", 6, x, 0), "1 must be a linear layer or a Conv2d, got ReLU"),
        (lambda m, x: r.moments(m, "2", 5, x, 0), "2 reads 6 channels"),
        (lambda m, x: r.moments(m, "5", 7, x, 0), "5 has 180 inputs, not a multiple of 7"),
        (lambda m, x: r.moments(m, "2", 6, x, 0, positions=0), "positions must be >= 1"),
        (lambda m, x: r.moments(nn.Sequential(m[0], m[2], m[2]), "1", 6, x, 0), "must be called once|channels"),
        (lambda *_: r.thinet(torch.ones(2, 3), 0.5), "square"),
        (lambda *_: r.thinet(torch.full((2, 2), torch.nan), 0.5), "NaN"),
        (lambda *_: r.lasso_channels(torch.eye(3), torch.ones(3), 4), r"keep must be in \[1, 3\]"),
    ],
)
def test_what_is_refused(call, message, digits):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(stack(kernel_size=3), digits[0][:2])


def test_too_many_inputs_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5001, 2))
    with pytest.raises(ValueError, match="5001 inputs for each output; moments take 5000"):
        r.moments(model, "1", 1, torch.zeros(1, 5001), 0)
