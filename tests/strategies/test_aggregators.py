"""The streaming mean against numpy's average."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.strategies.aggregators import weighted_mean


def updates(count, dtype=torch.float64, key=0):
    return [
        {"w": rng.normal(rng.fold(key, i), 3, 2, dtype=dtype), "b": rng.normal(rng.fold(key, i, "b"), 2, dtype=dtype)}
        for i in range(count)
    ]


def folded(updates, weights):
    aggregator = weighted_mean()
    acc = aggregator.start()
    for update, weight in zip(updates, weights, strict=True):
        acc = aggregator.add(acc, update, weight)
    return aggregator.finish(acc)


@given(st.lists(st.floats(0.01, 500), min_size=1, max_size=6), st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_it_is_numpys_average(weights, key):
    many = updates(len(weights), key=key)
    mean = folded(many, weights)
    for name in ("w", "b"):
        expected = np.average([update[name].numpy() for update in many], axis=0, weights=weights)
        assert np.abs(mean[name].numpy() - expected).max() < 1e-12


def test_it_keeps_the_dtype_and_the_order_of_names():
    mean = folded(updates(3, torch.float32), [1.0, 2.0, 7.0])
    assert list(mean) == ["w", "b"] and {t.dtype for t in mean.values()} == {torch.float32}


def test_an_update_is_not_changed_and_not_kept():
    many = updates(3)
    mean = folded(many, [2.0, 1.0, 1.0])
    assert all(p.same_bits(a, b) for a, b in zip(many, updates(3), strict=True))
    one = updates(1)
    alone = folded(one, [1.0])
    one[0]["w"].zero_()
    assert p.same_bits(alone, updates(1)[0])
    assert set(mean) == {"w", "b"}


def test_of_nothing_it_is_none_and_of_empty_dicts_empty():
    assert weighted_mean().finish(weighted_mean().start()) is None
    assert folded([{}, {}], [1.0, 2.0]) == {}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_it_refuses_weights(weight):
    with pytest.raises(ValueError, match=f"weight must be > 0, got {weight}"):
        folded(updates(1), [weight])


def test_it_refuses_updates_that_differ():
    with pytest.raises(ValueError, match=r"w: shapes differ: \(3, 2\) and \(2, 3\)"):
        folded([updates(1)[0], {"w": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(2)}], [1.0, 1.0])


def test_it_is_linear():
    assert weighted_mean().linear
