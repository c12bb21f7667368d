"""Divergences from the posterior over a weight to its prior, as penalties on the parameters of variational dropout.

A weight is ``w ~ N(theta, alpha theta^2)``, the prior is uniform in ``log |w|``. That prior has no norm, so the
divergence is known up to a constant only; no gradient depends on it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.models.layers.variational import log_alphas
from fedsim.records import Params
from fedsim.training.objective import Start

_CUBIC = (1.16145124, -1.50204118, 0.58629921)
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def gaussian(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength / n * sum of`` :func:`bounded_divergence` over the weights beside a ``log_alpha``, n the examples.

    A ``log_alpha`` of a layer or of a unit counts for each of its weights.
    """
    terms = []
    for path in _paths(local, "log_alpha"):
        log_alpha = local[f"{path}log_alpha"]
        weights = local[f"{path}weight"].numel() / log_alpha.numel()
        terms.append(weights * bounded_divergence(log_alpha).sum())
    return strength * torch.stack(terms).sum() / start.num_examples


def sparse(local: Params, start: Start, *, strength: float) -> Tensor:
    """``strength / n * sum of`` :func:`divergence` over the weights beside a ``log_sigma2``, n the examples."""
    terms = [
        divergence(log_alphas(local[f"{path}weight"], local[f"{path}log_sigma2"])).sum()
        for path in _paths(local, "log_sigma2")
    ]
    return strength * torch.stack(terms).sum() / start.num_examples


def bounded_divergence(log_alpha: Tensor) -> Tensor:
    """``-0.5 log alpha - c1 alpha - c2 alpha^2 - c3 alpha^3`` for alpha up to 1, and its value at 1 beyond.

    Args:
        log_alpha: any shape.

    Returns:
        Tensor of that shape, in nats, up to a constant: within 0.007 of the true one for alpha in [0.05, 1].

    Source: Kingma, Salimans, Welling 2015, eq. 14 (number unverified). Differs: constant beyond 1, where the cubic is
        wrong.
    """
    log_alpha = log_alpha.clamp(max=0.0)
    alpha = log_alpha.exp()
    c1, c2, c3 = _CUBIC
    return -0.5 * log_alpha - alpha * (c1 + alpha * (c2 + alpha * c3))


def divergence(log_alpha: Tensor) -> Tensor:
    """``k1 - k1 sigmoid(k2 + k3 log alpha) + 0.5 log(1 + 1 / alpha)``, for any alpha; it falls to 0.

    Args:
        log_alpha: any shape.

    Returns:
        Tensor of that shape, in nats, up to a constant: within 0.006 of the true one for alpha in [0.05, 10].

    Source: Molchanov, Ashukha, Vetrov 2017, eq. 14 (number unverified). Differs: none.
    """
    return _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * F.softplus(-log_alpha)


def _paths(local: Params, name: str) -> list[str]:
    """What stands before the name: found among the parameters, since heads copy layers after they were made."""
    return [path.removesuffix(name) for path in local if path.endswith(f".{name}")]
