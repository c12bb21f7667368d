"""Which filters of a layer go: by their norms, or by the scales of the batch norm behind them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsim import rng
from fedsim.records import Params

_TINY = 1e-6  # so that 0.29 * 100 is 29 when rounded down


def removed(channels: int, sparsity: float) -> int:
    """How many go: ``floor(channels * sparsity)``, but one stays.

    Args:
        channels: >= 1.
        sparsity: in [0, 1].

    Raises:
        ValueError: a number out of range.
    """
    if channels < 1:
        raise ValueError(f"channels must be >= 1, got {channels}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    return min(int(channels * sparsity + _TINY), channels - 1)


def l1_filters(weight: Tensor, sparsity: float) -> Tensor:
    """Filters with the largest ``sum |W_j|``; :func:`removed` of the layer go, of equal ones the last.

    Args:
        weight: (out, ...), of one layer: norms of different layers are not comparable.
        sparsity: in [0, 1].

    Returns:
        Those that stay: int64, ascending, at least one.

    Raises:
        ValueError: a sparsity outside [0, 1], no filters, or NaN.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3.1. Differs: none.
    """
    return _largest(weight.detach().abs().flatten(1).sum(1), sparsity)


def l2_filters(weight: Tensor, sparsity: float) -> Tensor:
    """Filters with the largest ``|W_j|_2``. Args, Returns, Raises: as for :func:`l1_filters`.

    Source: He et al. 2018, "Soft Filter Pruning", arXiv:1808.06866, section 3.2 with p = 2. Differs: none.
    """
    return _largest(torch.linalg.vector_norm(weight.detach().flatten(1), dim=1), sparsity)


def random_filters(out: int, sparsity: float, key: int) -> Tensor:
    """As many filters as the norms would leave, any of them: the control.

    Args:
        out: filters of the layer.
        sparsity: in [0, 1].
        key: of this layer.

    Returns, Raises: as for :func:`l1_filters`.
    """
    return rng.permutation(key, out)[: out - removed(out, sparsity)].sort().values


def softened(params: Params, layers: Iterable[str], sparsity: float) -> Params:
    """The parameters with the filters of lowest L2 norm at 0: only weights, so that biases and norms stay.

    Args:
        params: with ``<layer>.weight``, (out, ...). Not changed.
        layers: paths.
        sparsity: share of each layer's filters, in [0, 1].

    Returns:
        All parameters; those of other names are the same tensors.

    Raises:
        ValueError: a layer without weight; or as for :func:`l1_filters`.

    Source: He et al. 2018, algorithm 1; the authors' code zeroes weights of convolutions, which have no bias there.
        Differs: none.
    """
    made = dict(params)
    for layer in layers:
        name = f"{layer}.weight"
        if name not in params:
            raise ValueError(f"{layer}: has no weight to zero filters of")
        gone = torch.ones(len(params[name]), dtype=torch.bool, device=params[name].device)
        gone[l2_filters(params[name], sparsity)] = False
        made[name] = params[name].index_fill(0, gone.nonzero().flatten(), 0.0)
    return made


def slimmed(scales: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Channels that stay, by layer: those with ``|gamma|`` above one threshold for the whole network.

    The threshold is the value at index ``floor(total * share)``, from 0, of all ``|gamma|`` in ascending order. It goes
    itself, as do all that equal it: one more than the share says, or many. A layer without any keeps its largest.

    Args:
        scales: layer -> gamma (out,).
        share: of all channels, in [0, 1).

    Returns:
        layer -> int64, ascending, at least one.

    Raises:
        ValueError: a share outside [0, 1), no scales, a layer without any, or NaN.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv:1708.06519,
        section 3, threshold as in the authors' code. Differs: one channel of each layer stays, the first of equals.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got {share}")
    if not scales:
        raise ValueError("needs the scales of at least one layer")
    sizes = {layer: _numbers(scale.detach().abs(), layer) for layer, scale in scales.items()}
    every = torch.cat(list(sizes.values())).sort().values
    threshold = every[min(int(len(every) * share + _TINY), len(every) - 1)]
    kept = {}
    for layer, size in sizes.items():
        above = (size > threshold).nonzero().flatten()
        kept[layer] = above if len(above) else (size == size.max()).nonzero().flatten()[:1]
    return kept


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """Positions of the largest, ascending; of equal ones the first."""
    staying = len(scores) - removed(len(scores), sparsity)
    return torch.sort(_numbers(scores, "weight"), descending=True, stable=True).indices[:staying].sort().values


def _numbers(values: Tensor, name: str) -> Tensor:
    if not len(values) or bool(torch.isnan(values).any()):
        raise ValueError(f"{name}: must be numbers, at least one, got {'NaN' if len(values) else 'none'}")
    return values
