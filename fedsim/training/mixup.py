"""Mixup of a batch."""

import torch
from torch import Tensor

from fedsim import rng
from fedsim.records import IGNORED
from fedsim.training.objective import Mixed


def mixup(inputs: Tensor, labels: Tensor, key: Tensor, *, alpha: float) -> Mixed:
    """``share * x[i] + (1 - share) * x[partner[i]]``, with one share a batch, from Beta(alpha, alpha).

    Partners are a random order of the rows that have a label. Rows whose labels are all -100, which pad short clients,
    stay as they are and are nobody's partner; added at the end of a batch they change nothing.

    Args:
        inputs: floating (batch, ...).
        labels: int64 (batch, ...).
        key: int64 ().
        alpha: > 0.

    Raises:
        ValueError: inputs are integers, such as tokens.
    """
    if not inputs.is_floating_point():
        raise ValueError(f"mixup needs inputs that can be averaged, got {inputs.dtype}")
    partner = _partners((labels != IGNORED).flatten(1).any(1) if labels.dim() > 1 else labels != IGNORED, key)
    share = rng.beta(rng.fold_tensor(key, 1), alpha, alpha, dtype=torch.float64).to(inputs.dtype)
    mixed = share * inputs + (1 - share) * inputs[partner]
    return Mixed(mixed, labels[partner], share)


def _partners(valid: Tensor, key: Tensor) -> Tensor:
    """Int64 (batch,): the valid rows in random order, each in the place of a valid one; others are with themselves."""
    draws = rng.bits(rng.fold_tensor(key, 0), len(valid))
    order = torch.argsort(torch.where(valid, draws, torch.iinfo(torch.int64).max), stable=True)  # valid rows first
    number = (valid.cumsum(0) - 1).clamp(min=0)
    return torch.where(valid, order[number], torch.arange(len(valid), device=valid.device))
