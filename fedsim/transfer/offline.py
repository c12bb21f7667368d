"""Triples without a dealer: the two parties make them beforehand, under the Paillier key of the owner of E.

Right sends E encrypted; left raises to D, adds a mask R and sends that back; right decrypts ``D @ E + R``, the integer.
``F_right`` is that mod 2^64, and ``F_left = -R`` mod 2^64 comes from left's seed like D. R is uniform below 2^128 times
what a sum of products can be, so what right decrypts is within 2^-128 of telling nothing about D (for each number that
it decrypts). Left sees ciphertexts only. Both must follow the protocol.

Plaintexts have slots, so wide that no masked sum leaves its own: ``257 + ceil(log2 terms)`` bits, 7 of them under 2048
bits. Elements of E that no product separates, the columns, share a ciphertext, a *cell*; results that are left over
share one before they are masked. The randomness is that of ``secrets`` and ``paillier``, never of ``fedsim.rng``.

Source: Demmler, Schneider and Zohner 2015, "ABY", its triples by homomorphic encryption, where several are packed in a
plaintext. *Differs*: matrices, each whole at one party, so there is one cross term and not two.
"""

import math
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gmpy2 import mpz, powmod

from fedsim.errors import TransferError
from fedsim.transfer import ciphertexts, products, ring
from fedsim.transfer.ciphertexts import Encrypted, Layout
from fedsim.transfer.paillier import PrivateKey, PublicKey
from fedsim.transfer.pool import Pool
from fedsim.transfer.ring import Ring
from fedsim.transfer.triples import Batch, Left, Right, result_shape

HIDING_BITS = 128
_ELEMENT_BITS = 64
_HERE = Pool(1)
_LOW = np.uint64(2**32 - 1)


class Cells(NamedTuple):
    """How the elements of a batch lie in ciphertexts.

    width: consecutive elements that every product has in one row. run: cells for them. size: slots of a cell, of which
    some of a run's last are empty. mask_bits: of R; a slot has one more.
    """

    width: int
    run: int
    size: int
    mask_bits: int

    @property
    def slot(self) -> int:
        """Bits."""
        return self.mask_bits + 1

    def several(self, bits: int) -> int:
        """Cells that a plaintext under a key of so many bits holds."""
        return (bits - 1) // (self.slot * self.size)

    def count(self, elements: int) -> int:
        """Cells for so many elements."""
        return elements // self.width * self.run


def cells_of(batch: Batch, bits: int) -> Cells:
    """The cells under a key of so many bits: runs are cut as evenly as possible.

    >>> from fedsim.transfer.terms import Shape
    >>> cells_of(Batch((Shape(1, 30, 200, 16),)), 2048)
    Cells(width=16, run=3, size=6, mask_bits=264)
    """
    terms = max(shape.terms for shape in batch.shapes)
    mask_bits = 2 * _ELEMENT_BITS + (terms - 1).bit_length() + HIDING_BITS
    width = math.gcd(*(shape.columns for shape in batch.shapes))
    run = math.ceil(width / ((bits - 1) // (mask_bits + 1)))
    return Cells(width, run, math.ceil(width / run), mask_bits)


def encrypted_factor(key: PrivateKey, right: Right, *, pool: Pool = _HERE) -> bytes:
    """What right sends first: its E, encrypted.

    Args:
        key: its own.
        right: a new half, without products yet.
        pool: of processes.
    """
    cells = cells_of(right.batch, key.public.bits)
    padding = np.zeros((right.batch.size // cells.width, cells.run * cells.size), np.uint64)
    plaintexts = [_joined(row, cells.slot) for row in _rows(right.factor(), padding, cells).tolist()]
    values = tuple(pool.map(_encrypted, plaintexts, key))
    return ciphertexts.to_bytes(Encrypted(key.public, Layout((len(values),)), values, fresh=True))


def multiplied(public: PublicKey, left: Left, request: bytes, *, pool: Pool = _HERE) -> bytes:
    """What left answers: ``D @ E + R`` of all products, in ciphertexts that nobody can connect with the request's.

    Args:
        public: right's key.
        left: a new half.
        request: from :func:`encrypted_factor`.
        pool: of processes.

    Raises:
        TransferError: the request is of another size, or holds something else than ciphertexts.
    """
    batch, cells = left.batch, cells_of(left.batch, public.bits)
    e = ciphertexts.from_bytes(request, public, Layout((cells.count(batch.size),), bound=1))
    shifted = ciphertexts.scaled(e, np.full(len(e.values), 2**32), pool=pool)
    found: list[mpz] = []
    masks: list[mpz] = []
    for index in range(len(batch.shapes)):
        columns = cells.count(batch.shapes[index].columns)
        found += _powers(left.factor(index), columns, e, shifted, pool)
        f_left = left.product(index)
        padding = ring.random((f_left.size // cells.width, cells.run * cells.size))  # empty slots hide as well
        masks += [_mask(row, cells) for row in _rows(f_left.ravel(), padding, cells).tolist()]
    several = cells.several(public.bits)
    items = [(found[at : at + several], masks[at : at + several]) for at in range(0, len(found), several)]
    values = tuple(pool.map(_packed, items, public, cells.slot * cells.size))
    return ciphertexts.to_bytes(Encrypted(public, Layout((len(values),)), values, fresh=True))


def opened(key: PrivateKey, right: Right, answer: bytes, *, pool: Pool = _HERE) -> Right:
    """Right's half, with its products.

    Args:
        key: its own.
        right: of which E was sent.
        answer: from :func:`multiplied`.
        pool: of processes.

    Raises:
        TransferError: the answer is of another size, or holds something else than masked products.
    """
    batch, cells = right.batch, cells_of(right.batch, key.public.bits)
    sizes = [math.prod(result_shape(shape)) for shape in batch.shapes]
    several, total = cells.several(key.public.bits), cells.count(sum(sizes))
    plain, wide = ciphertexts.opened(key, answer, math.ceil(total / several), pool=pool), key.public.bits // 8
    found: list[int] = []
    for number in range(math.ceil(total / several)):
        held = min(several, total - number * several)
        value = mpz.from_bytes(plain[number * wide : (number + 1) * wide], "big")
        found += _split(value, cells.slot, held * cells.size)
    elements = np.array(found, np.uint64).reshape(-1, cells.run * cells.size)[:, : cells.width].ravel()
    parts = np.split(elements, np.cumsum(sizes)[:-1])
    shaped = (part.reshape(result_shape(shape)) for part, shape in zip(parts, batch.shapes, strict=True))
    return Right(batch, right.seed, tuple(shaped))


# ---------------------------------------------------------------- cells


def _rows(flat: Ring, padding: Ring, cells: Cells) -> Ring:
    """Elements by cells, (cells, size), with the padding's elements in the slots that are left over."""
    padding[:, : cells.width] = flat.reshape(-1, cells.width)
    return padding.reshape(-1, cells.size)


def _joined(values: Sequence[int], slot: int) -> mpz:
    return sum((mpz(value) << slot * place for place, value in enumerate(values)), mpz(0))


def _split(value: mpz, slot: int, count: int) -> list[int]:
    """What the slots hold, mod 2^64."""
    if value.bit_length() > slot * count:
        raise TransferError(f"a masked product of {value.bit_length()} bits, at most {slot * count}")
    return [int((value >> slot * place) & (2**_ELEMENT_BITS - 1)) for place in range(count)]


def _mask(f_left: Sequence[int], cells: Cells) -> mpz:
    """A uniform R for each slot of a cell, with ``-R = F_left`` mod 2^64."""
    high = (secrets.randbits(cells.mask_bits - _ELEMENT_BITS) << _ELEMENT_BITS for _ in f_left)
    return _joined([above + -value % 2**_ELEMENT_BITS for above, value in zip(high, f_left, strict=True)], cells.slot)


# ---------------------------------------------------------------- ciphertexts


def _powers(d: Ring, columns: int, e: Encrypted, shifted: Encrypted, pool: Pool) -> tuple[mpz, ...]:
    """``D @ E`` of one product, with E read as (batches, terms, columns) of cells; in C order.

    Exponents are taken in halves of 32 bits, ``D @ E = D_low @ E + D_high @ (2^32 E)``, since 64 bits are too many for
    ``products``. A cell is one slot there, so its bound is on the sum of exponents, far below 2^62.
    """
    batches, _, terms = d.shape
    halves = np.concatenate([d & _LOW, d >> np.uint64(32)], axis=2).view(np.int64)
    each = terms * columns
    values: list[mpz] = []
    for at in range(0, len(e.values), each):
        values += e.values[at : at + each] + shifted.values[at : at + each]
    layout = Layout((batches, 2 * terms, columns), bound=1)
    return products.matmul(halves, Encrypted(e.key, layout, tuple(values)), pool=pool).values


def _encrypted(messages: Sequence[mpz], key: PrivateKey) -> list[mpz]:
    return [key.encrypt(message) for message in messages]


def _packed(items: Sequence[tuple[Sequence[mpz], Sequence[mpz]]], key: PublicKey, bits: int) -> list[mpz]:
    """Cells side by side in one ciphertext, by Horner's rule, and their masks added in a new one."""
    found, shift = [], mpz(1) << bits
    for cells, masks in items:
        total = cells[-1]
        for cell in cells[-2::-1]:
            total = powmod(total, shift, key.square) * cell % key.square
        found.append(total * key.encrypt(_joined([int(mask) for mask in masks], bits)) % key.square)
    return found
