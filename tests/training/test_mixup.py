import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.func import vmap

from fedsim import rng
from fedsim.training.mixup import mixup


def batch(n, seed=1):
    return rng.normal(seed, n, 2, 3, dtype=torch.float64), (rng.uniform(seed + 1, n) * 4).long()


def partners(inputs, mixed):
    """Which row each row was mixed with, found from the result alone."""
    share = float(mixed.share)
    rest = ((mixed.inputs - share * inputs) / (1 - share)).flatten(1)
    distances = torch.cdist(rest, inputs.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(1).values.max() < 1e-9
    return distances.argmin(1).tolist()


def test_rows_are_mixed_with_the_rows_of_a_random_order():
    inputs, labels = batch(40)
    mixed = mixup(inputs, labels, rng.as_tensor(5), alpha=2.0)
    found = partners(inputs, mixed)
    assert sorted(found) == list(range(40)) and found != list(range(40))
    assert torch.equal(mixed.partners, labels[found])
    assert mixed.share.shape == () and 0.01 < mixed.share < 0.99
    assert found != partners(inputs, mixup(inputs, labels, rng.as_tensor(6), alpha=2.0))


def test_the_loss_is_that_against_the_mixed_target():
    """The mean of two losses is the cross-entropy against the mean of two one-hot targets."""
    inputs, labels = batch(9)
    mixed = mixup(inputs, labels, rng.as_tensor(3), alpha=1.0)
    logits, share = rng.normal(4, 9, 4, dtype=torch.float64), mixed.share
    both = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, mixed.partners)
    target = share * F.one_hot(labels, 4) + (1 - share) * F.one_hot(mixed.partners, 4)
    assert both.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-12)


@pytest.mark.parametrize("padding", [1, 5, 30])
def test_rows_without_a_label_at_the_end_change_nothing(padding):
    inputs, labels = batch(7)
    more, _ = batch(padding, seed=50)
    key = rng.as_tensor(11)
    alone = mixup(inputs, labels, key, alpha=1.0)
    padded = mixup(torch.cat([inputs, more]), F.pad(labels, (0, padding), value=-100), key, alpha=1.0)
    assert torch.equal(padded.inputs[:7], alone.inputs) and torch.equal(padded.partners[:7], alone.partners)
    assert padded.share == alone.share
    assert torch.allclose(padded.inputs[7:], more, rtol=1e-12) and (padded.partners[7:] == -100).all()


def test_rows_without_a_label_in_between_are_left_out_too():
    inputs, labels = batch(20)
    labels[[0, 3, 4, 11, 19]] = -100
    valid = [i for i in range(20) if labels[i] != -100]
    found = partners(inputs, mixup(inputs, labels, rng.as_tensor(2), alpha=2.0))
    assert sorted(found[i] for i in valid) == valid
    assert [found[i] for i in (0, 3, 4, 11, 19)] == [0, 3, 4, 11, 19]


def test_a_row_counts_if_any_of_its_labels_does():
    inputs = rng.normal(1, 6, 5, dtype=torch.float64)
    labels = torch.full((6, 5), -100)
    labels[[0, 2, 3], [1, 0, 4]] = 1
    found = partners(inputs, mixup(inputs, labels, rng.as_tensor(1), alpha=2.0))
    assert sorted(found[i] for i in (0, 2, 3)) == [0, 2, 3] and [found[i] for i in (1, 4, 5)] == [1, 4, 5]


def test_partners_are_every_row_equally_often():
    """Row by partner, n = 20,000 keys: (4/5) sum (O - E)^2 / E is chi-squared of 4^2; a false alarm 1e-6."""
    keys = rng.fold_tensor(rng.as_tensor(8), torch.arange(20_000))
    inputs, labels = torch.zeros(5, 1), torch.arange(5)
    mixed = vmap(lambda key: mixup(inputs, labels, key, alpha=0.5))(keys)
    counts = np.bincount((mixed.partners * 5 + torch.arange(5)).flatten().numpy(), minlength=25)
    assert stats.chi2.sf(0.8 * stats.chisquare(counts).statistic, 16) > 1e-6
    share = mixed.share.double().numpy()
    within = share[(share > 0.001) & (share < 0.999)]
    law, low, high = stats.beta(0.5, 0.5), *stats.beta(0.5, 0.5).cdf([0.001, 0.999])
    assert stats.binomtest(len(within), 20_000, high - low).pvalue > 1e-6
    assert stats.kstest(within, lambda x: (law.cdf(x) - low) / (high - low)).pvalue > 1e-6


def test_a_lane_of_vmap_is_mixed_as_alone():
    (x, labels), keys = batch(12), torch.tensor([3, -4, 2**62])
    inputs, labels = x.reshape(3, 4, 2, 3), labels.reshape(3, 4).clone()
    labels[1, 2:], labels[2, 3:] = -100, -100
    together = vmap(lambda *own: mixup(*own, alpha=0.2))(inputs, labels, keys)
    for lane in range(3):
        alone = mixup(inputs[lane], labels[lane], keys[lane], alpha=0.2)
        assert all(torch.equal(a[lane], b) for a, b in zip(together, alone, strict=True))


def test_one_row_is_mixed_with_itself():
    inputs, labels = batch(1)
    mixed = mixup(inputs, labels, rng.as_tensor(1), alpha=1.0)
    assert torch.allclose(mixed.inputs, inputs, rtol=1e-14) and torch.equal(mixed.partners, labels)


def test_tokens_are_refused():
    with pytest.raises(ValueError, match=r"mixup needs inputs that can be averaged, got torch\.int64"):
        mixup(torch.ones(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), torch.tensor(1), alpha=0.2)
