"""One vector with many zeros as bytes: which entries are not zero, in four forms.

For n entries of which k are not zero, and V(k) bytes for k values:

    dense     V(n)                                     all values
    bitmask   ceil(n / 8) + V(k)                       one bit for each entry
    gaps      count + (Rice codes of gaps) + V(k)      positions of what is rarer, zeros or others (``bits.gaps_of``)
    coo       count + 4 k + V(k)                       positions as uint32 (uint64 beyond 2^32 entries)

*Zero* means that all bits are zero: +0.0. So -0.0 is a value like any other and, like NaNs with what they carry,
survives bit for bit under the exact coding. Integers and bools are always dense and exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.wire.bits import Gaps, Positions, Reader, count, gaps_of, pack, packed_size, read_gaps
from fedsim.wire.quantised import EXACT, Coding

FORMS = ("dense", "bitmask", "gaps", "coo")  # the byte of a form is its place here
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Vector:
    """What is to be written.

    values: (n,), contiguous and on the CPU.
    coding: of floating-point values.
    """

    values: Tensor
    coding: Coding

    @cached_property
    def at(self) -> Positions:
        """Positions of the k entries that are not zero."""
        return np.flatnonzero(raw(self.values) != 0)

    @cached_property
    def gaps(self) -> Gaps:
        """Between positions of what is rarer."""
        n = len(self.values)
        return gaps_of(self.at if 2 * len(self.at) <= n else _others(self.at, n))

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes in each form: :meth:`write` without the form's byte."""
        n, k, dtype = len(self.values), len(self.at), self.values.dtype
        if not dtype.is_floating_point:
            return {"dense": EXACT.size(n, dtype)}
        return {
            "dense": self.coding.size(n, dtype),
            "bitmask": packed_size(n, 1) + self.coding.size(k, dtype),
            "gaps": len(count(k)) + self.gaps.size + self.coding.size(k, dtype),
            "coo": len(count(k)) + k * _index(n).itemsize + self.coding.size(k, dtype),
        }

    def shortest(self, forms: Sequence[str]) -> str:
        """Of these forms, the first on equal terms.

        Dense is out for a coding that keeps no zeros if there are any, unless it is the only form.

        Raises:
            ValueError: no form, or one that there is not.
        """
        if not forms or not set(forms) <= set(FORMS):
            raise ValueError(f"forms must be some of {', '.join(FORMS)}, got {list(forms)}")
        if not self.values.is_floating_point():
            return "dense"
        lossy = len(self.at) < len(self.values) and not self.coding.keeps_zero and len(forms) > 1
        return min((form for form in forms if not (lossy and form == "dense")), key=self.sizes.__getitem__)

    def write(self, form: str, key: int | None) -> bytes:
        """The form's byte, the support and the values. ``key``: for a stochastic coding."""
        n, k = len(self.values), len(self.at)
        start = bytes([FORMS.index(form)])
        if not self.values.is_floating_point():
            return start + EXACT.encode(self.values, None)
        if form == "dense":
            return start + self.coding.encode(self.values, key)
        if form == "bitmask":
            start += pack((raw(self.values) != 0).view(np.uint8), 1)
        else:
            start += count(k) + (self.gaps.encode() if form == "gaps" else self.at.astype(_index(n)).tobytes())
        return start + self.coding.encode(self.values[torch.from_numpy(self.at)], key)


def read(reader: Reader, n: int, dtype: torch.dtype, coding: Coding) -> Tensor:
    """The inverse of :meth:`Vector.write`: (n,) of ``dtype``.

    Raises:
        ValueError: not such a vector. No array has more than some bytes for each of n entries.
    """
    coding = coding if dtype.is_floating_point else EXACT
    at = _read_support(reader, n, dtype.is_floating_point)
    k = n if at is None else len(at)
    values = coding.decode(reader.take(coding.size(k, dtype)), k, dtype)
    if dtype == torch.bool and k and int(raw(values).max()) > 1:
        raise ValueError("a bool must be 0 or 1")
    return values if at is None else placed(values, at, n)


def raw(vector: Tensor) -> npt.NDArray[np.integer]:
    """The bits as integers (shared memory): numpy knows no bfloat16, and integers compare and copy bit for bit.

    Raises:
        ValueError: entries of another size than 1, 2, 4 or 8 bytes.
    """
    if vector.dtype.itemsize not in _INTEGERS:
        raise ValueError(f"entries of {vector.dtype} cannot be sent")
    integers: npt.NDArray[np.integer] = vector.view(_INTEGERS[vector.dtype.itemsize]).numpy()
    return integers


def placed(values: Tensor, at: npt.NDArray[np.integer] | npt.NDArray[np.bool_], n: int) -> Tensor:
    """A vector (n,) with these values at these positions, and else zeros."""
    whole = torch.zeros(n, dtype=values.dtype)
    raw(whole)[at] = raw(values)
    return whole


def _read_support(reader: Reader, n: int, floating: bool) -> Positions | None:
    """Positions of the values that follow; None: of all."""
    form = reader.take(1)[0]
    if form >= (len(FORMS) if floating else 1):
        raise ValueError(f"no form has the number {form}")
    if FORMS[form] == "dense":
        return None
    if FORMS[form] == "bitmask":
        return np.flatnonzero(reader.bits(n))
    k = reader.count(n)
    if FORMS[form] == "gaps":
        rarer = read_gaps(reader, min(k, n - k), n)
        return rarer if 2 * k <= n else _others(rarer, n)
    at = np.frombuffer(reader.take(k * _index(n).itemsize), _index(n))
    if k and (int(at[-1]) >= n or bool((at[1:] <= at[:-1]).any())):
        raise ValueError(f"positions must ascend and be below {n}")
    return at.astype(np.int64)


def _index(n: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u4" if n <= 1 << 32 else "<u8")


def _others(at: Positions, n: int) -> Positions:
    """All positions below n but these."""
    left = np.ones(n, np.bool_)
    left[at] = False
    return np.flatnonzero(left)
