"""Finding the people both parties know: by ids in the clear, or by private set intersection.

Private set intersection by Diffie-Hellman on an elliptic curve. Each party hashes its ids to points of Curve25519 and
multiplies them by a secret number of its own, a or b; the other multiplies what it gets by its own. Masking commutes,
a(bP) = b(aP), so common ids, and only they, give equal points. Neither learns more of the other's remaining ids than
how many there are, as long as both do what they should (semi-honest parties) and the Diffie-Hellman problem is hard on
the curve. A party that lies about its own ids can find out whether the other has them.

Secret numbers and the order in which points are sent come from the operating system, never from ``fedsim.rng``. Ids are
compared as they are written, code point by code point: no case or Unicode form is made equal.

Source: Meadows 1986, "A more efficient cryptographic matchmaking protocol"; Huberman, Franklin and Hogg 1999,
"Enhancing privacy and trust in electronic communities". *Differs*: on an elliptic curve, with X25519 of RFC 7748.
"""

import hashlib
import secrets
from collections.abc import Callable, Sequence

import numpy as np

from fedsim.errors import DataError, TransferError
from fedsim.transfer import curve
from fedsim.transfer.channel import Channel, array, facts, of_array, of_facts

MOST_IDS = 2**27
_CHUNK = 2**16 * curve.POINT_BYTES  # bytes of points in a message
_TO_CURVE, _TO_ORDER = b"fedsim ids, to the curve\0", b"fedsim ids, their order\0"


def intersect(channel: Channel, ids: Sequence[str], *, first: bool, workers: int = 1) -> list[int]:
    """Rows of common ids. What either party learns is which of its own ids are common, and how many the other has.

    Args:
        channel: to the other party, which calls this at the same time.
        ids: of this party's rows, one each.
        first: True at one party, False at the other: who sends first.
        workers: processes that may calculate.

    Returns:
        indices of rows, in the order of a hash of their ids, which both parties share.

    Raises:
        DataError: no id, the same one twice, or one that is no Unicode text.
        TransferError: the other party is gone, sends something else, or found other common ids.
    """
    ordered = _ordered(ids)
    theirs_count = _count(channel, len(ids), first)
    key, sent_order = curve.new_key(), list(range(len(ids)))
    secrets.SystemRandom().shuffle(sent_order)
    seeds = b"".join(_hash(_TO_CURVE, ids[row]) for row in sent_order)
    own = curve.spread(curve.masked, key, seeds, workers)
    theirs = _swapped(channel, own, theirs_count, first)
    theirs_twice = curve.spread(curve.multiplied, key, theirs, workers)
    own_twice = _swapped(channel, theirs_twice, len(ids), first)
    point_of = dict(zip(sent_order, curve.each(own_twice), strict=True))
    known = set(curve.each(theirs_twice))
    common = [row for row in ordered if point_of[row] in known]
    _check_same(channel, b"".join(point_of[row] for row in common), len(common), first)
    return common


def disclosed(channel: Channel, ids: Sequence[str], *, first: bool) -> list[int]:
    """:func:`intersect` with all ids in the clear: the same rows, and the other party knows every id."""
    ordered = _ordered(ids)
    texts = [one.encode() for one in ids]
    theirs_count = _count(channel, len(ids), first)
    lengths = of_array(np.array([len(text) for text in texts], np.uint32))
    their_lengths = array(_swap(channel, lengths, first), np.uint32, (theirs_count,)).astype(np.int64)
    body = _swap(channel, b"".join(texts), first)
    ends = np.cumsum(their_lengths)
    if int(ends[-1]) != len(body):
        raise TransferError(f"{channel.peer} sent ids of {len(body)} bytes where {ends[-1]} were expected")
    known = {body[end - length : end] for end, length in zip(ends.tolist(), their_lengths.tolist(), strict=True)}
    common = [row for row in ordered if texts[row] in known]
    _check_same(channel, b"".join(_hash(_TO_ORDER, ids[row]) for row in common), len(common), first)
    return common


def _ordered(ids: Sequence[str]) -> list[int]:
    """Rows in the order of a hash of their ids, so that the order says nothing of rows and depends on no secret."""
    if not ids:
        raise DataError("ids: at least one is needed, got none")
    if len(ids) > MOST_IDS:
        raise DataError(f"ids: at most {MOST_IDS} can be compared, got {len(ids)}")
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise DataError(f"ids: must be there once each, got {one!r} twice")
        seen.add(one)
    try:
        hashes = [_hash(_TO_ORDER, one) for one in ids]
    except UnicodeEncodeError as error:
        raise DataError(f"ids: must be Unicode text, got {error.object!r}") from error
    return sorted(range(len(ids)), key=hashes.__getitem__)


def _hash(label: bytes, one: str) -> bytes:
    return hashlib.sha256(label + one.encode()).digest()


def _swap(channel: Channel, payload: bytes, first: bool, kind: str = "ids") -> bytes:
    if first:
        channel.send(kind, payload)
        return channel.receive(kind)
    received = channel.receive(kind)
    channel.send(kind, payload)
    return received


def _count(channel: Channel, own: int, first: bool) -> int:
    """How many ids the other party has."""
    found = facts(_swap(channel, of_facts({"ids": own}), first)).get("ids")
    if type(found) is not int or not 1 <= found <= MOST_IDS:
        raise TransferError(f"{channel.peer} did not say how many ids it has")
    return found


def _swapped(channel: Channel, points: bytes, count: int, first: bool) -> bytes:
    """Send points, in messages of bounded size, and receive ``count`` others, checked."""
    steps: list[Callable[[], bytes]] = [lambda: _send(channel, points), lambda: _receive(channel, count)]
    found = b"".join([step() for step in (steps if first else steps[::-1])])
    if len(set(curve.each(found))) < count:
        raise TransferError(f"{channel.peer} sent the same point twice")
    return found


def _send(channel: Channel, points: bytes) -> bytes:
    for at in range(0, len(points), _CHUNK):
        channel.send("ids", points[at : at + _CHUNK])
    return b""


def _receive(channel: Channel, count: int) -> bytes:
    left, found = count * curve.POINT_BYTES, []
    while left:
        piece, size = channel.receive("ids"), min(left, _CHUNK)
        if len(piece) != size:
            raise TransferError(f"{channel.peer} sent points of {len(piece)} bytes where {size} were expected")
        curve.check(piece)
        found.append(piece)
        left -= size
    return b"".join(found)


def _check_same(channel: Channel, common: bytes, count: int, first: bool) -> None:
    """Both parties must have found the same, in the same order."""
    digest = hashlib.sha256(common).digest()
    if _swap(channel, digest, first, "aligned") != digest:
        raise TransferError(f"id order mismatch: {channel.peer} found other common ids than the {count} found here")
