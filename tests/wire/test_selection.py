"""Supports against sorting and counting."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.wire import selection, sparse

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 3.0, math.inf, -math.inf, math.nan, 1e-40])
FRACTIONS = st.floats(0.001, 1.0)


@st.composite
def updates(draw):
    """Several tensors with many equal magnitudes."""
    dtypes = draw(st.lists(st.sampled_from(FLOATS), max_size=4))
    lists = [draw(st.lists(VALUES, max_size=12)) for _ in dtypes]
    tensors = [torch.tensor(v, dtype=d) for v, d in zip(lists, dtypes, strict=True)]
    return {f"t{i}": t.reshape(2, -1) if len(t) % 2 == 0 and len(t) else t for i, t in enumerate(tensors)}


@given(updates(), FRACTIONS)
@settings(deadline=None, max_examples=300)
def test_top_k_are_the_first_of_a_stable_sort_by_magnitude(tensors, fraction):
    sizes = [abs(v) for t in tensors.values() for v in t.reshape(-1).tolist()]
    k = min(len(sizes), max(1, round(fraction * len(sizes))))
    order = sorted(range(len(sizes)), key=lambda i: (-math.inf if math.isnan(sizes[i]) else -sizes[i], i))
    kept = selection.top_k(tensors, fraction)
    flags = [flag for mask in kept.values() for flag in mask.reshape(-1).tolist()]
    assert [i for i, flag in enumerate(flags) if flag] == sorted(order[:k])
    assert {n: m.shape for n, m in kept.items()} == {n: t.shape for n, t in tensors.items()}
    assert all(mask.dtype == torch.bool for mask in kept.values()) and list(kept) == list(tensors)


def test_top_k_is_of_all_tensors_together():
    update = {"small": torch.tensor([0.1, -0.2, 0.3]), "large": torch.tensor([[-5.0, 4.0], [0.25, 6.0]])}
    assert {n: m.tolist() for n, m in selection.top_k(update, 4 / 7).items()} == {
        "small": [False, False, True],
        "large": [[True, True], [False, True]],
    }
    with pytest.raises(ValueError, match=r"n: magnitudes need floating-point tensors, got torch\.int64"):
        selection.top_k({"n": torch.tensor([1])}, 0.5)


@pytest.mark.parametrize("select", [selection.top_k, lambda like, fraction: selection.random_k(like, fraction, 1)])
@pytest.mark.parametrize("like", [{}, {"e": torch.zeros(0, 3)}, {"e": torch.zeros(0), "s": torch.zeros(())}])
def test_of_nothing_nothing_is_kept_and_of_one_entry_the_one(select, like):
    kept = select(like, 0.01)
    assert {n: (m.shape, m.dtype) for n, m in kept.items()} == {n: (t.shape, torch.bool) for n, t in like.items()}
    assert sum(int(mask.sum()) for mask in kept.values()) == ("s" in like)


def test_how_many_are_kept():
    counts = {(0, 0.5): 0, (1, 0.01): 1, (10, 0.01): 1, (10, 0.25): 2, (10, 0.35): 4, (10, 1.0): 10, (3, 0.99): 3}
    assert {case: selection.num_kept(*case) for case in counts} == counts
    for fraction in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got"):
            selection.num_kept(10, fraction)


# ---------------------------------------------------------------- random


LIKE = {"a": torch.zeros(3, 2), "b": torch.zeros(5, dtype=torch.float64)}


@given(FRACTIONS, st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_random_k_has_k_entries_that_depend_on_the_key_alone(fraction, key):
    kept = selection.random_k(LIKE, fraction, key)
    assert sum(int(mask.sum()) for mask in kept.values()) == selection.num_kept(11, fraction)
    other = {"x": torch.ones(6, dtype=torch.int64), "y": torch.ones(5, 1)}
    again = selection.random_k(other, fraction, key)
    assert p.flatten({n: m.reshape(-1) for n, m in kept.items()}).equal(
        p.flatten({n: m.reshape(-1) for n, m in again.items()})
    )


def test_random_k_takes_each_entry_and_each_pair_equally_often():
    """4000 keys, 4 of 11: each bound is Hoeffding's with a false-alarm rate of 1e-9 over all 66 counts together."""
    draws = torch.stack([p.flatten(selection.random_k(LIKE, 4 / 11, key)) for key in range(4000)]).double()
    bound = math.sqrt(math.log(2 * 66 / 1e-9) / (2 * 4000))
    together = draws.T @ draws / 4000
    expected = torch.full((11, 11), 4 * 3 / (11 * 10)).double()
    expected.fill_diagonal_(4 / 11)
    assert float((together - expected).abs().max()) < bound < 0.06


def test_what_is_kept_is_unbiased_when_scaled():
    """4000 keys; Hoeffding over 11 entries, false-alarm rate 1e-9: each is 0 or 11/4 times its value."""
    update = {"a": rng.normal(1, 3, 2), "b": rng.normal(2, 5, dtype=torch.float64)}
    x = torch.cat([t.reshape(-1).double() for t in update.values()])
    draws = []
    for key in range(4000):
        sent = selection.keep(update, selection.random_k(update, 4 / 11, key), unbiased=True)
        p.check_alike(sent, update)
        draws.append(torch.cat([t.reshape(-1).double() for t in sent.values()]))
    mean = torch.stack(draws).mean(0)
    bound = 11 / 4 * math.sqrt(math.log(2 * 11 / 1e-9) / (2 * 4000))
    assert bool(((mean - x).abs() < bound * x.abs()).all()) and bound < 0.16
    assert set((draws[0] / x).round(decimals=5).tolist()) == {0.0, 2.75}


def test_what_is_kept_is_as_it_was_and_else_zero():
    update = {"a": torch.tensor([1.0, -2.0, torch.nan, -0.0]), "n": torch.tensor([2**60 + 1, 5])}
    support = {"a": torch.tensor([False, True, False, True]), "n": torch.tensor([True, False])}
    sent = selection.keep(update, support)
    assert p.same_bits(sent, {"a": torch.tensor([0.0, -2.0, 0.0, -0.0]), "n": torch.tensor([2**60 + 1, 0])})
    nothing = {name: torch.zeros_like(mask) for name, mask in support.items()}
    assert p.same_bits(selection.keep(update, nothing, unbiased=True), p.zeros_like(update))
    with pytest.raises(ValueError, match=r"names differ: \['n'\]"):
        selection.keep(update, {"a": support["a"]})


def test_a_support_that_a_key_names_costs_only_the_values():
    update = {"a": rng.normal(1, 100, 10), "b": rng.normal(2, 24)}
    support = selection.random_k(update, 0.125, 7)
    sent = selection.keep(update, support)
    data = sparse.encode(sent, known=support)
    assert len(data) == 8 + 2 + 128 * 4
    assert p.same_bits(sparse.decode(data, update, known=selection.random_k(update, 0.125, 7)), sent)
