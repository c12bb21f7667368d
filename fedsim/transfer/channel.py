"""A channel: messages of agreed kinds, in order, between two parties; and how their payloads are read and written."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np

from fedsim.errors import TransferError
from fedsim.transfer import frames
from fedsim.transfer.links import TIMEOUT_S, Link

MOST_TEXT = 500  # characters of the reason with which a party stops
MOST_FACTS = 2**20  # bytes of JSON
Record = Callable[[str, str, bytes], None]  # "sent" or "received", kind, payload
_Number = TypeVar("_Number", bound=np.number[Any])


class Channel:
    """One party's end of a conversation. Both sides know what kind of message comes next; any other ends it.

    sent, received: bytes of whole frames by kind, so far. messages_sent, messages_received: how many.
    """

    def __init__(self, link: Link, peer: str, *, timeout_s: float = TIMEOUT_S, record: Record | None = None) -> None:
        """A conversation over a link.

        Args:
            link: what moves the frames.
            peer: who is at the other end, for messages: ``party b``.
            timeout_s: how long to wait for a message.
            record: sees every message, for transcripts.
        """
        self.peer = peer
        self.sent: dict[str, int] = {}
        self.received: dict[str, int] = {}
        self.messages_sent: dict[str, int] = {}
        self.messages_received: dict[str, int] = {}
        self._link, self._timeout_s, self._record = link, timeout_s, record

    def send(self, kind: str, payload: bytes) -> None:
        """Send a message.

        Args:
            kind: one of ``frames.KINDS``.
            payload: at most 1 GiB.

        Raises:
            TransferError: the other party is gone, or does not take it in time; or it is too long.
        """
        with self._named():
            self._link.put(frames.frame(kind, sum(self.messages_sent.values()), payload))
        _count(self.sent, self.messages_sent, kind, payload)
        if self._record is not None:
            self._record("sent", kind, payload)

    def receive(self, kind: str) -> bytes:
        """The payload of the next message, which must be of this kind.

        Raises:
            TransferError: the other party is gone, has stopped, or sends another message.
        """
        with self._named():
            header, payload = frames.parse(self._link.take(self._timeout_s))
        number = sum(self.messages_received.values())
        if header.sequence != number:
            raise TransferError(f"{self.peer} sent message {header.sequence} where message {number} was expected")
        _count(self.received, self.messages_received, header.kind, payload)
        if self._record is not None:
            self._record("received", header.kind, payload)
        if header.kind == "abort":
            raise TransferError(f"{self.peer} stopped: {printable(payload)}")
        if header.kind != kind:
            raise TransferError(f"{self.peer} sent {header.kind!r} where {kind!r} was expected")
        return payload

    def abort(self, text: str) -> None:
        """Tell the other party that this one stops, and why, if that is still possible."""
        with contextlib.suppress(TransferError):
            self.send("abort", text[:MOST_TEXT].encode(errors="replace"))

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except TransferError as error:
            raise TransferError(f"{self.peer}: {error}") from error


def _count(sizes: dict[str, int], messages: dict[str, int], kind: str, payload: bytes) -> None:
    sizes[kind] = sizes.get(kind, 0) + frames.HEADER_BYTES + len(payload)
    messages[kind] = messages.get(kind, 0) + 1


def printable(payload: bytes) -> str:
    """Text of a stranger, such that it can do nothing to a terminal or a log."""
    text = payload[: 4 * MOST_TEXT].decode(errors="replace")[:MOST_TEXT]
    return "".join(one if one.isprintable() else "?" for one in text)


# ---------------------------------------------------------------- payloads


def of_array(values: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    """An array of numbers as bytes: its entries, little-endian, in C order. Its shape and type are not among them.

    >>> of_array(np.array([1, -2], dtype=np.int16)).hex()
    '0100feff'
    """
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def array(
    payload: bytes, dtype: type[_Number], shape: tuple[int, ...]
) -> np.ndarray[tuple[int, ...], np.dtype[_Number]]:
    """The inverse of :func:`of_array`; a new array that may be written to.

    Args:
        payload: what was received.
        dtype: of integers or floating-point numbers.
        shape: that it must have.

    Raises:
        TransferError: it has another size, or an entry that is not finite.
    """
    wanted = np.dtype(dtype)
    size = wanted.itemsize * math.prod(shape)
    if len(payload) != size:
        raise TransferError(f"an array of {len(payload)} bytes where {size} were expected, of shape {shape}")
    found = np.frombuffer(payload, wanted.newbyteorder("<")).astype(wanted, copy=True).reshape(shape)
    if wanted.kind not in "iu" and not np.isfinite(found).all():
        raise TransferError(f"an array of shape {shape} with an entry that is not finite")
    return found


def of_facts(facts: Mapping[str, object]) -> bytes:
    """A few named values as bytes: JSON.

    Raises:
        TransferError: more than 1 MiB.
    """
    payload = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    _check_facts(payload)
    return payload


def facts(payload: bytes) -> dict[str, Any]:
    """The inverse of :func:`of_facts`.

    Raises:
        TransferError: it is not a JSON object, or more than 1 MiB.
    """
    _check_facts(payload)
    try:
        found = json.loads(payload, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise TransferError("facts that are not JSON") from error
    if not isinstance(found, dict):
        raise TransferError("facts that are not a JSON object")
    return found


def _check_facts(payload: bytes) -> None:
    if len(payload) > MOST_FACTS:
        raise TransferError(f"facts of {len(payload)} bytes, at most {MOST_FACTS}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
