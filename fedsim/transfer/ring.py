"""Exact arithmetic in Z_2^64, the ring of secret-shared numbers, on numpy's uint64 arrays.

Nothing is ever truncated: secrets and coefficients are encoded such that every sum of products is at most 2^62 in
magnitude (``fixed.py``), so it is the same number in the ring as among the integers, and no product is multiplied
again. Protocols that go on calculating with products must shift fractional bits away, and then err in the last place,
and with some probability by far more. Here the only error is that of the two roundings in ``fixed.py``.

All randomness is the operating system's, or is drawn from 32 bytes of it by AES; it hides values from the other party,
and ``fedsim.rng`` must not be used for that. Bytes are little-endian on every machine.
"""

import hmac
import math
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedsim.transfer.fixed import Integers

Ring = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

SEED_BYTES = 32
LIMB_BITS = 22
LIMBS = 3  # 3 * 22 >= 64
BLOCK = 512  # terms: 512 * (2^22)^2 = 2^53, and every integer up to that is a float64
_LITTLE = np.dtype("<u8")


def signed(values: Ring) -> Integers:
    """Representatives in [-2^63, 2^63), of the same memory."""
    return values.view(np.int64)


def unsigned(values: Integers) -> Ring:
    """``values mod 2^64``, of the same memory.

    Raises:
        ValueError: the array is not of int64.

    >>> unsigned(np.array([-1])).tolist() == [2**64 - 1]
    True
    """
    if values.dtype != np.int64:
        raise ValueError(f"values must be int64, got {values.dtype}")
    return values.view(np.uint64)


def to_bytes(values: Ring) -> bytes:
    """Eight bytes each, in C order."""
    return values.astype(_LITTLE).tobytes()


def from_bytes(data: bytes, shape: tuple[int, ...]) -> Ring:
    """What :func:`to_bytes` was given.

    Raises:
        ValueError: not eight bytes for every element of the shape.
    """
    if len(data) != 8 * math.prod(shape):
        raise ValueError(f"ring elements of shape {shape} must have {8 * math.prod(shape)} bytes, got {len(data)}")
    return np.frombuffer(data, _LITTLE).astype(np.uint64).reshape(shape)


# ---------------------------------------------------------------- random elements


def random(shape: tuple[int, ...]) -> Ring:
    """Uniform elements, from the operating system."""
    return from_bytes(os.urandom(8 * math.prod(shape)), shape)


def random_seed() -> bytes:
    """What :func:`expand` draws from; as secret as everything that is drawn from it."""
    return os.urandom(SEED_BYTES)


def expand(seed: bytes, label: str, shape: tuple[int, ...]) -> Ring:
    """Pseudo-random elements: a stream of AES-256 in counter mode, with ``HMAC-SHA256(seed, label)`` as its key.

    One stream of n elements differs from a uniform one by at most about ``n^2 / 2^131`` in any test, since counter mode
    repeats no block (for a billion elements, 2^-71), as long as AES and HMAC are what they are believed to be.

    Args:
        seed: 32 uniform bytes, of which nobody else knows.
        label: of the stream; streams of other labels are independent.
        shape: any; a longer array begins with a shorter one's elements.

    Raises:
        ValueError: the seed has another length.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed must have {SEED_BYTES} bytes, got {len(seed)}")
    key = hmac.digest(seed, label.encode(), "sha256")
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return from_bytes(stream.update(bytes(8 * math.prod(shape))), shape)


# ---------------------------------------------------------------- products


def matmul(x: Ring, y: Ring) -> Ring:
    """``x @ y mod 2^64``.

    Large products go by limbs through the floating-point BLAS. Where elements are used fewer than 64 times, taking them
    apart costs about as much as numpy's own loop over integers; and below 2^24 multiplications the threads of the BLAS
    may cost far more than they save, when several parties share the cores.

    Args:
        x: (..., r, c). y: (..., c, s), with the same leading axes.

    Returns:
        (..., r, s).

    Raises:
        ValueError: shapes do not fit, or an array is not of uint64.
    """
    if x.dtype != np.uint64 or y.dtype != np.uint64:
        raise ValueError(f"factors must be uint64, got {x.dtype} and {y.dtype}")
    if x.ndim < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-2]:
        raise ValueError(f"shapes must be (..., r, c) and (..., c, s), got {x.shape} and {y.shape}")
    rows, terms, columns = *x.shape[-2:], y.shape[-1]
    if min(rows, columns) < 64 or rows * terms * columns < 2**24:
        return x @ y
    return by_limbs(x, y)


def by_limbs(x: Ring, y: Ring) -> Ring:
    """:func:`matmul` by ``sum_ij 2^(22 (i + j)) x_i @ y_j`` over i + j < 3; the other products vanish mod 2^64.

    Limbs are at most 2^22 in magnitude, so a sum of 512 products is at most 2^53 and exact in float64, in whatever
    order it is added up; more terms are done block by block.
    """
    total = np.zeros((*x.shape[:-1], y.shape[-1]), np.uint64)
    for start in range(0, x.shape[-1], BLOCK):
        right = _limbs(y[..., start : start + BLOCK, :])
        for i, a in enumerate(_limbs(x[..., start : start + BLOCK])):
            for j, b in enumerate(right[: LIMBS - i]):
                total += (a @ b).astype(np.int64).view(np.uint64) << np.uint64(LIMB_BITS * (i + j))
    return total


def _limbs(values: Ring) -> list[Floats]:
    """``values = sum_i 2^(22 i) limb_i`` mod 2^64: one to three limbs, as many as the largest magnitude needs.

    All but the last are in [0, 2^22); the last has the sign, and is in [-2^22, 2^22).
    """
    rest = signed(values)
    low, high = int(rest.min(initial=0)), int(rest.max(initial=0))
    found: list[Floats] = []
    while len(found) < LIMBS - 1 and max(-1 - low, high) >= 2 ** (LIMB_BITS * (len(found) + 1)):
        found.append((rest & (2**LIMB_BITS - 1)).astype(np.float64))
        rest = rest >> LIMB_BITS
    return [*found, rest.astype(np.float64)]
