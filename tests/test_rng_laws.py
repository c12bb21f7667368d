"""Draws of other laws: coins, noise for layers, gamma and beta; bit by bit or by a slow loop, and against scipy's.

A statistical test has one fixed key; over keys it would fail with a probability of FALSE_ALARM at most.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.func import vmap

from fedsim import rng

FALSE_ALARM = 1e-6
keys = st.integers(0, 2**64 - 1)


def slow_draws(key: int, n: int) -> list[int]:
    return [int(draw) % 2**64 for draw in rng.bits(key, n)]  # held to the published generator in test_rng.py


def probability(p: float) -> Tensor:
    return torch.tensor(p, dtype=torch.float64)


LAWS = {
    "coins": lambda key, *shape: rng.coins(key, probability(0.3), *shape),
    "noise": rng.noise,
    "gamma": lambda key, *shape: rng.log_gammas(key, (0.4, 3.0), *shape),
    "beta": lambda key, *shape: rng.beta(key, 0.4, 2.0, *shape),
}
laws = pytest.mark.parametrize("draw", LAWS.values(), ids=LAWS)


@laws
@pytest.mark.parametrize("size", [1, 3, 8, 17, 64, 101])
def test_a_lane_of_vmap_draws_what_it_would_draw_alone(draw, size):
    many = [rng.fold(size, lane) for lane in range(13)]
    together = vmap(lambda key: draw(key, size))(torch.stack([rng.as_tensor(key) for key in many]))
    for lane, key in enumerate(many):
        assert torch.equal(together[lane], draw(key, size))
        assert torch.equal(together[lane], draw(rng.as_tensor(key), size))


@pytest.mark.parametrize("name", ["coins", "noise"])
@given(keys, st.lists(st.integers(0, 5), max_size=3))
@settings(deadline=None, max_examples=50)
def test_element_i_depends_on_the_key_and_on_i_alone(name, key, shape):
    n = math.prod(shape)
    assert torch.equal(LAWS[name](key, *shape), LAWS[name](key, n + 5)[:n].reshape(shape))


@laws
def test_another_key_draws_something_else_and_none_is_changed(draw):
    key = torch.tensor(77)
    assert not torch.equal(draw(key, 64), draw(key + 1, 64))
    assert int(key) == 77


# ---------------------------------------------------------------- coins


@given(keys, st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=100)
def test_a_coin_is_the_lower_then_the_upper_half_of_a_draw(key, p):
    halves = [half for draw in slow_draws(key, 4) for half in (draw % 2**32, draw >> 32)]
    below = [((half + 2**31) % 2**32) < math.floor(p * 2**32) for half in halves]  # as signed numbers, -2^31 the least
    assert rng.coins(key, probability(p), 7).tolist() == below[:7]


def test_a_coin_of_0_never_falls_and_rates_of_lanes_may_differ():
    assert not rng.coins(3, probability(0.0), 10_000).any()
    assert rng.coins(3, probability(1 - 2**-53), 10_000).all()
    key, rates = rng.as_tensor(5), torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    together = vmap(lambda p: rng.coins(key, p, 100))(rates)
    assert all(torch.equal(row, rng.coins(5, p, 100)) for row, p in zip(together, rates, strict=True))


@pytest.mark.parametrize("p", [0.0003, 0.02, 0.5, 0.97])
def test_coins_fall_as_often_as_they_should(p):
    """n = 2^20, exact binomial, two-sided; and two neighbours, which may be of one draw, n = 2^19."""
    coins = rng.coins(11, probability(p), 2**19, 2)
    assert stats.binomtest(int(coins.sum()), 2**20, p).pvalue > FALSE_ALARM
    assert stats.binomtest(int(coins.all(1).sum()), 2**19, p * p).pvalue > FALSE_ALARM


# ---------------------------------------------------------------- noise


@given(keys)
@settings(deadline=None, max_examples=50)
def test_noise_is_box_muller_of_two_parts_of_one_draw(key):
    u, v = zip(*(((d >> 40) + 1, d % 2**24) for d in slow_draws(key, 6)), strict=True)
    expected = [
        math.sqrt(-2 * math.log(a / 2**24)) * math.cos(2 * math.pi * b / 2**24) for a, b in zip(u, v, strict=True)
    ]
    assert rng.noise(key, 2, 3).flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=2e-6)


def test_noise_is_standard_normal():
    """n = 2^18: Kolmogorov-Smirnov; mean; sum of squares; how many lie beyond 3; correlation of neighbours."""
    z, n = rng.noise(29, 2**18).double().numpy(), 2**18
    beyond = int((abs(z) > 3).sum())
    p = [
        stats.kstest(z, "norm", method="asymp").pvalue,
        2 * stats.norm.sf(abs(z.sum()) / math.sqrt(n)),
        2 * min(stats.chi2.cdf((z**2).sum(), n), stats.chi2.sf((z**2).sum(), n)),
        stats.binomtest(beyond, n, 2 * stats.norm.sf(3)).pvalue,
        2 * stats.norm.sf(abs((z[1:] * z[:-1]).sum()) / math.sqrt(n - 1)),
    ]
    assert min(p) * len(p) > FALSE_ALARM
    assert abs(z).max() <= math.sqrt(-2 * math.log(2**-24)) + 1e-6


# ---------------------------------------------------------------- gamma and beta


def slow_log_gamma(a: float, x: list[float], u: list[float]) -> float:
    """One draw by Marsaglia and Tsang's loop, given its normal and uniform draws; the last u is for the boost."""
    if a < 1:
        return slow_log_gamma(a + 1, x, u) + math.log(1 - u[-1]) / a
    d = a - 1 / 3
    for one, level in zip(x, u, strict=False):
        v = (1 + one / math.sqrt(9 * d)) ** 3
        if v > 0 and math.log(1 - level) < one * one / 2 + d - d * v + d * math.log(v):
            return math.log(d * v)
    return math.log(d)


@pytest.mark.parametrize("tries", [1, 2, 8])
def test_gamma_is_the_slow_loop(tries, monkeypatch):
    """With few tries, too, of which some draws have none that is taken."""
    monkeypatch.setattr(rng, "GAMMA_TRIES", tries)
    a, n, key = (0.05, 1.0, 0.7, 30.0), 500, 13
    found = rng.log_gammas(key, a, n)
    x = rng.normal(rng.fold(key, 0), tries, n, 4, dtype=torch.float64)
    u = rng.uniform(rng.fold(key, 1), tries + 1, n, 4, dtype=torch.float64)
    expected = [[slow_log_gamma(a[k], x[:, i, k].tolist(), u[:, i, k].tolist()) for k in range(4)] for i in range(n)]
    assert np.allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("a", [0.05, 0.2, 0.99, 1.0, 2.5, 80.0])
def test_gamma_follows_scipys(a):
    """Kolmogorov-Smirnov of the logarithm, n = 2^17."""
    draws = rng.log_gammas(17, (a,), 2**17)[:, 0].numpy()
    assert np.isfinite(draws).all()
    assert stats.kstest(draws, stats.loggamma(a).cdf, method="asymp").pvalue > FALSE_ALARM


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.2), (1.0, 1.0), (0.5, 3.0), (7.0, 2.0), (0.05, 0.05)])
def test_beta_follows_scipys(a, b):
    """n = 2^17: Kolmogorov-Smirnov below the half, where small draws are exact, and of 1 - x, that is Beta(b, a)."""
    draws, law = rng.beta(19, a, b, 2**17, dtype=torch.float64).numpy(), stats.beta(a, b)
    low = draws[draws < 0.5]
    assert stats.binomtest(len(low), 2**17, law.cdf(0.5)).pvalue > FALSE_ALARM
    assert stats.kstest(low, lambda x: law.cdf(x) / law.cdf(0.5), method="asymp").pvalue > FALSE_ALARM
    high = draws[draws >= 0.5]
    bulk = high[high < 0.999]  # next to 1 many round to one number
    share = law.cdf(0.999) - law.cdf(0.5)
    assert stats.binomtest(len(bulk), 2**17, share).pvalue > FALSE_ALARM
    within = stats.kstest(bulk, lambda x: (law.cdf(x) - law.cdf(0.5)) / share, method="asymp")
    assert within.pvalue > FALSE_ALARM


def test_beta_of_a_tiny_parameter_is_near_0_or_1():
    draws = rng.beta(3, 0.001, 0.001, 1000)
    assert draws.dtype == torch.float32 and bool(torch.isfinite(draws).all())
    assert ((draws < 0.01) | (draws > 0.99)).float().mean() > 0.97  # its probability is 0.995


@pytest.mark.parametrize("a", [0.0, -1.0, math.nan])
def test_gamma_refuses_what_is_not_positive(a):
    with pytest.raises(ValueError, match="a must be > 0, got"):
        rng.beta(1, 2.0, a)
