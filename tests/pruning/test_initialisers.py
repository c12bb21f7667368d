"""Other initial values against the values that there are to draw from."""

import pytest
import torch

from fedsim import params as p
from fedsim import rng
from fedsim.pruning import initialisers, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_are_drawn_from_the_layers_own_survivors(dtype):
    initial = {n: rng.normal(rng.fold(3, n), *s, dtype=dtype) for n, s in (("a", (40, 25)), ("b", (40, 25)))}
    initial["bias"] = rng.normal(5, 4, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in initial.items()}
    kept = {n: rng.bernoulli(rng.fold(4, n), 0.3, 40, 25) for n in "ab"}
    found = initialisers.resampled(initial, kept, 7)
    assert p.same_bits(initial, before) and torch.equal(found["bias"], initial["bias"])
    for name, mask in kept.items():
        left, new = initial[name][mask], found[name][mask]
        assert found[name].dtype == dtype and not found[name][~mask].any()
        assert set(new.tolist()) <= set(left.tolist())
        # n of n with replacement: a value is missed with probability (1 - 1/n)^n, so that 63.2 % are drawn, with a
        # standard deviation of about 0.31 / sqrt(n), 0.018 of 300 values
        assert len(set(new.tolist())) / len(left) == pytest.approx(0.632, abs=5 * 0.018)
    assert not p.same_bits(found, initialisers.resampled(initial, kept, 8))
    assert p.same_bits(found, initialisers.resampled(initial, kept, 7))


def test_layers_with_equal_values_and_masks_draw_apart_and_the_first_as_often_as_the_last():
    values = {n: torch.arange(1.0, 11.0).reshape(2, 5) for n in "ab"}
    kept = masks.ones(values, "ab")
    draws = [initialisers.resampled(values, kept, key) for key in range(500)]
    assert not all(torch.equal(draw["a"], draw["b"]) for draw in draws)
    # 5,000 draws of 10 values: each comes 500 times, standard deviation 21.2; 5 of them are passed with a probability
    # below 10 * 6e-7
    seen = torch.stack([draw["a"] for draw in draws]).long().flatten().bincount(minlength=11)[1:]
    assert int(seen.sum()) == 5000 and (seen - 500).abs().max() < 5 * 21.2


def test_an_empty_layer_stays_empty():
    found = initialisers.resampled({"w": torch.ones(2, 2)}, {"w": torch.zeros(2, 2, dtype=torch.bool)}, 1)
    assert found["w"].tolist() == [[0, 0], [0, 0]]
