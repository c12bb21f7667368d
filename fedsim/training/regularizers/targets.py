"""Regularisers that change what a batch is, or what it is held against."""

from dataclasses import replace
from functools import partial

from torch import nn

from fedsim.training.losses import smoothed_cross_entropy
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Rate, Regularizer


def label_smoothing(*, epsilon: Rate = 0.1) -> Regularizer:
    """Label smoothing: the target is ``(1 - epsilon) * one-hot + epsilon / classes``.

    Args:
        epsilon: in [0, 1).

    Source: Szegedy et al. 2016, section 7. Differs: none.
    """
    return Regularizer("samples", partial(_bind_smoothing, epsilon))


def _bind_smoothing(epsilon: float, model: nn.Module, objective: Objective) -> Objective:
    return replace(objective, loss=partial(smoothed_cross_entropy, epsilon=epsilon)) if epsilon else objective
