"""Losses of models with several heads: pure functions of (logits, labels).

Logits are (*labels, heads, classes), or (*labels, heads, samples, classes) with several dropout samples, whose losses
are averaged; the axis of the heads is the first behind those of the labels. Rows whose label is -100 count nothing.
All are made from a ``base`` loss of logits and labels, a mean over rows, such as the cross-entropy.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.records import IGNORED
from fedsim.training.objective import Loss


def collaborative(logits: Tensor, labels: Tensor, *, base: Loss, beta: float, temperature: float) -> Tensor:
    """Sum over heads of ``beta * J_hard + (1 - beta) * J_soft``.

    ``J_hard`` is ``base`` of the head, and ``J_soft = -sum_k q_k log softmax(z / T)_k`` is held against the mean
    logits of the other heads, ``q = softmax(mean_others / T)``, through which no gradient goes.

    Args:
        logits: see above, two heads or more.
        labels: int64.
        base: of one head.
        beta: in [0, 1].
        temperature: T > 0. There is no factor of T^2.

    Returns:
        Scalar tensor (), in nats. NaN if every label is -100.

    Source: Song, Chai 2018, "Collaborative Learning for Deep Neural Networks", arXiv:1805.11761, section 3.2
        (equations unverified). Differs: none known.
    """
    heads = logits.shape[labels.dim()]
    targets = F.softmax(_others(logits, labels) / temperature, -1)
    soft = _mean(-(targets * F.log_softmax(logits / temperature, -1)).sum(-1), labels)
    return heads * (beta * base(logits, labels) + (1 - beta) * soft)


def interpolated(logits: Tensor, labels: Tensor, *, base: Loss, weight: float) -> Tensor:
    """``(1 - mu) * L(mean logits) + mu * mean_i L_i``, mu being ``weight`` >= 0.

    For cross-entropy that is ``L(mean logits) + mu * mean_i KL(softmax(mean logits) || p_i)``, never below 0: with mu 0
    only the ensemble is trained, with 1 each head alone, and beyond that heads are pulled together.

    Args, Returns: as for :func:`collaborative`.
    """
    return (1 - weight) * base(logits.mean(labels.dim()), labels) + weight * base(logits, labels)


def summed(logits: Tensor, labels: Tensor, *, base: Loss, weight: float, cap: bool = False) -> Tensor:
    """``L(mean logits) + lambda * sum_i L_i``, lambda being ``weight``.

    For cross-entropy of N heads that is ``(1 + lambda N) L(mean logits) + lambda sum_i KL(pbar || p_i)``, pbar being
    the softmax of the mean logits. With a negative lambda heads are rewarded for being wrong, without bound unless
    ``cap`` is set.

    Args, Returns: as for :func:`collaborative`.
        cap: count at most ``ln(classes)`` for a head, the loss of a guess.
    """
    ensemble, axis = base(logits.mean(labels.dim()), labels), labels.dim()
    if not cap:
        return ensemble + weight * logits.shape[axis] * base(logits, labels)
    each = torch.stack([base(logits.select(axis, i), labels) for i in range(logits.shape[axis])])
    return ensemble + weight * each.clamp(max=math.log(logits.shape[-1])).sum()


def codistillation(logits: Tensor, labels: Tensor, *, base: Loss, weight: float) -> Tensor:
    """``mean_i (L_i + g * KL(q_i || p_i))``, g being ``weight`` >= 0.

    ``q_i`` is the softmax of the mean logits of the other heads, through which no gradient goes.

    Args, Returns: as for :func:`collaborative`.
    """
    teachers = F.log_softmax(_others(logits, labels), -1)
    apart = (teachers.exp() * (teachers - F.log_softmax(logits, -1))).sum(-1)
    return base(logits, labels) + weight * _mean(apart, labels)


def disagreement(logits: Tensor) -> Tensor:
    """Share of pairs of heads whose guesses differ, over all examples.

    Args:
        logits: (..., heads, classes), two heads or more; of a model that shows all, as ``fedsim.models.forks.showing``
            makes it do.

    Returns:
        Scalar tensor () in [0, 1], float64.

    >>> disagreement(torch.tensor([[[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]]]))
    tensor(0.6667, dtype=torch.float64)
    """
    guesses = logits.argmax(-1)
    heads = guesses.shape[-1]
    differ = guesses.unsqueeze(-1) != guesses.unsqueeze(-2)  # (..., heads, heads), never on the diagonal
    return differ.double().mean() * heads / (heads - 1)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """For each head the mean logits of the others, as a constant."""
    axis, fixed = labels.dim(), logits.detach()
    return (fixed.sum(axis, keepdim=True) - fixed) / (fixed.shape[axis] - 1)


def _mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of values (*labels, ...) over their further axes and the labels that count."""
    counts = labels != IGNORED
    return torch.where(counts, values.flatten(labels.dim()).mean(-1), 0.0).sum() / counts.sum()
