"""Arrays of encrypted int64: several values in a ciphertext, sums and multiples, masks, and what is sent of them.

A plaintext is ``sum_s v_s 2^(64 s) mod n`` with signed values v_s of 64 bits, the *slots*; 31 of them fit under 2048
bits. Adding ciphertexts adds all slots, and a power multiplies all by the same number. A slot that left 64 bits would
damage its neighbour, so every array knows the largest magnitude that its values can have, and what could pass 2^62 is
refused before it is calculated.

Nothing leaves as it was calculated: :func:`to_bytes` and :func:`masked` make everything random again that has not
just been encrypted, since a power of a ciphertext tells its exponent to whoever knows the ciphertext.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from gmpy2 import gcd, mpz, powmod

from fedsim.errors import TransferError
from fedsim.transfer.fixed import PRODUCT_BITS, Integers
from fedsim.transfer.paillier import PrivateKey, PublicKey
from fedsim.transfer.pool import Pool

SLOT_BITS = 64
LARGEST = 2**PRODUCT_BITS  # magnitude of a value
_HALF = np.uint64(2**63)  # added to a value it makes it a digit in [0, 2^64)
_HERE = Pool(1)


@dataclass(frozen=True)
class Layout:
    """How an array lies in ciphertexts.

    shape: of the array. slots: values of its last axis that share a ciphertext; what is left over has its own.
    fraction: bits behind the point. bound: the largest magnitude a value can have.

    Raises:
        ValueError: the shape has no axis, or there is no slot.
        TransferError: the bound is over 2^62.
    """

    shape: tuple[int, ...]
    slots: int = 1
    fraction: int = 0
    bound: int = LARGEST

    def __post_init__(self) -> None:
        if not self.shape or self.slots < 1:
            raise ValueError(f"a layout needs an axis and a slot, got shape {self.shape} and {self.slots} slots")
        if not 0 <= self.bound <= LARGEST:
            raise TransferError(f"overflow: encrypted values could reach {self.bound}, over 2^{PRODUCT_BITS}")

    @property
    def groups(self) -> int:
        """Ciphertexts of one row of the last axis."""
        return -(-self.shape[-1] // self.slots)

    @property
    def count(self) -> int:
        """Ciphertexts."""
        return math.prod(self.shape[:-1]) * self.groups


@dataclass(frozen=True)
class Encrypted:
    """An encrypted array.

    values: the ciphertexts, in C order. fresh: whether they have random factors that nothing else has.
    """

    key: PublicKey
    layout: Layout
    values: tuple[mpz, ...] = field(repr=False)
    fresh: bool = False

    def __post_init__(self) -> None:
        if len(self.values) != self.layout.count or self.layout.slots > most_slots(self.key.bits):
            raise ValueError(f"{len(self.values)} ciphertexts of {self.key.bits} bits cannot hold {self.layout}")


@dataclass(frozen=True)
class Masks:
    """What :func:`masked` added, and what lies below it."""

    key: PublicKey
    layout: Layout
    values: tuple[mpz, ...] = field(repr=False)


def most_slots(bits: int) -> int:
    """Slots of a plaintext: their sum must stay within n / 2 on either side.

    >>> most_slots(2048), most_slots(3072)
    (31, 47)
    """
    return (bits - 2) // SLOT_BITS


# ---------------------------------------------------------------- encrypting and decrypting


def encrypt(
    key: PublicKey | PrivateKey,
    values: Integers,
    *,
    slots: int | None = None,
    fraction: int = 0,
    bound: int = LARGEST,
    pool: Pool = _HERE,
) -> Encrypted:
    """Encrypt an array.

    Args:
        key: whose owner can decrypt it; a private key encrypts faster.
        values: int64, any shape with an axis.
        slots: values of the last axis that share a ciphertext; None: as many as fit.
        fraction: bits behind the point, to be remembered.
        bound: the largest magnitude.

    Raises:
        ValueError: more slots than fit.
        TransferError: a value is over the bound.
    """
    public = key.public if isinstance(key, PrivateKey) else key
    if slots is None:
        slots = min(most_slots(public.bits), max(values.shape[-1], 1))
    layout = Layout(values.shape, slots, fraction, bound)
    if (found := _largest(values)) > bound:
        raise TransferError(f"overflow: a value of {found} where at most {bound} was agreed")
    return Encrypted(public, layout, tuple(pool.map(_encrypted, _packed(values, slots), key)), fresh=True)


def _encrypted(messages: Sequence[mpz], key: PublicKey | PrivateKey) -> list[mpz]:
    return [key.encrypt(message) for message in messages]


def decrypt(key: PrivateKey, array: Encrypted, *, pool: Pool = _HERE) -> Integers:
    """The array, int64.

    Raises:
        ValueError: it was encrypted under another key.
        TransferError: a ciphertext does not hold slots within the bound.
    """
    if array.key != key.public:
        raise ValueError("the array was encrypted under another key")
    return _unpacked(pool.map(_decrypted, array.values, key), array.layout, array.key)


def _decrypted(ciphertexts: Sequence[mpz], key: PrivateKey) -> list[mpz]:
    return [key.decrypt(ciphertext) for ciphertext in ciphertexts]


def _largest(values: Integers) -> int:
    """The largest magnitude, exactly."""
    if values.dtype != np.int64:
        raise ValueError(f"values must be int64, got {values.dtype}")
    return max(int(values.max(initial=0)), -int(values.min(initial=0)))


def _offset(slots: int) -> mpz:
    return mpz.from_bytes(np.full(slots, _HALF, "<u8").tobytes(), "little")


def _packed(values: Integers, slots: int) -> list[mpz]:
    """Plaintexts, in C order; slots that are left over hold 0."""
    layout = Layout(values.shape, slots)
    padded = np.zeros((*values.shape[:-1], layout.groups * slots), np.int64)
    padded[..., : values.shape[-1]] = values
    digits = (padded.view(np.uint64) + _HALF).astype("<u8").reshape(layout.count, slots)
    offset = _offset(slots)
    return [mpz.from_bytes(row.tobytes(), "little") - offset for row in digits]


def _unpacked(plaintexts: Sequence[mpz], layout: Layout, key: PublicKey) -> Integers:
    """The inverse of :func:`_packed`, of numbers in [0, n)."""
    size, offset, half = layout.slots * SLOT_BITS // 8, _offset(layout.slots), key.n // 2
    rows = []
    for plaintext in plaintexts:
        digits = (plaintext - key.n if plaintext > half else plaintext) + offset
        if digits < 0 or digits.bit_length() > 8 * size:
            raise TransferError(f"a plaintext that is not {layout.slots} slots of {SLOT_BITS} bits")
        rows.append(digits.to_bytes(size, "little"))
    flat = (np.frombuffer(b"".join(rows), "<u8").astype(np.uint64) + _HALF).view(np.int64)
    values = flat.reshape(*layout.shape[:-1], layout.groups * layout.slots)[..., : layout.shape[-1]].copy()
    if (found := _largest(values)) > layout.bound:
        raise TransferError(f"a decrypted value of {found} where at most {layout.bound} is possible")
    return values


# ---------------------------------------------------------------- arithmetic


def add(left: Encrypted, right: Encrypted) -> Encrypted:
    """The sum of two arrays: the product of their ciphertexts.

    Raises:
        ValueError: they have other keys, shapes, slots or fractions.
        TransferError: a sum could pass 2^62.
    """
    _check_alike(left, right.layout)
    if left.key != right.key:
        raise ValueError("arrays to be added must be encrypted under the same key")
    layout = replace(left.layout, bound=left.layout.bound + right.layout.bound)
    square = left.key.square
    return Encrypted(left.key, layout, tuple(a * b % square for a, b in zip(left.values, right.values, strict=True)))


def add_plain(array: Encrypted, values: Integers, *, fraction: int = 0) -> Encrypted:
    """The sum with an array in the clear, int64 of the same shape; errors as :func:`add`."""
    _check_alike(array, replace(array.layout, shape=values.shape, fraction=fraction))
    layout = replace(array.layout, bound=array.layout.bound + _largest(values))
    bare = map(array.key.bare, _packed(values, array.layout.slots))
    square = array.key.square
    return Encrypted(array.key, layout, tuple(a * b % square for a, b in zip(array.values, bare, strict=True)))


def _check_alike(array: Encrypted, other: Layout) -> None:
    for name in ("shape", "slots", "fraction"):
        mine, its = getattr(array.layout, name), getattr(other, name)
        if mine != its:
            raise ValueError(f"arrays to be added must have the same {name}, got {mine} and {its}")


def scaled(array: Encrypted, scalars: Integers, *, fraction: int = 0, pool: Pool = _HERE) -> Encrypted:
    """Every ciphertext times a number of its own, that is all slots of it: a power.

    Args:
        array: what is multiplied.
        scalars: int64, as many as ciphertexts, in their order.
        fraction: bits behind their point; they are added to the array's.

    Raises:
        ValueError: another number of scalars.
        TransferError: a product could pass 2^62.
    """
    layout = replace(
        array.layout, fraction=array.layout.fraction + fraction, bound=array.layout.bound * _largest(scalars)
    )
    items = list(zip(array.values, scalars.ravel().tolist(), strict=True))
    return Encrypted(array.key, layout, tuple(pool.map(_scaled, items, array.key)))


def _scaled(items: Sequence[tuple[mpz, int]], key: PublicKey) -> list[mpz]:
    return [powmod(ciphertext, scalar, key.square) for ciphertext, scalar in items]


# ---------------------------------------------------------------- leaving


def rerandomised(array: Encrypted, *, pool: Pool = _HERE) -> Encrypted:
    """The same array in ciphertexts that nobody can connect with those it was calculated from."""
    values = tuple(pool.map(_rerandomised, array.values, array.key))
    return Encrypted(array.key, array.layout, values, fresh=True)


def _rerandomised(ciphertexts: Sequence[mpz], key: PublicKey) -> list[mpz]:
    return [ciphertext * key.noise() % key.square for ciphertext in ciphertexts]


def to_bytes(array: Encrypted, *, pool: Pool = _HERE) -> bytes:
    """Ciphertexts as they are sent, made random again unless they are fresh: big-endian, twice the bytes of n each."""
    array = array if array.fresh else rerandomised(array, pool=pool)
    return _wide(array.values, array.key.bits // 4)


def from_bytes(payload: bytes, key: PublicKey, layout: Layout) -> Encrypted:
    """The array that somebody sent, in the layout that was agreed; see :func:`to_bytes`.

    Raises:
        TransferError: another number of bytes, or a number that is no ciphertext.
    """
    return Encrypted(key, layout, _ciphertexts(payload, key, layout.count))


def masked(array: Encrypted, *, pool: Pool = _HERE) -> tuple[bytes, Masks]:
    """The array with a uniform number mod n added to every plaintext, as it is sent, and those numbers.

    Whoever decrypts it learns nothing, as every plaintext is uniform, and the ciphertexts are new ones.
    """
    masks = tuple(mpz(secrets.randbelow(int(array.key.n))) for _ in array.values)
    items = list(zip(array.values, masks, strict=True))
    sent = _wide(pool.map(_masked, items, array.key), array.key.bits // 4)
    return sent, Masks(array.key, array.layout, masks)


def _masked(items: Sequence[tuple[mpz, mpz]], key: PublicKey) -> list[mpz]:
    return [ciphertext * key.encrypt(mask) % key.square for ciphertext, mask in items]


def opened(key: PrivateKey, payload: bytes, count: int, *, pool: Pool = _HERE) -> bytes:
    """The numbers in [0, n) that masked ciphertexts hold, as they are sent back: big-endian, the bytes of n each.

    Raises:
        TransferError: another number of bytes, or a number that is no ciphertext.
    """
    ciphertexts = _ciphertexts(payload, key.public, count)
    return _wide(pool.map(_decrypted, ciphertexts, key), key.public.bits // 8)


def unmasked(payload: bytes, masks: Masks) -> Integers:
    """The array, int64, below the masks.

    Args:
        payload: from :func:`opened`.
        masks: that were added.

    Raises:
        TransferError: another number of bytes, or numbers that hold no such array.
    """
    n = masks.key.n
    plaintexts = _numbers(payload, masks.key.bits // 8, len(masks.values))
    if any(plaintext >= n for plaintext in plaintexts):
        raise TransferError("a plaintext that is not below n")
    return _unpacked([(a - b) % n for a, b in zip(plaintexts, masks.values, strict=True)], masks.layout, masks.key)


def _ciphertexts(payload: bytes, key: PublicKey, count: int) -> tuple[mpz, ...]:
    """Numbers in (0, n^2) without a factor of n: those that have an inverse, tested all at once."""
    values = _numbers(payload, key.bits // 4, count)
    product = mpz(1)
    for value in values:
        if not 0 < value < key.square:
            raise TransferError("a ciphertext that is not between 0 and n^2")
        product = product * value % key.n
    if gcd(product, key.n) != 1:
        raise TransferError("a ciphertext that has a factor in common with n")
    return values


def _wide(values: Sequence[mpz], size: int) -> bytes:
    return b"".join(value.to_bytes(size, "big") for value in values)


def _numbers(payload: bytes, size: int, count: int) -> tuple[mpz, ...]:
    if len(payload) != size * count:
        raise TransferError(f"{len(payload)} bytes where {count} numbers of {size} bytes were expected")
    return tuple(mpz.from_bytes(payload[at : at + size], "big") for at in range(0, len(payload), size))
