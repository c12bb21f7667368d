"""Links: what moves whole frames from one party to the other. In one process, over a socket, encrypted over either."""

import contextlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsim.errors import TransferError
from fedsim.transfer import frames

TIMEOUT_S = 600.0
_PIECE = 2**18  # bytes that a socket is asked for, or given, at once
GONE = "the peer is gone"


class Link(Protocol):
    """One end of a connection. Every method may raise TransferError; after that, nothing more can be sent or taken."""

    def put(self, frame: bytes) -> None:
        """Send a frame."""

    def take(self, timeout_s: float) -> bytes:
        """The next frame, waiting for its last byte at most so many seconds."""

    def close(self) -> None:
        """End the connection. May be called twice, and by another thread: who waits in ``take`` then hears of it."""


# ---------------------------------------------------------------- in one process


class _QueueLink:
    """One of two ends in a process. closed: whether either has been closed."""

    def __init__(
        self,
        inbox: "queue.SimpleQueue[bytes | None]",
        outbox: "queue.SimpleQueue[bytes | None]",
        closed: threading.Event,
    ) -> None:
        self._inbox, self._outbox, self._closed = inbox, outbox, closed

    def put(self, frame: bytes) -> None:
        if self._closed.is_set():
            raise TransferError(GONE)
        self._outbox.put(frame)

    def take(self, timeout_s: float) -> bytes:
        try:
            found = self._inbox.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TransferError(f"no message within {timeout_s:g} s") from error
        if found is None:
            self._inbox.put(None)  # for the next one who asks
            raise TransferError(GONE)
        return found

    def close(self) -> None:
        self._closed.set()
        self._inbox.put(None)
        self._outbox.put(None)  # after what was sent: that still arrives


def pair() -> tuple[Link, Link]:
    """Two ends in this process, for two threads."""
    one, two = queue.SimpleQueue[bytes | None](), queue.SimpleQueue[bytes | None]()
    closed = threading.Event()
    return _QueueLink(one, two, closed), _QueueLink(two, one, closed)


# ---------------------------------------------------------------- over a socket


class SocketLink:
    """Over a connected stream socket, with TLS or without. One thread at a time may use it; any may close it.

    A frame must arrive within one deadline, however slowly its bytes drip; the same for sending. What a header says is
    checked before any of its payload is read, and memory is taken only for bytes that have arrived.
    """

    def __init__(self, connection: socket.socket, *, timeout_s: float = TIMEOUT_S) -> None:
        self._socket, self._timeout_s = connection, timeout_s
        self._broken: str | None = None  # in the middle of a frame: another one would not be understood

    def put(self, frame: bytes) -> None:
        """Send a frame, within the timeout of this link."""
        self._enter()
        deadline, rest = time.monotonic() + self._timeout_s, memoryview(frame)
        with _told(self._timeout_s, "the peer did not take a message"):
            while rest:
                self._socket.settimeout(_left(deadline))
                rest = rest[self._socket.send(rest[:_PIECE]) :]
        self._broken = None

    def take(self, timeout_s: float) -> bytes:
        """The next frame. Raises TransferError if it ends early, is too long, or is none."""
        self._enter()
        found, deadline = bytearray(), time.monotonic() + timeout_s
        with _told(timeout_s, "no message"):
            self._fill(found, frames.HEADER_BYTES, deadline)
            length = frames.parse_header(bytes(found)).length
            self._fill(found, frames.HEADER_BYTES + length, deadline)
        self._broken = None
        return bytes(found)

    def close(self) -> None:
        """End the connection."""
        self._broken = self._broken or GONE
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits
        with contextlib.suppress(OSError):
            self._socket.close()

    def _enter(self) -> None:
        if self._broken:
            raise TransferError(self._broken)
        self._broken = "an earlier message broke off"

    def _fill(self, found: bytearray, size: int, deadline: float) -> None:
        while len(found) < size:
            self._socket.settimeout(_left(deadline))
            piece = self._socket.recv(min(size - len(found), _PIECE))
            if not piece:
                raise TransferError("the connection ended in the middle of a message" if found else GONE)
            found += piece


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@contextlib.contextmanager
def _told(timeout_s: float, what: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise TransferError(f"{what} within {timeout_s:g} s") from error
    except OSError as error:  # ssl.SSLError is among them
        reason = f": {error.reason}" if isinstance(error, ssl.SSLError) and error.reason else ""
        raise TransferError(GONE + reason) from error


# ---------------------------------------------------------------- encrypted, over any link


class SealedLink:
    """Over another link, so that whoever carries its frames cannot read them: a relay.

    Keys of one connection: X25519, HKDF-SHA256, then ChaCha20-Poly1305 with one key a direction and the number of the
    frame as nonce. Frames that were changed, repeated, left out or put in another order are refused. Keys are not
    authenticated: a relay that gives each side a key of its own reads everything, and only one that passes on what it
    gets (semi-honest) is kept out. How long frames are, and when they come, it sees in any case.
    """

    def __init__(self, link: Link, initiator: bool, *, timeout_s: float = TIMEOUT_S) -> None:
        """Send this end's public key; the other's is read when it is first needed.

        Args:
            link: what carries the frames.
            initiator: True at one end, False at the other.
            timeout_s: for the other end's key.
        """
        self._link, self._initiator, self._timeout_s = link, initiator, timeout_s
        self._private = X25519PrivateKey.generate()
        self._public = self._private.public_key().public_bytes_raw()
        self._ciphers: tuple[ChaCha20Poly1305, ChaCha20Poly1305] | None = None
        self._sent = self._taken = 0
        link.put(frames.frame("exchange", 0, self._public))

    def put(self, frame: bytes) -> None:
        """Send a frame, encrypted."""
        sending, _ = self._agreed(self._timeout_s)
        header = frames.header("sealed", self._sent, len(frame) + frames.SEALING_BYTES)
        self._link.put(header + sending.encrypt(_nonce(self._sent), frame, header))
        self._sent += 1

    def take(self, timeout_s: float) -> bytes:
        """The next frame, decrypted. Raises TransferError also if it is not the one that was sent."""
        _, taking = self._agreed(timeout_s)
        data = self._link.take(timeout_s)
        header, payload = frames.parse(data)
        if (header.kind, header.sequence) != ("sealed", self._taken):
            rule = f"encrypted message {self._taken} was expected"
            raise TransferError(f"{rule}, not a message {header.kind!r} with number {header.sequence}")
        try:
            found = taking.decrypt(_nonce(self._taken), payload, data[: frames.HEADER_BYTES])
        except InvalidTag as error:
            raise TransferError(
                f"encrypted message {self._taken} was changed on its way, or is of another key"
            ) from error
        self._taken += 1
        return found

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    def _agreed(self, timeout_s: float) -> tuple[ChaCha20Poly1305, ChaCha20Poly1305]:
        """Ciphers of what is sent and what is taken."""
        if self._ciphers is None:
            header, theirs = frames.parse(self._link.take(timeout_s))
            if header.kind != "exchange" or len(theirs) != len(self._public):
                raise TransferError(f"a public key was expected, not a message {header.kind!r} of {len(theirs)} bytes")
            keys = _keys(self._private, self._public, theirs, self._initiator)
            self._ciphers = keys if self._initiator else keys[::-1]
        return self._ciphers


def _keys(
    private: X25519PrivateKey, public: bytes, theirs: bytes, initiator: bool
) -> tuple[ChaCha20Poly1305, ChaCha20Poly1305]:
    """The initiator's cipher and the other's."""
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise TransferError("the peer's public key is of low order") from error
    both = public + theirs if initiator else theirs + public
    made = HKDF(hashes.SHA256(), 64, salt=None, info=b"fedsim sealed link 1" + both).derive(shared)
    return ChaCha20Poly1305(made[:32]), ChaCha20Poly1305(made[32:])


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
