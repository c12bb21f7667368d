"""How long pruned models train, against fractions; where they start, against He's rule and counted entries."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsim import rng
from fedsim.pruning.budgets import Budget, fine_tune, rescaled, scratch_b, scratch_e


def test_the_papers_epochs():
    assert fine_tune(160) == Budget(40, ())
    assert scratch_e(160) == Budget(160, (80, 120))
    assert scratch_b(160, 3, 2) == Budget(240, (120, 180))
    assert scratch_b(90, 5, 1, cap=2) == Budget(180, (90, 135))
    assert scratch_b(90, 141, 90, cap=2).rounds == 141


def test_odd_numbers_still_have_milestones():
    assert scratch_e(25).milestones == (12, 18)
    assert scratch_e(100, (0.29, 0.57)).milestones == (29, 57)  # whose float products are below 29 and 57
    assert fine_tune(100, 0.29).rounds == 29
    assert fine_tune(2).rounds == 1


@given(
    st.integers(1, 10**4), st.integers(10**6, 10**9), st.integers(0, 10**11), st.none() | st.sampled_from([1, 1.5, 2])
)
def test_as_much_computation_and_not_a_round_more(rounds, pruned, more, cap):
    budget = scratch_b(rounds, pruned + more, pruned, cap=cap)
    exact = Fraction(rounds * (pruned + more), pruned)
    allowed = exact if cap is None else min(exact, Fraction(cap) * rounds)
    assert budget.rounds == math.floor(allowed) >= rounds
    assert budget.milestones == (budget.rounds // 2, budget.rounds * 3 // 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scratch_e(0), "rounds must be >= 1"),
        (lambda: fine_tune(5, 0), "share must be > 0"),
        (lambda: scratch_b(5, 10, 0), r"macs_pruned must be in \[1, 10\]"),
        (lambda: scratch_b(5, 10, 11), r"macs_pruned must be in \[1, 10\]"),
        (lambda: scratch_b(5, 10, 5, cap=0.5), "cap must be >= 1"),
        (lambda: scratch_e(5, (0.75, 0.5)), "milestones must be ascending"),
        (lambda: rescaled(torch.ones(3, dtype=torch.bool), 0), "two axes"),
    ],
)
def test_numbers_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_convolution_starts_as_he_says(dtype):
    drawn = rescaled(torch.ones(64, 48, 3, 3, dtype=torch.bool), 3, dtype)
    with rng.torch_seeded(0):
        like = nn.init.kaiming_normal_(torch.empty(64, 48, 3, 3), mode="fan_out", nonlinearity="relu")
    assert drawn.dtype == dtype
    assert float(drawn.std()) == pytest.approx(float(like.std()), rel=0.02)


def test_a_sparse_layer_starts_larger():
    mask = rng.bernoulli(rng.fold(1, "m"), 0.25, 64, 48, 3, 3)
    drawn = rescaled(mask, 3)
    assert torch.equal(drawn != 0, mask)
    # a unit of the layer in front is read by mask.sum() / 48 entries: the gradient's variance halves behind a ReLU
    assert float(drawn[mask].square().mean()) * int(mask.sum()) / 48 == pytest.approx(2, rel=0.05)
    assert not rescaled(torch.zeros(3, 2, dtype=torch.bool), 3).any()


def test_what_a_mask_removes_is_plus_zero():
    drawn = rescaled(rng.bernoulli(3, 0.5, 30, 20), 4)
    assert int((drawn == 0).sum()) > 200 and not bool(torch.signbit(drawn[drawn == 0]).any())
