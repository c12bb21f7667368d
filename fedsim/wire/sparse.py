"""Tensors with many zeros as bytes.

A message is a fingerprint of 8 bytes (names, shapes and dtypes in order, known masks, coding), and then each tensor
in turn, in the shortest form that :mod:`fedsim.wire.support` has for it, hence for the message. Where both ends know a
mask (``known``), a tensor counts as the vector of the entries in it, and the dense form is then the known form: values
only. Numbers are little-endian, as in safetensors.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.records import Params
from fedsim.wire.bits import Reader, pack
from fedsim.wire.quantised import EXACT, Coding
from fedsim.wire.support import FORMS, Vector, placed, raw, read


def encode(
    tensors: Params,
    *,
    known: Mapping[str, Tensor] | None = None,
    forms: Sequence[str] = FORMS,
    coding: Coding = EXACT,
    key: int | None = None,
) -> bytes:
    """Tensors as bytes, each in the shortest of ``forms``.

    With a coding that does not keep zeros, a tensor with zeros is dense only if no other form is allowed; the zeros are
    then lost.

    Args:
        tensors: of any dtypes, also none.
        known: bool tensors by name: entries that the other end knows to be the only ones that are not zero.
        forms: some of :data:`FORMS`.
        coding: of floating-point values, from :data:`fedsim.wire.quantised.CODINGS`.
        key: for a stochastic coding; each tensor draws from ``fold(key, name)``.

    Raises:
        ValueError: a tensor is not zero outside its known mask; a mask without a tensor, or of another shape or dtype;
            a form that there is not, or none; a stochastic coding without a key.
    """
    if coding.stochastic and key is None:
        raise ValueError(f"the coding {coding.name} is stochastic and needs a key")
    vectors = _vectors(tensors, known or {}, coding)
    keys = {name: None if key is None else rng.fold(key, name) for name in tensors}
    written = [vector.write(vector.shortest(forms), keys[name]) for name, vector in vectors.items()]
    return b"".join([_fingerprint(tensors, known or {}, coding.name), *written])


def length(
    tensors: Params,
    *,
    known: Mapping[str, Tensor] | None = None,
    forms: Sequence[str] = FORMS,
    coding: Coding = EXACT,
) -> int:
    """Length of :func:`encode` with the same arguments, without encoding."""
    vectors = _vectors(tensors, known or {}, coding).values()
    return 8 + sum(1 + vector.sizes[vector.shortest(forms)] for vector in vectors)


def sizes(tensor: Tensor, *, coding: Coding = EXACT) -> dict[str, int]:
    """Bytes of one tensor in each of :data:`FORMS` (integers: only dense), without a message's 8 and the form's 1."""
    return dict(Vector(_flat(tensor), coding).sizes)


def decode(data: bytes, like: Params, *, known: Mapping[str, Tensor] | None = None, coding: Coding = EXACT) -> Params:
    """The inverse of :func:`encode`, on the CPU.

    Args:
        data: from anyone. No array has more than some bytes for each entry of ``like``.
        like: names, shapes and dtypes, in order.
        known, coding: as given to :func:`encode`.

    Raises:
        ValueError: not such a message; names the tensor. A known mask that :func:`encode` would refuse.
    """
    masks, reader, where = _checked(known or {}, like), Reader(data), "start"
    tensors = {}
    try:
        if reader.take(8) != _fingerprint(like, known or {}, coding.name):
            raise ValueError("written for other names, shapes, dtypes, known masks or another coding")
        for where, tensor in like.items():
            mask = masks.get(where)
            n = tensor.numel() if mask is None else int(mask.sum())
            vector = read(reader, n, tensor.dtype, coding)
            whole = vector if mask is None else placed(vector, mask.numpy(), tensor.numel())
            tensors[where] = whole.reshape(tensor.shape)
        where = "end"
        reader.end()
    except ValueError as error:
        raise ValueError(f"not a fedsim message (sparse, {where}): {error}") from error
    return tensors


def _vectors(tensors: Params, known: Mapping[str, Tensor], coding: Coding) -> dict[str, Vector]:
    """What is written of each tensor."""
    masks = _checked(known, tensors)
    vectors = {name: Vector(_flat(tensor), coding) for name, tensor in tensors.items()}
    for name, mask in masks.items():
        inside = Vector(vectors[name].values[mask], coding)
        outside = len(vectors[name].at) - len(inside.at)
        if outside:
            raise ValueError(f"{name}: {outside} entries outside the known mask are not zero")
        vectors[name] = inside
    return vectors


def _checked(known: Mapping[str, Tensor], tensors: Params) -> Params:
    """The masks, flat."""
    for name, mask in known.items():
        if name not in tensors:
            raise ValueError(f"known mask of {name}, which is no tensor of the message")
        if mask.dtype != torch.bool or mask.shape != tensors[name].shape:
            wanted, got = tuple(tensors[name].shape), tuple(mask.shape)
            raise ValueError(f"{name}: a known mask must be bool of shape {wanted}, got {mask.dtype} of shape {got}")
    return {name: _flat(mask) for name, mask in known.items()}


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1)


def _fingerprint(tensors: Params, known: Mapping[str, Tensor], coding: str) -> bytes:
    structure = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    digest = hashlib.blake2b(repr((structure, sorted(known), coding)).encode(), digest_size=8)
    for name in sorted(known):
        digest.update(pack(raw(_flat(known[name])).view(np.uint8), 1))
    return digest.digest()
