import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import rng
from fedsim.data import allotment


def slow_largest_remainder(total, weights):
    """One unit at a time, in exact fractions."""
    from fractions import Fraction

    exact = [Fraction(total) * Fraction(w) / sum(map(Fraction, weights)) for w in weights]
    parts = [math.floor(x) for x in exact]
    while sum(parts) < total:
        behind = [x - p if p == math.floor(x) else Fraction(-1) for x, p in zip(exact, parts, strict=True)]
        parts[behind.index(max(behind))] += 1
    return parts


def slow_raise_to(sizes, minimum):
    """Clients below the minimum take one example at a time from the largest, the last of them first."""
    sizes = list(sizes)
    while min(sizes) < minimum:
        largest = max(range(len(sizes)), key=lambda k: (sizes[k], k))
        sizes[largest] -= 1
        sizes[sizes.index(min(sizes))] += 1
    return sizes


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 200), st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_largest_remainder_equals_a_slow_loop_in_exact_fractions(total, weights):
    got = allotment.largest_remainder(np.array([total]), np.array(weights)[:, None])
    assert got[:, 0].tolist() == slow_largest_remainder(total, weights)


def test_largest_remainder_covers_totals_with_uneven_float_weights():
    totals = np.array([0, 1, 999, 123_457])
    weights = rng.uniform(3, 1000, 4).double().numpy() ** 9
    parts = allotment.largest_remainder(totals, weights)
    assert parts.sum(axis=0).tolist() == totals.tolist()
    assert np.abs(parts - totals * weights / weights.sum(axis=0)).max() < 1


def test_largest_remainder_gives_nothing_where_all_weights_are_zero():
    assert allotment.largest_remainder(np.array([5, 4]), np.array([[0, 1], [0, 3]])).tolist() == [[0, 1], [0, 3]]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(0, 5))
def test_raised_sizes_equal_those_of_taking_one_example_at_a_time(sizes, minimum):
    if sum(sizes) < minimum * len(sizes):
        sizes = [size + minimum for size in sizes]
    assert allotment.raise_to(np.array(sizes), minimum).tolist() == slow_raise_to(sizes, minimum)


@pytest.mark.parametrize("shape", [0.003, 0.3, 1.0, 7.5, 1e6])
def test_log_gamma_draws_are_the_quantiles_of_their_uniforms(shape):
    u = np.maximum(rng.uniform(11, 500, dtype=torch.float64).numpy(), allotment.SMALLEST_UNIFORM)
    got = allotment.log_gamma_draws(11, np.full(500, shape))
    # scipy's cdf of the draw must give the uniform back; where the draw underflows, P(a, x) = x^a / Gamma(a + 1).
    visible = got > -700
    np.testing.assert_allclose(scipy.stats.gamma.cdf(np.exp(got[visible]), shape), u[visible], rtol=1e-9)
    log_p = shape * got[~visible] - math.lgamma(shape + 1)
    np.testing.assert_allclose(np.exp(log_p), u[~visible], rtol=1e-9)
    assert visible.sum() > 20


def test_log_gamma_draws_join_smoothly_where_the_series_takes_over():
    shape = 0.05
    edge = math.exp(allotment.LOG_TINY * shape - math.lgamma(shape + 1))  # u at which the two formulas meet
    u = edge * np.array([0.9, 1.1])
    first_term = (np.log(u) + math.lgamma(shape + 1)) / shape
    np.testing.assert_allclose(first_term, np.log(scipy.stats.gamma.ppf(u, shape)), rtol=1e-12)


@pytest.mark.parametrize("shape", [1e-10, 1e-6, 1e-3])
def test_shares_from_tiny_gammas_are_finite_and_nearly_one_hot(shape):
    shares = allotment.shares_of(allotment.log_gamma_draws(5, np.full((40, 9), shape)), axis=0)
    assert np.isfinite(shares).all()
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    assert shares.max(axis=0).mean() > 0.9


def test_ranks_number_each_group_from_zero():
    groups = np.array([2, 0, 2, 2, 0, 5])
    ranks = allotment.rank_in_group(groups, 8)
    for group in (0, 2, 5):
        members = ranks[groups == group]
        assert sorted(members.tolist()) == list(range(len(members)))


def test_every_rank_order_of_a_group_is_equally_likely():
    # n = 6000 keys, 6 orders: chi-squared with 5 degrees of freedom; false alarm 1e-6.
    orders = [tuple(allotment.rank_in_group(np.array([1, 0, 1, 1]), rng.fold(2, k))[[0, 2, 3]]) for k in range(6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert scipy.stats.chisquare(counts).pvalue > 1e-6


def test_dealing_gives_each_client_its_amount_of_each_group_and_leaves_the_rest():
    groups = np.array([0, 1, 0, 1, 1, 0, 0, 2])
    amounts = np.array([[1, 2, 0], [2, 0, 1]])
    owner = allotment.deal(groups, amounts, 4)
    for k in range(2):
        assert [int(((owner == k) & (groups == g)).sum()) for g in range(3)] == amounts[k].tolist()
    assert sorted(groups[owner == -1].tolist()) == [0, 1]


def test_repair_moves_only_what_it_must():
    owner = np.array([0] * 7 + [2] * 5 + [3] * 1)
    partition = allotment.partition_from(owner, 4, 2, key=9)
    assert partition.sizes().tolist() == [5, 2, 4, 2]
    assert sorted(partition.indices.tolist()) == list(range(13))
    assert set(partition.client(0)) < set(range(7))
    assert set(partition.client(2)) < set(range(7, 12))
    assert 12 in partition.client(3)


def test_no_repair_leaves_owners_alone_and_indices_ascending():
    owner = np.array([1, -1, 0, 1, 0])
    partition = allotment.partition_from(owner, 2, 2, key=9)
    assert partition.offsets.tolist() == [0, 2, 4]
    assert partition.indices.tolist() == [2, 4, 0, 3]
