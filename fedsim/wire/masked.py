"""Parameters with masks, as bytes: only the values that remain, and the masks themselves, one bit an entry.

Whoever knows the masks needs no positions: the values of a parameter travel as a vector, in the order of its entries.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.records import Params

_MOST_AXES = 64  # as NumPy; a stranger's product of millions of sides would take hours


def remaining(tensors: Params, kept: Mapping[str, Tensor]) -> Params:
    """``tensors`` with those that have a mask reduced to the vector of their remaining values."""
    return {name: tensor[kept[name]] if name in kept else tensor for name, tensor in tensors.items()}


def restored(tensors: Params, kept: Mapping[str, Tensor]) -> Params:
    """The inverse of :func:`remaining`; a tensor that was not reduced, though it has a mask, stays as it is.

    Raises:
        ValueError: a vector has not as many values as its mask keeps.
    """
    return {name: _restored(name, t, kept[name]) if name in kept else t for name, t in tensors.items()}


def _restored(name: str, tensor: Tensor, mask: Tensor) -> Tensor:
    if tensor.shape == mask.shape:
        return tensor
    count = int(mask.sum())
    if tensor.shape != (count,):
        raise ValueError(f"{name}: its mask keeps {count} entries, got values of shape {tuple(tensor.shape)}")
    whole = tensor.new_zeros(mask.shape)
    whole[mask] = tensor
    return whole


def bits(kept: Mapping[str, Tensor]) -> Params:
    """Masks as uint8 vectors of ceil(entries / 8), the first entry in the highest bit."""
    return {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in kept.items()}


def from_bits(packed: Params, shapes: Mapping[str, Sequence[int]]) -> Params:
    """The inverse of :func:`bits`.

    Raises:
        ValueError: other names, or not as many bits as a shape has entries.
    """
    if packed.keys() != shapes.keys():
        raise ValueError(f"masks and their shapes have other names: {sorted(packed.keys() ^ shapes.keys())}")
    return {name: _from_bits(name, packed[name], tuple(shape)) for name, shape in shapes.items()}


def _from_bits(name: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) > _MOST_AXES or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"{name}: not a shape: {shape!r:.100}")
    entries = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (-(-entries // 8),):
        raise ValueError(
            f"{name}: {entries} entries need a mask of {-(-entries // 8)} bytes, got {tuple(packed.shape)}"
        )
    flat = np.unpackbits(packed.numpy(), count=entries).astype(bool)
    return torch.from_numpy(flat).view(shape)
