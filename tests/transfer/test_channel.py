"""Channels: kinds, order, stopping, counting; and the codings of payloads."""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.errors import TransferError
from fedsim.transfer import frames
from fedsim.transfer.channel import Channel, array, facts, of_array, of_facts, printable
from fedsim.transfer.links import pair


@pytest.fixture
def channels():
    one, two = pair()
    return Channel(one, "party b", timeout_s=5), Channel(two, "party a", timeout_s=5)


def test_messages_arrive_and_are_counted_with_their_headers(channels):
    a, b = channels
    for payload in (b"one", b"three"):
        a.send("secrets", payload)
    a.send("loss", b"")
    b.send("hello", b"x")
    assert [b.receive("secrets"), b.receive("secrets"), b.receive("loss")] == [b"one", b"three", b""]
    assert a.receive("hello") == b"x"
    assert a.sent == b.received == {"secrets": 2 * 24 + 8, "loss": 24}
    assert a.messages_sent == b.messages_received == {"secrets": 2, "loss": 1}
    assert b.sent == a.received == {"hello": 25} and b.messages_sent == a.messages_received == {"hello": 1}


def test_a_record_sees_both_directions():
    one, two = pair()
    seen = []
    a, b = Channel(one, "b", record=lambda *what: seen.append(what)), Channel(two, "a")
    a.send("hello", b"1")
    b.send("loss", b"2")
    a.receive("loss")
    assert seen == [("sent", "hello", b"1"), ("received", "loss", b"2")]


def test_another_kind_is_named(channels):
    a, b = channels
    b.send("loss", b"")
    with pytest.raises(TransferError) as caught:
        a.receive("masked")
    assert str(caught.value) == "party b sent 'loss' where 'masked' was expected"


@pytest.mark.parametrize("number", [1, 2**64 - 1])
def test_a_message_out_of_order_is_named(number):
    mine, theirs = pair()
    theirs.put(frames.frame("loss", number, b""))
    with pytest.raises(TransferError, match=f"party b sent message {number} where message 0 was expected"):
        Channel(mine, "party b").receive("loss")


def test_a_repeated_message_is_out_of_order():
    mine, theirs = pair()
    channel = Channel(mine, "party b")
    for _ in range(2):
        theirs.put(frames.frame("loss", 0, b""))
    channel.receive("loss")
    with pytest.raises(TransferError, match="message 0 where message 1"):
        channel.receive("loss")


def test_stopping_is_told_with_the_reason(channels):
    a, b = channels
    b.abort("overflow: a hidden value")
    with pytest.raises(TransferError) as caught:
        a.receive("masked")
    assert str(caught.value) == "party b stopped: overflow: a hidden value"


def test_a_reason_is_bounded_and_cannot_move_a_terminal(channels):
    a, b = channels
    b.send("abort", "\x1b[2J\u202eé".encode() + b"\xff\n" + b"x" * 5000)
    with pytest.raises(TransferError) as caught:
        a.receive("masked")
    told = str(caught.value).removeprefix("party b stopped: ")
    assert told.startswith("?[2J?é") and told.isprintable() and len(told) == 500
    a.abort("y" * 10_000)
    with pytest.raises(TransferError) as caught:
        b.receive("masked")
    assert str(caught.value) == "party a stopped: " + "y" * 500


def test_telling_a_peer_that_is_gone_is_no_error(channels):
    a, b = channels
    b.close()
    a.abort("too late")
    assert a.sent == {}
    with pytest.raises(TransferError, match=r"^party b: the peer is gone$"):
        a.send("loss", b"")
    with pytest.raises(TransferError, match=r"^party b: the peer is gone$"):
        a.receive("loss")


def test_waiting_ends():
    one, _ = pair()
    with pytest.raises(TransferError, match=r"^party b: no message within 0\.01 s$"):
        Channel(one, "party b", timeout_s=0.01).receive("loss")


@given(st.binary(max_size=60), st.booleans())
def test_hostile_frames_are_transfer_errors(data, begun):
    mine, theirs = pair()
    theirs.put(frames.frame("loss", 0, b"")[:6] + data if begun else data)
    with pytest.raises(TransferError):
        Channel(mine, "party b").receive("masked")


@given(st.binary(max_size=3000))
def test_whatever_is_said_is_printable(payload):
    text = printable(payload)
    assert text.isprintable() and len(text) <= 500


# ---------------------------------------------------------------- arrays


def test_an_array_is_little_endian_in_c_order():
    values = np.array([[1.5, -2.0], [0.25, 3.0]])
    assert of_array(values.T) == struct.pack("<4d", 1.5, 0.25, -2.0, 3.0)
    assert of_array(values.astype(">f8")) == struct.pack("<4d", 1.5, -2.0, 0.25, 3.0)
    assert array(struct.pack("<3q", -1, 2**62, 7), np.int64, (3, 1)).tolist() == [[-1], [2**62], [7]]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64, np.uint64, np.uint8, np.int32])
@given(data=st.data())
def test_an_array_is_read_as_it_was_written(dtype, data):
    finite = {"allow_nan": False, "allow_infinity": False} if np.dtype(dtype).kind == "f" else None
    values = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0), elements=finite))
    found = array(of_array(values), dtype, values.shape)
    assert found.dtype == dtype and found.shape == values.shape and found.flags.writeable
    assert found.tobytes() == values.tobytes()


@pytest.mark.parametrize(("size", "shape"), [(15, (2,)), (17, (2,)), (0, (2,)), (16, (3,)), (8, (0, 5)), (16, (2, 2))])
def test_an_array_of_another_size_is_refused(size, shape):
    with pytest.raises(TransferError, match=f"an array of {size} bytes where {8 * math.prod(shape)} were expected"):
        array(bytes(size), np.float64, shape)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_is_refused(bad):
    for dtype in (np.float64, np.float32):
        with pytest.raises(TransferError, match="not finite"):
            array(of_array(np.array([1.0, bad, 2.0], dtype)), dtype, (3,))


# ---------------------------------------------------------------- facts


def test_facts_are_read_as_they_were_written():
    told = {"b": 1, "a": [1.5, None, True, "é"], "c": {"d": -(2**70)}}
    assert facts(of_facts(told)) == told
    assert of_facts({"b": 1, "a": 2}) == b'{"a":2,"b":1}'


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"{", b"[]", b"1", b"null", b"\xff", b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}', b'"a"'),
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_no_object_of_finite_values_is_refused(payload):
    with pytest.raises(TransferError, match="facts that are not"):
        facts(payload)


def test_facts_are_bounded_both_ways():
    assert len(facts(b'{"a":"' + b"x" * (2**20 - 8) + b'"}')["a"]) == 2**20 - 8
    with pytest.raises(TransferError, match=f"facts of {2**20 + 1} bytes, at most {2**20}"):
        facts(b'{"a":"' + b"x" * (2**20 - 7) + b'"}')
    with pytest.raises(TransferError, match="at most"):
        of_facts({"a": "x" * 2**20})


@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_hostile_facts_are_an_object_or_a_transfer_error(payload):
    try:
        found = facts(payload)
    except TransferError:
        return
    assert found == json.loads(payload)
