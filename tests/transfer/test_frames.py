"""Frames: what is written is read, and whatever else comes is refused with the reason."""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedsim.errors import TransferError
from fedsim.transfer import frames


def raw(magic=b"fsft", version=1, kind=10, sequence=0, length=0):
    """A header put together without the code under test."""
    return magic + struct.pack(">H", version) + struct.pack(">H", kind) + struct.pack(">QQ", sequence, length)


def test_a_frame_has_the_layout_that_its_page_describes():
    assert frames.frame("loss", 258, b"abc") == raw(kind=10, sequence=258, length=3) + b"abc"
    assert frames.HEADER_BYTES == 24 == len(raw())


@given(st.sampled_from(sorted(frames.KINDS)), st.integers(0, 2**64 - 1), st.binary(max_size=50))
def test_a_frame_is_read_as_it_was_written(kind, sequence, payload):
    header, found = frames.parse(frames.frame(kind, sequence, payload))
    assert (header, found) == (frames.Header(kind, sequence, len(payload)), payload)


def test_every_kind_has_a_number_of_its_own():
    assert len(set(frames.KINDS.values())) == len(frames.KINDS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a fedsim party"),
        (raw()[:23], "not a fedsim party"),
        (b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", "not a fedsim party"),
        (raw(magic=b"fsfT"), "not a fedsim party"),
        (raw(version=2), "version 2, this one speaks 1"),
        (raw(version=2, kind=9999, length=2**63), "version 2, this one speaks 1"),
        (raw(kind=9999), "a message of unknown kind 9999"),
        (raw(length=2**30 + 1), f"a message of {2**30 + 1} bytes, at most {2**30}"),
        (raw(length=2**64 - 1), f"a message of {2**64 - 1} bytes, at most {2**30}"),
        (raw(kind=102, length=2**30 + 41), f"a message of {2**30 + 41} bytes, at most {2**30 + 40}"),
    ],
)
def test_a_bad_header_is_refused_with_the_reason(data, message):
    with pytest.raises(TransferError) as caught:
        frames.parse_header(data)
    assert str(caught.value) == message


def test_the_largest_message_is_still_one_and_fits_into_a_sealed_one():
    assert frames.parse_header(raw(length=2**30)).length == 2**30
    whole = 24 + 2**30 + frames.SEALING_BYTES
    assert frames.parse_header(raw(kind=102, length=whole)).length == whole
    with pytest.raises(TransferError, match="at most"):
        frames.header("loss", 0, 2**30 + 1)


def test_a_frame_of_another_length_than_it_says_is_refused():
    for data in (raw(length=3) + b"ab", raw(length=3) + b"abcd"):
        with pytest.raises(TransferError, match="that says it has 3"):
            frames.parse(data)


@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda data: raw()[:6] + data)))
@example(raw(kind=0) + b"")
def test_whatever_comes_is_a_frame_or_a_transfer_error(data):
    try:
        header, payload = frames.parse(data)
    except TransferError:
        return
    assert frames.frame(header.kind, header.sequence, payload) == data
