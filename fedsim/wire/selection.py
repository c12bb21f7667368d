"""Which entries of an update are sent: the largest, or some that a key names."""

import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.records import Params


def num_kept(n: int, fraction: float) -> int:
    """``max(1, round(fraction n))`` of n entries (none of none); halves are rounded to the even neighbour.

    Args:
        n: >= 0.
        fraction: in (0, 1].

    Raises:
        ValueError: another fraction.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    return min(n, max(1, round(fraction * n)))


def top_k(tensors: Params, fraction: float) -> Params:
    """The k entries of largest magnitude among all tensors together, k = :func:`num_kept`; of equals the first.

    A NaN counts as infinite: what is wrong is sent.

    Args:
        tensors: floating point.
        fraction: in (0, 1].

    Returns:
        Bool tensors, k of whose entries are true; for :func:`keep`.

    Raises:
        ValueError: fraction out of range; a tensor of another type.

    Source: Stich, Cordonnier, Jaggi 2018, "Sparsified SGD with memory", NeurIPS, definition 2.2 (top_k).
    """
    size = _magnitudes(tensors)
    k = num_kept(len(size), fraction)
    if k == 0:
        return p.unflatten(size > 0, tensors)
    least = torch.kthvalue(size, len(size) - k + 1).values
    kept = size > least
    equal = torch.nonzero(size == least)[:, 0]
    kept[equal[: k - int(kept.sum())]] = True
    return p.unflatten(kept, tensors)


def _magnitudes(tensors: Params) -> Tensor:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: magnitudes need floating-point tensors, got {tensor.dtype}")
    wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    sizes = [tensor.reshape(-1).abs().to(torch.float64 if wide else torch.float32) for tensor in tensors.values()]
    return torch.cat(sizes).nan_to_num_(nan=torch.inf, posinf=torch.inf) if sizes else torch.zeros(0)


def random_k(like: Params, fraction: float, key: int) -> Params:
    """Draws k entries of all tensors together, uniformly without replacement, k = :func:`num_kept`.

    Who has the key has the support, so only values need to be sent.

    Args:
        like: only names and shapes count.
        fraction: in (0, 1].
        key: of this client and round.

    Returns:
        Bool tensors, k of whose entries are true; for :func:`keep`.

    Raises:
        ValueError: fraction out of range.

    Source: Stich, Cordonnier, Jaggi 2018, "Sparsified SGD with memory", NeurIPS, definition 2.2 (rand_k).
    """
    n = p.num_entries(like)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[rng.choice(key, n, num_kept(n, fraction))] = True
    return p.unflatten(kept, like)


def keep(tensors: Params, support: Params, *, unbiased: bool = False) -> Params:
    """The entries in ``support``; all others are 0.

    Args:
        tensors: of any dtype.
        support: bool tensors of their names and shapes.
        unbiased: multiplied by n / k (all entries, and those kept), so that the mean over the keys of :func:`random_k`
            is ``tensors``. Not under error feedback, whose error has to be smaller than what it is the error of:
            ``E |keep(x) - x|^2`` is ``(1 - k / n) |x|^2`` as it is, and ``(n / k - 1) |x|^2`` scaled.

    Raises:
        ValueError: other names.
    """
    if tensors.keys() != support.keys():
        raise ValueError(f"names differ: {sorted(tensors.keys() ^ support.keys())}")
    k = sum(int(kept.sum()) for kept in support.values())
    whole = p.scale(tensors, p.num_entries(tensors) / k) if unbiased and k else tensors
    return {n: torch.where(support[n].to(x.device), x, x.new_zeros(())) for n, x in whole.items()}
