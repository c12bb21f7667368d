"""Frames: how a message between two parties is laid out. Nothing here sends anything.

A frame is a header of 24 bytes and a payload. The header, big-endian: magic (4 bytes), protocol version (u16), kind
(u16), sequence number (u64), length of the payload (u64).
"""

import struct
from typing import NamedTuple

from fedsim.errors import TransferError

MAGIC = b"fsft"
VERSION = 1
MOST_BYTES = 2**30  # of a payload
SEALING_BYTES = 16  # that encryption adds, the tag
KINDS = {
    "abort": 0,
    "hello": 1,
    "ids": 2,
    "aligned": 3,
    "key": 4,
    "secrets": 5,
    "masked": 6,
    "opened": 7,
    "factor": 8,
    "answer": 9,
    "loss": 10,
    "predict": 11,
    "scores": 12,
    "labels": 13,
    "stop": 14,
    "welcome": 100,  # who connects, and who is connected to
    "exchange": 101,  # a public key of a sealed link
    "sealed": 102,  # an encrypted frame
}
_NAMES = {number: name for name, number in KINDS.items()}
_LAYOUT = struct.Struct(">4sHHQQ")
HEADER_BYTES = _LAYOUT.size


class Header(NamedTuple):
    """What a frame says of itself. length: of its payload, in bytes."""

    kind: str
    sequence: int
    length: int


def frame(kind: str, sequence: int, payload: bytes) -> bytes:
    """A message as bytes.

    Args:
        kind: one of ``KINDS``.
        sequence: number of the message, from 0.
        payload: at most 1 GiB.

    Raises:
        TransferError: the payload is too long.

    >>> parse_header(frame("loss", 3, b"12345678"))
    Header(kind='loss', sequence=3, length=8)
    """
    return header(kind, sequence, len(payload)) + payload


def header(kind: str, sequence: int, length: int) -> bytes:
    """The header of a frame whose payload has ``length`` bytes. Raises TransferError if that is too long."""
    _check_length(kind, length)
    return _LAYOUT.pack(MAGIC, VERSION, KINDS[kind], sequence, length)


def parse_header(data: bytes) -> Header:
    """The header that data begins with.

    Raises:
        TransferError: it begins with no header, or with one of another version, of an unknown kind, or of a message
            that is too long.
    """
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        raise TransferError("not a fedsim party")
    _, version, number, sequence, length = _LAYOUT.unpack_from(data)
    if version != VERSION:
        raise TransferError(f"version {version}, this one speaks {VERSION}")
    if number not in _NAMES:
        raise TransferError(f"a message of unknown kind {number}")
    _check_length(_NAMES[number], length)
    return Header(_NAMES[number], sequence, length)


def parse(data: bytes) -> tuple[Header, bytes]:
    """A whole frame's header and payload.

    Raises:
        TransferError: as for :func:`parse_header`; or its length is not what its header says.
    """
    found = parse_header(data)
    if len(data) != HEADER_BYTES + found.length:
        raise TransferError(f"a message of {len(data) - HEADER_BYTES} bytes that says it has {found.length}")
    return found, data[HEADER_BYTES:]


def _check_length(kind: str, length: int) -> None:
    most = MOST_BYTES if kind != "sealed" else MOST_BYTES + HEADER_BYTES + SEALING_BYTES  # a whole frame lies in it
    if length > most:
        raise TransferError(f"a message of {length} bytes, at most {most}")
