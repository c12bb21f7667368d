"""Targeted dropout: weights that pruning would take are dropped now and then, so that the others do without them."""

from typing import Literal

import torch
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.keyed import Ramped

Kind = Literal["weight", "unit"]


def candidates(weight: Tensor, share: float | Tensor, *, kind: Kind) -> Tensor:
    """Which entries of a weight pruning takes first.

    ``weight``: of each row (filter) the ``floor(share * entries)`` of lowest magnitude. ``unit``: all of the
    ``floor(share * rows)`` rows of lowest Euclidean norm. Equal ones that would be too many are all left out.

    Args:
        weight: (out, ...), at least two axes; a row makes one output.
        share: in [0, 1]; or a float64 tensor (). A millionth of an entry is added: 0.29 * 100 is not quite 29.
        kind: what is ranked.

    Returns:
        Bool tensor like ``weight``, true for candidates. No gradient goes through the ranking.

    Source: Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout", arXiv:1905.13678, eq. for unit and
        weight pruning. Differs: none.

    >>> candidates(torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 0.2, 0.3, 0.4]]), 0.5, kind="weight").int()
    tensor([[0, 1, 0, 1],
            [1, 1, 0, 0]], dtype=torch.int32)
    """
    rows = weight.detach().flatten(1)
    if kind == "weight":
        return _lowest(rows.abs(), share).reshape(weight.shape)
    low = _lowest(torch.linalg.vector_norm(rows, dim=1), share)
    return low.reshape(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)


def _lowest(values: Tensor, share: float | Tensor) -> Tensor:
    """The floor(share * n) lowest of values >= 0 along the last axis, of length n.

    Sorting takes far longer. The bits of floats that are not negative are ordered as the floats are, so the value that
    comes next is found bit by bit: it is the largest with no more than that many below it.
    """
    values = values if values.dtype == torch.float64 else values.float()
    integer, bits = (torch.int64, 63) if values.dtype == torch.float64 else (torch.int32, 31)
    n = values.shape[-1]
    # Below minus above is 2 * below - n, or one more if one value is at the edge itself.
    most = 2.0 * torch.as_tensor(share * n + 1e-6, dtype=torch.float64, device=values.device).floor() - n + 1.5
    edge = torch.zeros_like(values[..., :1], dtype=integer)
    for bit in reversed(range(bits)):
        higher = edge + (1 << bit)
        balance = torch.sign(higher.view(values.dtype) - values).sum(-1, keepdim=True)
        edge = torch.where(balance < most, higher, edge)
    return values.view(integer) < edge  # not as floats: if all are candidates, the edge is beyond infinity


def ramp(progress: Tensor) -> tuple[Tensor, Tensor]:
    """Factors on the share of candidates and on the probability, after a part ``progress`` of all rounds.

    ``0.95 min(1, 2t) + 0.05 max(0, 2t - 1)`` and ``t``.

    Source: the authors' code (for-ai/TD, ramping targeted dropout). Differs: theirs counts steps, t = step / 40,000.
    """
    progress = progress.double()
    return 0.95 * (2.0 * progress).clamp(max=1.0) + 0.05 * (2.0 * progress - 1.0).clamp(min=0.0), progress


class TargetedDropout(Ramped):
    """Zero each of the weight's :func:`candidates` with probability ``drop`` in training; the identity in evaluation.

    The others are not scaled. Entry i of the weight, or row i, uses draw i of ``self.key``.

    Args:
        kind: drop single weights or whole rows.
        target: share of candidates, in [0, 1].
        drop: probability with which a candidate is dropped, in [0, 1].
        ramped: multiply both with :func:`ramp` of the federation's progress.
    """

    def __init__(self, kind: Kind, target: float, drop: float, *, ramped: bool) -> None:
        super().__init__()
        self.kind, self.target, self.drop, self.ramped = kind, target, drop, ramped

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` (out, ...) with zeros in it; same shape and dtype."""
        if not self.training:
            return weight
        target, drop = ramp(self.progress if self.ramped else torch.ones_like(self.progress))
        shape = weight.shape if self.kind == "weight" else (len(weight), *[1] * (weight.dim() - 1))
        drawn = rng.uniform(self.key, *shape) < (self.drop * drop).float()
        return torch.where(candidates(weight, self.target * target, kind=self.kind) & drawn, 0.0, weight)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"kind={self.kind}, target={self.target}, drop={self.drop}, ramped={self.ramped}"
