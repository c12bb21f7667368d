"""Losses of a batch."""

import torch.nn.functional as F
from torch import Tensor

from fedsim.records import IGNORED


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log softmax(logits)[label]`` over all labels that are not -100.

    Args:
        logits: (batch, classes), or (batch, time, classes).
        labels: (batch,), or (batch, time), int64.

    Returns:
        Scalar tensor (), in nats. NaN if every label is -100.
    """
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """:func:`cross_entropy` against ``(1 - epsilon) * one-hot + epsilon / classes``."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, label_smoothing=epsilon)
