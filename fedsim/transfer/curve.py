"""Points of Curve25519 as 32 bytes: hashing to the curve, and multiplying by a secret number, in several processes.

A point is its u-coordinate, little-endian, as RFC 7748 writes it. About half of all u belong to points of the curve,
the others to its twist, and multiplying changes neither; so that no bit of a hash can be told from a multiple of it,
hashes are tried until one belongs to the curve. The secret numbers of X25519 are multiples of 8, the cofactor: what
comes out lies in the subgroup of prime order, whatever went in, or is 0, which is refused.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from fedsim.errors import TransferError

PRIME = 2**255 - 19
POINT_BYTES = 32
_A = 486662  # of the curve v^2 = u^3 + A u^2 + u
_LOW = "a point of low order"
_PIECE = 8192  # points, from which on another process is worth its start
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fedsim.transfer.curve import main; main()"
_REFUSED = 3  # exit code of a process that was given a point of low order


def hashed(seed: bytes) -> bytes:
    """The point of the curve that a seed stands for: the first SHA-256 of it and a counter that is one.

    ``u = SHA-256(seed | counter) mod 2^255``, the first u < p for which ``u^3 + A u^2 + u`` is a square mod p, not 0.

    Args:
        seed: any bytes.

    Returns:
        u, 32 bytes.

    Source: try-and-increment, Boneh, Lynn and Shacham 2001, section 3.3.
    """
    is_square = _is_square()
    for counter in itertools.count():
        digest = hashlib.sha256(seed + counter.to_bytes(4, "little")).digest()
        u = int.from_bytes(digest, "little") & (2**255 - 1)
        if u < PRIME and is_square(u * (u * (u + _A) + 1) % PRIME):
            return u.to_bytes(POINT_BYTES, "little")
    raise AssertionError("unreachable")


def _is_square() -> Callable[[int], bool]:
    """Whether a number is a square mod p, and not 0."""
    try:
        from gmpy2 import legendre  # noqa: PLC0415
    except ImportError:
        return lambda value: pow(value, (PRIME - 1) // 2, PRIME) == 1
    return lambda value: legendre(value, PRIME) == 1


def new_key() -> bytes:
    """A secret number, 32 bytes, from the operating system."""
    return X25519PrivateKey.generate().private_bytes_raw()


def multiplied(key: bytes, points: bytes) -> bytes:
    """Every point times the secret number.

    Args:
        key: from :func:`new_key`.
        points: 32 bytes each.

    Returns:
        as many points, in the same order.

    Raises:
        TransferError: one is of low order.
    """
    private = X25519PrivateKey.from_private_bytes(key)
    try:
        return b"".join(private.exchange(X25519PublicKey.from_public_bytes(point)) for point in each(points))
    except ValueError as error:
        raise TransferError(_LOW) from error


def masked(key: bytes, seeds: bytes) -> bytes:
    """:func:`multiplied` of the points that seeds of 32 bytes stand for."""
    return multiplied(key, b"".join(map(hashed, each(seeds))))


def each(points: bytes) -> Iterable[bytes]:
    """Points one by one."""
    return (points[at : at + POINT_BYTES] for at in range(0, len(points), POINT_BYTES))


def check(points: bytes) -> None:
    """Raises TransferError if a point is not written as it must be: below p, without a bit beyond."""
    rows = np.frombuffer(points, np.uint8).reshape(-1, POINT_BYTES)
    high = (rows[:, 31] == 0x7F) & (rows[:, 1:31] == 0xFF).all(axis=1) & (rows[:, 0] >= 0xED)
    if bool((high | (rows[:, 31] > 0x7F)).any()):
        raise TransferError("a point that is not below 2^255 - 19")


# ---------------------------------------------------------------- in several processes


def spread(work: Callable[[bytes, bytes], bytes], key: bytes, items: bytes, workers: int) -> bytes:
    """``work(key, items)``, shared out over processes.

    Args:
        work: :func:`multiplied` or :func:`masked`.
        key: its first argument.
        items: its second, of 32 bytes each.
        workers: at most so many processes; they are fresh interpreters, so no script is imported again.

    Raises:
        TransferError: as for ``work``; or a process failed.
    """
    workers = min(workers, len(items) // POINT_BYTES // _PIECE)
    if workers <= 1:
        return work(key, items)
    share = -(-len(items) // POINT_BYTES // workers) * POINT_BYTES
    parts = [items[at : at + share] for at in range(0, len(items), share)]
    with ThreadPoolExecutor(len(parts)) as threads:
        return b"".join(threads.map(lambda part: _elsewhere(work.__name__, key + part), parts))


def _elsewhere(name: str, given: bytes) -> bytes:
    command = [sys.executable, "-c", _START, json.dumps(sys.path), name]
    ended = subprocess.run(command, input=given, capture_output=True, check=False)
    if ended.returncode == _REFUSED:
        raise TransferError(_LOW)
    if ended.returncode:
        told = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TransferError(f"a process that masks ids failed: {''.join(told) or ended.returncode}")
    return ended.stdout


def main() -> None:
    """What such a process does: key and items come on its standard input."""
    work = {"multiplied": multiplied, "masked": masked}[sys.argv[2]]
    given = sys.stdin.buffer.read()
    try:
        found = work(given[:POINT_BYTES], given[POINT_BYTES:])
    except TransferError:
        sys.exit(_REFUSED)
    sys.stdout.buffer.write(found)
