"""Losses of a batch."""

import torch.nn.functional as F
from torch import Tensor

from fedsim.records import IGNORED


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log softmax(logits)[label]`` over all labels that are not -100.

    Args:
        logits: (batch, classes), or (batch, time, classes); or with more axes before the last, such as
            (batch, heads, classes), each of whose rows is held against the same label.
        labels: (batch,), or (batch, time), int64.

    Returns:
        Scalar tensor (), in nats. NaN if every label is -100.
    """
    return F.cross_entropy(*_rows(logits, labels), ignore_index=IGNORED)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """:func:`cross_entropy` against ``(1 - epsilon) * one-hot + epsilon / classes``."""
    return F.cross_entropy(*_rows(logits, labels), ignore_index=IGNORED, label_smoothing=epsilon)


def _rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (rows, classes) and labels (rows,)."""
    more = logits.dim() - labels.dim() - 1
    if more:
        labels = labels.reshape(*labels.shape, *[1] * more).expand(logits.shape[:-1])
    return logits.flatten(0, -2), labels.flatten()
