"""Fixed-point numbers: what both encrypted protocols calculate with, so that their results are equal bit for bit.

A party's secrets have a fixed number of fractional bits. The coefficients that the other party multiplies them by get
as many as fit: no sum of products can leave 64 bits, whatever the secrets are. Nothing is cut off between the two
encodings and the decoded result, so the only error is that of rounding twice.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.errors import TransferError

Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SECRET_FRACTION = 26  # bits behind the point
SECRET_BITS = 32  # an encoded secret is below 2^32 in magnitude, so a secret below 64
PRODUCT_BITS = 62  # a sum of products is at most 2^62 in magnitude: it has a place in Z_2^64, and in a slot of 64 bits
_COEFFICIENT_BITS = PRODUCT_BITS - SECRET_BITS


class Coefficients(NamedTuple):
    """Encoded coefficients, and how many fractional bits they have."""

    values: Integers
    fraction: int


def encode_secrets(values: Reals, what: str = "a hidden value") -> Integers:
    """``round(values * 2^26)``.

    Args:
        values: any shape, below 64 in magnitude.
        what: they are, for the message.

    Raises:
        TransferError: one is not finite, or too large for its place.

    >>> encode_secrets(np.array([0.5, -1.0])).tolist()
    [33554432, -67108864]
    """
    largest = float(np.abs(values).max(initial=0.0))
    limit = 2.0 ** (SECRET_BITS - SECRET_FRACTION)
    if not largest < limit - 1:
        rule = f"must be below {limit - 1:g} in magnitude, the range of the fixed point, got {largest:g}"
        raise TransferError(f"overflow: {what} {rule}; a smaller train.optimizer.lr or a larger transfer.l2 helps")
    return np.rint(np.ldexp(values, SECRET_FRACTION)).astype(np.int64)


def encode_coefficients(values: Reals) -> Coefficients:
    """``round(values * 2^f)`` with the largest f for which no row's sum of products with secrets can pass 2^62.

    Args:
        values: (..., rows, terms); each row is multiplied by secrets and summed over its terms.

    Raises:
        TransferError: one is not finite, or a row sums to 2^30 or more.
    """
    longest = float(np.abs(values).sum(axis=-1).max(initial=0.0))
    if not longest < 2.0**_COEFFICIENT_BITS:
        rule = f"must sum to less than 2^{_COEFFICIENT_BITS} in a row, got {longest:g}"
        raise TransferError(f"overflow: coefficients of a gradient {rule}; a smaller train.optimizer.lr helps")
    slack = values.shape[-1] / 2  # what rounding may add to a row
    room = 2.0**_COEFFICIENT_BITS - slack
    fraction = min(math.floor(math.log2(room / max(longest, 2.0**-_COEFFICIENT_BITS))), 52)
    return Coefficients(np.rint(np.ldexp(values, fraction)).astype(np.int64), fraction)


def decode(products: Integers, fraction: int) -> Reals:
    """Real values of sums of products of coefficients with ``fraction`` fractional bits and secrets."""
    return np.ldexp(products.astype(np.float64), -(fraction + SECRET_FRACTION))
