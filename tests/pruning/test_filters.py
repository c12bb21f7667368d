"""Which filters go, against sorted lists in Python."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim import rng
from fedsim.pruning.filters import l1_filters, l2_filters, random_filters, removed, slimmed, softened

DTYPES = [torch.float32, torch.float64]
hundredths = st.integers(0, 100)
NORMS = {
    l1_filters: lambda row: sum(abs(w) for w in row),
    l2_filters: lambda row: sum(w * w for w in row),
}


def tied(key, out, dtype=torch.float32):
    """Few different numbers, of mixed signs, so that many norms are equal."""
    return torch.round(rng.normal(key, out, 2, 2, 1, dtype=dtype))


@given(st.integers(1, 300), hundredths)
def test_so_many_go(channels, hundredth):
    assert removed(channels, hundredth / 100) == min(math.floor(Fraction(hundredth, 100) * channels), channels - 1)


@pytest.mark.parametrize("function", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 10**6), st.integers(1, 12), hundredths)
def test_the_largest_stay_and_of_equal_ones_the_first(function, dtype, key, out, hundredth):
    weight = tied(key, out, dtype)
    sizes = [NORMS[function](row.flatten().tolist()) for row in weight]
    order = sorted(range(out), key=lambda j: (-sizes[j], j))
    kept = function(weight, hundredth / 100)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(order[: out - removed(out, hundredth / 100)])


def test_float_products_just_below_a_whole_number():
    assert 0.29 * 100 < 29
    assert removed(100, 0.29) == 29


@pytest.mark.parametrize("function", NORMS)
def test_of_many_equal_ones_the_first_stay(function):
    assert function(torch.ones(5000, 2), 0.5).tolist() == list(range(2500))


def test_the_norms_disagree():
    weight = torch.tensor([[[3.0, 0.0, 0.0, 0.0]], [[1.0, -1.0, 1.0, -1.0]]])
    assert l1_filters(weight, 0.5).tolist() == [1]
    assert l2_filters(weight, 0.5).tolist() == [0]


@pytest.mark.parametrize("function", NORMS)
@given(st.integers(0, 10**6), hundredths)
def test_filters_in_another_order_leave_the_same_ones(function, key, hundredth):
    weight, order = rng.normal(key, 9, 3, 2, 2), rng.permutation(rng.fold(key, "order"), 9)
    moved = order[function(weight[order], hundredth / 100)]
    assert moved.sort().values.tolist() == function(weight, hundredth / 100).tolist()


@given(st.integers(0, 10**6), st.integers(1, 12), hundredths)
def test_the_control_leaves_as_many(key, out, hundredth):
    kept = random_filters(out, hundredth / 100, key).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == out - removed(out, hundredth / 100)
    assert set(kept) <= set(range(out))


def test_the_control_leaves_any():
    drawn = [random_filters(6, 0.5, key).tolist() for key in range(2000)]
    counts = [sum(j in kept for kept in drawn) for j in range(6)]
    assert all(abs(count - 1000) < 5 * math.sqrt(500) for count in counts)


def test_soft_pruning_zeroes_weights_and_nothing_else():
    params = {"a.weight": rng.normal(1, 5, 2, 3, 3), "a.bias": torch.ones(5), "b.weight": rng.normal(2, 4, 5)}
    before = {name: tensor.clone() for name, tensor in params.items()}
    made = softened(params, ["a"], 0.4)
    sizes = [float((before["a.weight"][j] ** 2).sum()) for j in range(5)]
    low = sorted(range(5), key=lambda j: sizes[j])[:2]
    expected = before["a.weight"].clone()
    for j in low:
        expected[j] = 0
    assert torch.equal(made["a.weight"], expected)
    assert made["a.bias"] is params["a.bias"]
    assert made["b.weight"] is params["b.weight"]
    assert list(made) == list(params)
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_slimming_has_one_threshold(dtype, key, widths, hundredth):
    scales = {str(i): torch.round(2 * rng.normal(rng.fold(key, i), n, dtype=dtype)) for i, n in enumerate(widths)}
    every = sorted(abs(v) for scale in scales.values() for v in scale.tolist())
    threshold = every[math.floor(Fraction(hundredth, 100) * len(every))]
    kept = slimmed(scales, hundredth / 100)
    assert list(kept) == list(scales)
    for layer, scale in scales.items():
        sizes = [abs(v) for v in scale.tolist()]
        above = [j for j, size in enumerate(sizes) if size > threshold]
        assert kept[layer].tolist() == (above or [sizes.index(max(sizes))])


def test_slimming_leaves_something_where_all_are_equal():
    kept = slimmed({"a": torch.ones(3), "b": -torch.ones(2)}, 0.7)
    assert {layer: staying.tolist() for layer, staying in kept.items()} == {"a": [0], "b": [0]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: l1_filters(torch.ones(2, 2), 1.5), r"sparsity must be in \[0, 1\]"),
        (lambda: l1_filters(torch.full((2, 2), torch.nan), 0.5), "NaN"),
        (lambda: random_filters(0, 0.5, 1), "channels must be >= 1"),
        (lambda: softened({}, ["a"], 0.5), "a: has no weight"),
        (lambda: slimmed({"a": torch.ones(2)}, 1.0), r"share must be in \[0, 1\)"),
        (lambda: slimmed({}, 0.5), "at least one layer"),
        (lambda: slimmed({"a": torch.tensor([torch.nan])}, 0.5), "a: must be numbers"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
