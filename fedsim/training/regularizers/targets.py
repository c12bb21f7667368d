"""Regularisers that change what a batch is, or what it is held against."""

from dataclasses import replace
from functools import partial
from typing import Annotated

from annotated_types import Ge
from torch import nn

from fedsim.models.layers.attaching import attach_first
from fedsim.models.layers.inputs import Cutout, MixingKey
from fedsim.training.losses import smoothed_cross_entropy
from fedsim.training.mixup import mixup as mixed
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Rate, Regularizer, Strength, unbound

Length = Annotated[int, Ge(0)]


def label_smoothing(*, epsilon: Rate = 0.1) -> Regularizer:
    """Label smoothing: the target is ``(1 - epsilon) * one-hot + epsilon / classes``.

    Args:
        epsilon: in [0, 1).

    Source: Szegedy et al. 2016, section 7. Differs: none.
    """
    return Regularizer("samples", partial(_bind_smoothing, epsilon))


def _bind_smoothing(epsilon: float, model: nn.Module, objective: Objective) -> Objective:
    return replace(objective, loss=partial(smoothed_cross_entropy, epsilon=epsilon)) if epsilon else objective


def cutout(*, length: Length | None = None) -> Regularizer:
    """Cutout: one square of each training image is zeroed, in all channels, anywhere, also partly outside.

    Zero is the mean where a data set is standardised, and black where it is not.

    Args:
        length: side of the square in pixels, at most the smaller side of an image; null is a third of that, rounded
            (3 on 8 x 8, 9 on 28 x 28); 0 is none.

    Raises:
        ValueError: when bound, if the model takes tokens; when the model is tried, if inputs are no images.

    Source: DeVries, Taylor 2017, arXiv:1708.04552, section 3. Differs: see :class:`fedsim.models.layers.inputs.Cutout`.
    """
    return Regularizer("inputs", partial(_bind_cutout, length) if length != 0 else unbound)


def _bind_cutout(length: int | None, model: nn.Module, objective: Objective) -> Objective:
    _refuse_tokens(model, "images; every model but char-lstm takes them")
    attach_first(model, "cutout", Cutout(length))
    return objective


def mixup(*, alpha: Strength = 0.2) -> Regularizer:
    """Mixup: ``share * x + (1 - share) * x'`` of two examples, held against the same mean of the losses of both labels.

    The share is one for a batch, from Beta(alpha, alpha); partners are a random order of the batch.

    Args:
        alpha: >= 0; 0 is none, 1 is a uniform share.

    Raises:
        ValueError: when bound, if the model takes tokens, or batches are mixed already.

    Source: Zhang, Cisse, Dauphin, Lopez-Paz 2018, "mixup: Beyond Empirical Risk Minimization", arXiv:1710.09412, eq. 1
        and figure 1. Differs: partners come from the same batch, as in the authors' code (unverified).
    """
    return Regularizer("inputs", partial(_bind_mixup, alpha) if alpha else unbound)


def _bind_mixup(alpha: float, model: nn.Module, objective: Objective) -> Objective:
    _refuse_tokens(model, "inputs that can be averaged; every model but char-lstm takes them")
    if objective.mixing is not None:
        raise ValueError(f"the batch is mixed already, by {objective.mixing[0].rpartition('.')[0]}")
    attach_first(model, "mixup", MixingKey())
    return replace(objective, mixing=("mixup.key", partial(mixed, alpha=alpha)))


def _refuse_tokens(model: nn.Module, needed: str) -> None:
    """Refuse a model whose first layer with parameters is an embedding."""
    first = next((module for module in model.modules() if module._parameters), None)
    if isinstance(first, nn.Embedding | nn.EmbeddingBag):
        raise ValueError(f"needs {needed}")
