"""Arithmetic on masks: bool tensors by parameter name, true where an entry remains. Every function is pure.

Parameters that a dict of masks does not name are whole. Shares are of the named parameters alone: biases and scales of
normalisation count nowhere.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fedsim import params as p
from fedsim.records import Params


def prunable(params: Params) -> tuple[str, ...]:
    """Names of the weights: floating-point parameters of two axes or more, in the dict's order.

    That is every matrix of an LSTM, and an embedding too: parameters do not tell it from a linear layer. Whoever wants
    one left whole leaves out its name.
    """
    return tuple(name for name, tensor in params.items() if tensor.dim() > 1 and tensor.is_floating_point())


def ones(params: Params, names: Iterable[str]) -> Params:
    """Masks that remove nothing.

    Raises:
        ValueError: a name is no parameter.
    """
    names = tuple(names)
    if unknown := [name for name in names if name not in params]:
        raise ValueError(f"no parameter is called {', '.join(unknown)}; there are {', '.join(params)}")
    return {name: torch.ones_like(params[name], dtype=torch.bool) for name in names}


def check(kept: Params, params: Params) -> None:
    """Masks fit parameters: each is a bool tensor in the shape of the parameter with its name.

    Raises:
        ValueError: names the first mask that does not.
    """
    for name, mask in kept.items():
        if name not in params:
            raise ValueError(f"{name}: there is a mask and no such parameter")
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: a mask must be bool, got {mask.dtype}")
        if mask.shape != params[name].shape:
            raise ValueError(f"{name}: shape of the mask is {tuple(mask.shape)}, not {tuple(params[name].shape)}")


def part(value: float, what: str) -> float:
    """``value``, if it is a share.

    Raises:
        ValueError: it is not in [0, 1]; says ``what`` it is.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{what} must be in [0, 1], got {value}")
    return value


def applied(params: Params, kept: Params) -> Params:
    """``params`` with exactly +0.0 wherever a mask is false; every other entry has the bits it had.

    Raises:
        ValueError: the masks do not fit (:func:`check`).
    """
    check(kept, params)
    return p.masked(params, kept)


def counts(kept: Params) -> dict[str, int]:
    """How many entries remain, by name."""
    return {name: int(mask.sum()) for name, mask in kept.items()}


def remaining(kept: Params) -> float:
    """Share of all named entries that remain, in [0, 1]; 1 without masks. Sparsity is ``1 - remaining``."""
    return _share(sum(counts(kept).values()), p.num_entries(kept))


def by_layer(kept: Params) -> dict[str, float]:
    """Share of each parameter's entries that remain."""
    return {name: _share(count, kept[name].numel()) for name, count in counts(kept).items()}


def overlap(a: Params, b: Params) -> float:
    """Jaccard index over all entries, ``|a and b| / |a or b|``; 1 where neither keeps anything.

    Two random masks that keep a share d each are expected to reach about ``d / (2 - d)``.

    Raises:
        ValueError: names or shapes differ.
    """
    p.check_alike(a, b)
    return _share(sum(_both(a[n], b[n]) for n in a), sum(_either(a[n], b[n]) for n in a))


def agreement(a: Params, b: Params) -> dict[str, float]:
    """The Jaccard index of :func:`overlap`, by name.

    Raises:
        ValueError: names or shapes differ.
    """
    p.check_alike(a, b)
    return {name: _share(_both(a[name], b[name]), _either(a[name], b[name])) for name in a}


def is_subset(a: Params, b: Params) -> bool:
    """True if whatever remains in ``a`` remains in ``b``.

    Raises:
        ValueError: names or shapes differ.
    """
    p.check_alike(a, b)
    return all(_both(a[name], b[name]) == int(a[name].sum()) for name in a)


def _both(a: Tensor, b: Tensor) -> int:
    return int((a & b).sum())


def _either(a: Tensor, b: Tensor) -> int:
    return int((a | b).sum())


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
