"""Penalties on parameters, each a scalar to be added to the loss of every batch.

``local`` are a client's parameters (name -> tensor), ``start`` what it started the round with. *Weights* are
parameters of two axes or more; biases, and scales of normalisation, are left alone where a docstring says weights.
A convolution's filter, and the row of a linear layer, is the part of a weight that makes one output channel.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedsim import rng
from fedsim.records import Params
from fedsim.training.objective import Start

POWER_STEPS = 10  # of the power iteration; torch's spectral norm takes one a step, and keeps its vector between steps


def l1(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength * sum |w|`` over weights."""
    return strength * _sum(w.abs().sum() for w in _weights(local))


def l2(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength / 2 * sum w^2`` over weights."""
    return strength / 2 * _sum(w.square().sum() for w in _weights(local))


def proximal(local: Params, start: Start, *, mu: float) -> Tensor:
    """``mu / 2 * ||w - start||^2`` over all parameters that the client was sent."""
    return mu / 2 * _sum((local[name] - sent).square().sum() for name, sent in start.params.items())


def group_lasso(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength * sum_g sqrt(|g|) ||w_g||`` over filters and rows g, |g| their numbers of entries."""
    return strength * _sum(_groups(w) for w in _weights(local))


def orthogonal(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength * sum ||G - I||_F^2`` over weights, ``G = W W^T`` of filters or rows, or ``W^T W`` if W is tall."""
    return strength * _sum(_off_orthogonal(w.flatten(1)) for w in _weights(local))


def spectral(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength / 2 * sum sigma_max(W)^2`` over weights, the largest singular values by power iteration."""
    return strength / 2 * _sum(_sigma(w.flatten(1)).square() for w in _weights(local))


def slimming(local: Params, start: Start, *, names: Sequence[str], strength: float) -> Tensor:
    """``strength * sum |gamma|`` over the named scales of batch norm."""
    return strength * _sum(local[name].abs().sum() for name in names)


def _weights(params: Params) -> Iterator[Tensor]:
    return (tensor for tensor in params.values() if tensor.dim() > 1)


def _sum(terms: Iterator[Tensor]) -> Tensor:
    return torch.stack([*terms]).sum()


def _groups(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)  # its gradient at 0 is 0, where a root would give NaN
    return norms.sum() * math.sqrt(rows.shape[1])


def _off_orthogonal(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    gram = matrix @ matrix.mT if rows <= columns else matrix.mT @ matrix
    return (gram - torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)).square().sum()


def _sigma(matrix: Tensor) -> Tensor:
    """The largest singular value; its gradient is ``u v^T``, since the vectors are held fixed."""
    fixed = matrix.detach()
    v = rng.normal(0, matrix.shape[1], dtype=matrix.dtype).to(matrix.device)
    for _ in range(POWER_STEPS):
        u = _unit(fixed @ v)
        v = _unit(fixed.mT @ u)
    sigma: Tensor = u @ matrix @ v
    return sigma


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp(min=torch.finfo(vector.dtype).tiny)
