"""Matrix products on ciphertexts: what one party has in the clear times what the other has encrypted.

An entry of the product is ``prod_k C_k^(x_k)``, powers with exponents of up to 62 bits and a sign. There are two ways
to have the powers of a row share their work. With t terms of b bits on average and B at most, r rows, and digits of w
bits, p = (B + 1) / w of them, rounded up, the highest one of v bits, they take so many multiplications mod n^2:

    tables    2^(w-2) t + r (t (b / (w + 1) + 1/2) + 2 B)            odd powers of each C_k, for all rows (Straus)
    buckets   r (t min(b / w + 1/2, p) + 2^w (p - 1) + 2^v + 2 B)    C_k with equal digits joined first (Pippenger)

The way and the width with the lowest count are taken: tables where terms are few and rows are many. Positive and
negative digits are kept apart, and one inversion of a row joins them. How long all this takes depends on the scalars.

Source: Straus 1964, "Addition chains of vectors"; Pippenger 1976, "On the evaluation of powers and related problems".
*Differs*: tables with the signed digits of Solinas 2000, "Efficient arithmetic on Koblitz curves" (width-w NAF).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from gmpy2 import invert, mpz, powmod

from fedsim.transfer.ciphertexts import SLOT_BITS, Encrypted, Layout, most_slots
from fedsim.transfer.fixed import Integers
from fedsim.transfer.paillier import PublicKey
from fedsim.transfer.pool import Pool

_WIDTHS = range(2, 14)
_MOST_ENTRIES = 2**16  # of tables: 36 MB under 2048 bits
_HERE = Pool(1)
_Digits = npt.NDArray[np.int16]
_Multiply = Callable[[mpz, Sequence[int], Sequence[int]], mpz]  # a number, terms, their digits at a place


class _Task(NamedTuple):
    """Scalars (rows, terms) and as many ciphertexts as terms."""

    scalars: Integers
    ciphertexts: Sequence[mpz]


def matmul(x: Integers, y: Encrypted, *, fraction: int = 0, pool: Pool = _HERE) -> Encrypted:
    """``x @ y``, all slots of a ciphertext at once.

    Args:
        x: int64 (b, r, c), below 2^62 in magnitude.
        y: (b, c, s).
        fraction: bits behind the point of x; they are added to those of y.

    Returns:
        (b, r, s) in as many slots as y; to be made random again before anybody sees it.

    Raises:
        ValueError: shapes do not fit.
        TransferError: a result could pass 2^62.
    """
    if x.dtype != np.int64 or x.ndim != 3 or len(y.layout.shape) != 3:
        raise ValueError(f"factors must be int64 and of three axes, got {x.dtype} of {x.shape} and {y.layout.shape}")
    batches, rows, terms = x.shape
    if y.layout.shape[:2] != (batches, terms):
        raise ValueError(f"shapes {x.shape} and {y.layout.shape} cannot be multiplied")
    layout = replace(
        y.layout,
        shape=(batches, rows, y.layout.shape[2]),
        fraction=y.layout.fraction + fraction,
        bound=_longest(x) * max(y.layout.bound, 1),
    )
    groups, square = layout.groups, y.key.square
    pieces = _pieces(rows, batches * groups, pool.workers)
    tasks = [
        _Task(part, y.values[batch * terms * groups + group : (batch + 1) * terms * groups : groups])
        for batch in range(batches)
        for group in range(groups)
        for part in np.array_split(x[batch], pieces)
    ]
    products = [one for part in pool.map(_products, tasks, square) for one in part]
    order = np.arange(len(products)).reshape(batches, groups, rows).swapaxes(1, 2).ravel().tolist()
    return Encrypted(y.key, layout, tuple(products[at] for at in order))


def packed(array: Encrypted, *, pool: Pool = _HERE) -> Encrypted:
    """The same values, flat, in as few ciphertexts as hold them: ``C_0 C_1^(2^64) C_2^(2^128) ...``, by Horner's rule.

    Args:
        array: of which each row of the last axis, s values, has one ciphertext.

    Returns:
        shape (size of the array,), of slots that are a multiple of s.

    Raises:
        ValueError: the last axis has several ciphertexts, or is empty.
    """
    layout, key = array.layout, array.key
    if layout.groups != 1:
        raise ValueError(f"an array whose rows have {layout.groups} ciphertexts cannot be packed")
    width = layout.shape[-1]
    several = most_slots(key.bits) // width
    slots = width * several
    items = [array.values[at : at + several] for at in range(0, len(array.values), several)]
    flat = Layout((width * len(array.values),), slots, layout.fraction, layout.bound)
    return Encrypted(key, flat, tuple(pool.map(_shifted, items, key, width)))


def _shifted(items: Sequence[Sequence[mpz]], key: PublicKey, width: int) -> list[mpz]:
    shift, found = mpz(1) << width * SLOT_BITS, []
    for ciphertexts in items:
        total = ciphertexts[-1]
        for ciphertext in ciphertexts[-2::-1]:
            total = powmod(total, shift, key.square) * ciphertext % key.square
        found.append(total)
    return found


# ---------------------------------------------------------------- how work is cut


def _longest(x: Integers) -> int:
    """The largest sum of magnitudes of a row, exactly: in two halves, as the sum may have more than 64 bits."""
    magnitudes = np.abs(x).view(np.uint64)
    low = (magnitudes & np.uint64(2**32 - 1)).sum(axis=-1)
    high = (magnitudes >> np.uint64(32)).sum(axis=-1)
    halves = zip(high.ravel().tolist(), low.ravel().tolist(), strict=True)
    return max(((above << 32) + below for above, below in halves), default=0)


def _pieces(rows: int, products: int, workers: int) -> int:
    """Into how many tasks the rows of each product are cut, so that there is work for all."""
    return 1 if workers == 1 else max(min(rows, -(-2 * workers // max(products, 1))), 1)


class _Way(NamedTuple):
    """One of the two ways, and what it is thought to cost."""

    cost: float
    width: int
    tables: bool


def _way(x: Integers) -> _Way:
    """The cheapest for scalars (rows, terms), by the counts above."""
    rows, terms = x.shape
    bits = np.frexp(x.astype(np.float64))[1]
    mean, most = (float(bits.mean()), int(bits.max())) if x.size else (0.0, 0)
    ways = []
    for width in _WIDTHS:
        if terms << width - 2 <= _MOST_ENTRIES:
            cost = 2 ** (width - 2) * terms + rows * (terms * (mean / (width + 1) + 0.5) + 2 * most)
            ways.append(_Way(cost, width, True))
        places = -(-(most + 1) // width)
        buckets = 2**width * (places - 1) + 2 ** (most + 1 - width * (places - 1))
        cost = rows * (terms * min(mean / width + 0.5, places) + buckets + 2 * most)
        ways.append(_Way(cost, width, False))
    return min(ways)


# ---------------------------------------------------------------- one product


def _products(tasks: Sequence[_Task], square: mpz) -> list[list[mpz]]:
    """For each task, ``prod_k C_k^(x_k) mod n^2`` of every row."""
    found = []
    for scalars, ciphertexts in tasks:
        _, width, tables = _way(scalars)
        step = 1 if tables else width
        multiply = (_by_tables if tables else _by_buckets)(ciphertexts, width, square)
        digits = _digits(scalars, width, step)
        found.append([_row(digits[:, row], step, multiply, square) for row in range(len(scalars))])
    return found


def _digits(scalars: Integers, width: int, step: int) -> _Digits:
    """``scalars = sum_i digits_i 2^(step i)``, at most 2^(w-1) in magnitude; (places, *shape).

    step: the width; or 1, then a digit is 0 or odd, and of w that follow each other at most one is not 0.
    """
    half, left, places = 1 << width - 1, scalars, []
    while left.any():
        digit = ((left + half) & (2 * half - 1)) - half
        if step == 1:
            digit = np.where(left & 1, digit, 0)
        places.append(digit.astype(np.int16))
        left = (left - digit) >> step
    return np.stack(places) if places else np.zeros((0, *scalars.shape), np.int16)


def _row(digits: _Digits, step: int, multiply: _Multiply, square: mpz) -> mpz:
    """``prod_k C_k^(x_k)`` from the digits of its scalars, (places, terms)."""
    positive, negative = (_powers(digits * np.int16(sign), step, multiply, square) for sign in (1, -1))
    return positive if negative == 1 else positive * invert(negative, square) % square


def _powers(digits: _Digits, step: int, multiply: _Multiply, square: mpz) -> mpz:
    """Of the positive digits alone."""
    found = mpz(1)
    for terms, values in _places(digits):
        for _ in range(step if found != 1 else 0):
            found = found * found % square
        if terms:
            found = multiply(found, terms, values)
    return found


def _places(digits: _Digits) -> Iterator[tuple[list[int], list[int]]]:
    """From the highest place down, the terms with positive digits there, and these."""
    places, terms = np.nonzero(digits > 0)
    ends = np.searchsorted(places, np.arange(len(digits) + 1)).tolist()
    all_terms, values = terms.tolist(), digits[places, terms].tolist()
    for place in range(len(digits) - 1, -1, -1):
        here = slice(ends[place], ends[place + 1])
        yield all_terms[here], values[here]


def _by_tables(ciphertexts: Sequence[mpz], width: int, square: mpz) -> _Multiply:
    """Multiplying by ``prod_k C_k^(d_k)`` with odd digits below 2^(w-1): each power is in a table."""
    tables = []
    for ciphertext in ciphertexts:
        powers, twice = [ciphertext], ciphertext * ciphertext % square
        for _ in range((1 << width - 2) - 1):
            powers.append(powers[-1] * twice % square)
        tables.append(powers)

    def multiply(found: mpz, terms: Sequence[int], values: Sequence[int]) -> mpz:
        for term, value in zip(terms, values, strict=True):
            found = found * tables[term][value >> 1] % square
        return found

    return multiply


def _by_buckets(ciphertexts: Sequence[mpz], width: int, square: mpz) -> _Multiply:
    """Multiplying by ``prod_k C_k^(d_k)`` with digits of up to 2^(w-1).

    A bucket holds the product of all C_k with the same digit d. ``prod_d bucket_d^d`` is the product, over all d, of
    the running product of the buckets from the top down to d.
    """

    def multiply(found: mpz, terms: Sequence[int], values: Sequence[int]) -> mpz:
        buckets: dict[int, mpz] = {}
        for term, value in zip(terms, values, strict=True):
            held = buckets.get(value)
            buckets[value] = ciphertexts[term] if held is None else held * ciphertexts[term] % square
        running = mpz(1)
        for digit in range(max(buckets), 0, -1):
            if digit in buckets:
                running = running * buckets[digit] % square
            found = found * running % square
        return found

    return multiply
