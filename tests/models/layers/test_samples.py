import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from fedsim import rng
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import adds_axis, key_names
from fedsim.models.layers.samples import Samples

KEY = rng.as_tensor(rng.fold(3, "here"))


def called(layer, x, key=KEY):
    return functional_call(layer.train(), {"key": key}, (x,))


@pytest.mark.parametrize("shape", [(5, 4), (3, 6, 4)])
def test_one_sample_is_dropout_bit_for_bit(shape):
    x = rng.normal(1, *shape)
    assert torch.equal(called(Samples(1, 0.4), x).squeeze(-2), called(Dropout(0.4), x))


def test_entry_i_has_draw_i_with_the_batch_first_and_features_last():
    x = rng.normal(1, 2, 3, 4, dtype=torch.float64)
    made, draws = called(Samples(5, 0.3), x), iter(rng.uniform(KEY, 2 * 3 * 5 * 4).tolist())
    for n, t, m, d in np.ndindex(2, 3, 5, 4):
        assert made[n, t, m, d].item() == (x[n, t, d].item() / 0.7 if next(draws) >= 0.3 else 0.0)


def test_more_rows_change_no_other():
    x = rng.normal(1, 9, 4)
    assert torch.equal(called(Samples(3, 0.5), x)[:5], called(Samples(3, 0.5), x[:5]))


def test_samples_differ_and_evaluation_has_one_without_dropout():
    layer, x = Samples(4, 0.5), torch.ones(2, 50)
    masks = called(layer, x)
    assert all(not torch.equal(masks[:, i], masks[:, j]) for i in range(4) for j in range(i))
    assert layer.eval()(x) is x
    assert called(Samples(3, 0.0), x).shape == (2, 3, 50)
    assert adds_axis(nn.Sequential(layer)) and key_names(nn.Sequential(layer)) == ("0.key",)


def test_under_vmap_each_client_draws_from_its_own_key():
    layer, x = Samples(3, 0.5).train(), rng.normal(1, 4, 5, 6)
    keys = rng.bits(2, 4)
    mapped = vmap(lambda key, one: functional_call(layer, {"key": key}, (one,)))(keys, x)
    assert torch.equal(mapped, torch.stack([called(layer, x[i], keys[i]) for i in range(4)]))


def test_the_variance_of_a_gradient_over_masks_falls_like_one_over_samples():
    """The slope of its logarithm over that of the number of samples is -1. With n = 400 masks for each of 5 numbers a
    variance is uncertain by at most 7 % (that of one normal entry; here it is a sum over 12), and the slope by 0.032:
    beyond 0.2 once in 10^8 choices of keys at most.
    """
    x, labels = rng.normal(1, 6, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0, 2])
    weight, numbers = rng.normal(2, 3, 4, dtype=torch.float64), [1, 2, 4, 8, 16]

    def loss(weight, layer, key):
        logits = F.linear(functional_call(layer, {"key": key}, (x,)), weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]))

    def variance(samples):
        layer, keys = Samples(samples, 0.5).train(), rng.bits(rng.fold(5, samples), 400)
        grads = vmap(lambda key: grad(loss)(weight, layer, key))(keys)
        return grads.var(0).sum().item()

    slope = np.polyfit(np.log(numbers), np.log([variance(m) for m in numbers]), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.2)


def test_it_can_be_copied_and_sent():
    layer, x = Samples(3, 0.5), rng.normal(1, 4, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(called(other, x), called(layer, x))
    assert repr(layer) == "Samples(samples=3, p=0.5)"


@pytest.mark.parametrize(("samples", "p", "rule"), [(0, 0.5, "samples must be >= 1, got 0"), (2, 1.0, "p must be in")])
def test_refused(samples, p, rule):
    with pytest.raises(ValueError, match=rule):
        Samples(samples, p)
