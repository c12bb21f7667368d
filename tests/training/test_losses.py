"""Cross-entropy against scikit-learn's log loss."""

import math

import pytest
import torch
from sklearn.metrics import log_loss

from fedsim import rng
from fedsim.training.losses import cross_entropy


def test_cross_entropy_is_the_mean_log_loss():
    logits, labels = rng.normal(1, 9, 4, dtype=torch.float64) * 3, rng.bits(2, 9) % 4
    labels = labels.abs()
    expected = log_loss(labels.numpy(), logits.softmax(1).numpy(), labels=range(4))
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, abs=1e-12)


def test_sequences_count_by_label_and_leave_padding_out():
    """Two sequences, one with one label and one with three: each label counts the same, not each sequence."""
    logits = rng.normal(3, 2, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[1, -100, -100], [0, 3, 2]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 1] + log_p[1, 0, 0] + log_p[1, 1, 3] + log_p[1, 2, 2]) / 4
    assert float(cross_entropy(logits, labels)) == pytest.approx(float(expected), abs=1e-14)


def test_no_label_at_all_is_nan():
    assert math.isnan(float(cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100]))))
