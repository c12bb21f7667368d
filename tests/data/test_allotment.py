import math
from fractions import Fraction

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
@given(
    st.integers(1, 6).flatmap(lambda k: st.lists(st.lists(st.integers(0, 9), min_size=k, max_size=k), min_size=1)),
    st.integers(0, 40),
    st.integers(0, 5),
)
def test_shared_out_cells_are_within_one_of_exact_fractions_and_columns_sum_to_their_totals(weights, total, key):
    totals = np.array([max(total - 7 * group, 0) for group in range(len(weights[0]))])
    shares = allotment.share_out(totals, np.array(weights), key)
    for group, column in enumerate(zip(*weights, strict=True)):
        for k, weight in enumerate(column):
            exact = Fraction(int(totals[group]) * weight, sum(column) or 1)
            assert shares[k, group] in (math.floor(exact), math.ceil(exact))
        assert shares[:, group].sum() == (totals[group] if any(column) else 0)


def test_one_group_without_ties_is_shared_out_by_largest_remainder():
    totals, weights = np.array([123_457]), rng.uniform(3, 1000, 1).double().numpy() ** 9
    expected = allotment.largest_remainder(totals, weights)
    for key in range(3):
        assert np.array_equal(allotment.share_out(totals, weights, key), expected)


def test_the_sums_of_parts_come_out_right_where_rounding_each_group_alone_gives_many_nothing():
    weights = rng.bits(3, 300, 10).remainder(3).numpy()
    totals = np.full(10, 45)
    exact = (totals * weights / weights.sum(axis=0)).sum(axis=1)
    assert np.abs(allotment.share_out(totals, weights, 1).sum(axis=1) - exact).max() < 1.5
    assert np.abs(allotment.largest_remainder(totals, weights).sum(axis=1) - exact).max() > 2


@pytest.mark.parametrize("groups", [1, 10])
def test_where_all_weights_tie_no_part_is_better_off_for_its_number(groups):
    # n = 1500 keys; a part's sum takes one of two neighbouring values. Hoeffding: a mean of n such sums is off by 0.08
    # with probability 2 exp(-2 n 0.08^2) < 1e-8, for 7 parts in 2 cases < 1e-6.
    totals, weights = np.full(groups, 3), np.ones((7, groups), dtype=np.int64)
    sums = np.array([allotment.share_out(totals, weights, key).sum(axis=1) for key in range(1500)])
    assert set(sums.ravel()) == {3 * groups // 7, 3 * groups // 7 + 1}
    assert np.abs(sums.mean(axis=0) - 3 * groups / 7).max() < 0.08


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(0, 5), st.integers(0, 3))
def test_raised_sizes_are_those_of_taking_one_example_at_a_time_up_to_who_keeps_one_more(sizes, minimum, key):
    if sum(sizes) < minimum * len(sizes):
        sizes = [size + minimum for size in sizes]
    raised, slow = allotment.raise_to(np.array(sizes), minimum, key), np.array(slow_raise_to(sizes, minimum))
    assert sorted(raised) == sorted(slow)
    assert (raised[slow < slow.max()] <= slow[slow < slow.max()] + 1).all()
    assert (raised <= np.maximum(sizes, minimum)).all()


def test_who_keeps_one_more_after_a_repair_is_drawn_by_lot():
    # n = 2000 keys, 1 of 4 lowered clients: chi-squared with 3 degrees of freedom; false alarm 1e-6.
    kept = sum(allotment.raise_to(np.array([6, 6, 0, 6, 6]), 3, key) - [5, 5, 3, 5, 5] for key in range(2000))
    assert kept.sum() == 2000
    assert scipy.stats.chisquare(kept[[0, 1, 3, 4]]).pvalue > 1e-6


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
