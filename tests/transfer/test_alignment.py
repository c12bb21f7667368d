"""Alignment: against Python's sets; what crosses depends on sizes alone; whatever else comes is refused."""

import hashlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import DataError, TransferError
from fedsim.transfer import alignment, curve
from fedsim.transfer.alignment import disclosed, intersect
from fedsim.transfer.channel import Channel, of_array, of_facts
from fedsim.transfer.links import pair

HOW = [disclosed, intersect]
IDS = ["anna", "ben", "chloé", "dóra", "人", "", "0", "eve"]


def together(find, a, b, *, records=(None, None), tamper=None, **more):
    """Both parties; returns what each finds, or raises."""
    ends = pair()
    results = {}

    def act(index, ids, record):
        channel = Channel(ends[index], "ba"[index], timeout_s=10, record=record)
        if tamper and index:
            channel = tamper(channel)
        try:
            results[index] = find(channel, ids, first=index == 0, **more)
        except BaseException as error:
            results[index] = error
            channel.abort(str(error))

    threads = [threading.Thread(target=act, args=(i, ids, records[i])) for i, ids in enumerate((a, b))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0], results[1]


def transcript(find, a, b):
    seen = []
    together(find, a, b, records=(lambda *what: seen.append(what), None))
    return seen


@pytest.mark.parametrize("find", HOW)
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (IDS, IDS[::-1]),
        (IDS[:5], IDS[3:]),
        (IDS, ["zoe", "ben"]),
        (["ben"], IDS),
        (["a"], ["b"]),
        (["\u00e9"], ["e\u0301", "E"]),
        ([f"p{n}" for n in range(50)], [f"p{n}" for n in range(100, 20, -3)]),
    ],
)
def test_both_find_the_common_ids_in_one_order(find, a, b):
    rows_a, rows_b = together(find, a, b)
    assert [a[row] for row in rows_a] == [b[row] for row in rows_b]
    assert {a[row] for row in rows_a} == set(a) & set(b) and len(rows_a) == len(set(a) & set(b))


@settings(deadline=None, max_examples=25)
@given(
    *[st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=2), min_size=1, max_size=8, unique=True)] * 2
)
def test_small_sets(a, b):
    found = [together(find, a, b) for find in HOW]
    assert found[0] == found[1]
    assert {a[row] for row in found[0][0]} == set(a) & set(b) == {b[row] for row in found[0][1]}


@pytest.mark.parametrize("find", HOW)
def test_the_order_is_that_of_a_hash_whatever_the_rows_are(find):
    expected = sorted(IDS, key=lambda one: hashlib.sha256(b"fedsim ids, their order\0" + one.encode()).digest())
    assert expected not in (IDS, sorted(IDS))
    for a in (IDS, IDS[::-1], IDS[3:] + IDS[:3]):
        rows, _ = together(find, a, IDS)
        assert [a[row] for row in rows] == expected


def test_more_points_than_a_message_holds(monkeypatch):
    monkeypatch.setattr(alignment, "_CHUNK", 3 * 32)
    a, b = [str(n) for n in range(10)], [str(n) for n in range(4, 11)]
    seen = []
    rows, _ = together(intersect, a, b, records=(lambda *what: seen.append(what), None))
    assert sorted(a[row] for row in rows) == ["4", "5", "6", "7", "8", "9"]
    sizes = {
        way: [len(payload) for one, kind, payload in seen if one == way and kind == "ids"]
        for way in ("sent", "received")
    }
    assert sizes["sent"][1:] == [96, 96, 96, 32, 96, 96, 32]
    assert sizes["received"][1:] == [96, 96, 32, 96, 96, 96, 32]


def test_processes_find_the_same(monkeypatch):
    monkeypatch.setattr(curve, "_PIECE", 5)
    others = [*IDS[2:], "x", "y"]
    assert together(intersect, IDS, others, workers=2) == together(intersect, IDS, others)


# ---------------------------------------------------------------- what crosses


def test_two_runs_share_no_point_and_no_order():
    one, two = (transcript(intersect, IDS, IDS[3:]) for _ in range(2))
    points = [
        {p for _, kind, data in seen if kind == "ids" and len(data) % 32 == 0 for p in curve.each(data)}
        for seen in (one, two)
    ]
    assert len(points[0]) == 8 + 5 + 8  # masked once: 8 and 5; twice: 8, of which 5 are the other's
    assert not points[0] & points[1]


def test_no_point_is_a_hash_of_an_id():
    hashes = {curve.hashed(hashlib.sha256(b"fedsim ids, to the curve\0" + one.encode()).digest()) for one in IDS}
    seen = transcript(intersect, IDS, IDS[3:])
    assert not hashes & {p for _, kind, data in seen for p in curve.each(data)}
    assert not any(one.encode() in data for _, _, data in seen for one in IDS if len(one) > 1)


def test_points_are_sent_in_an_order_that_is_new_each_time(monkeypatch):
    monkeypatch.setattr(curve, "new_key", lambda: bytes([8]) * 32)
    ids = [str(n) for n in range(30)]
    sent = []
    for _ in range(2):
        seen = transcript(intersect, ids, ["x"])
        sent.append(list(curve.each(next(data for way, kind, data in seen[1:] if way == "sent" and kind == "ids"))))
    assert sorted(sent[0]) == sorted(sent[1]) and sent[0] != sent[1]  # equal with probability 1/30!
    hashes = b"".join(hashlib.sha256(b"fedsim ids, to the curve\0" + one.encode()).digest() for one in ids)
    assert list(curve.each(curve.masked(bytes([8]) * 32, hashes))) not in sent


def test_lengths_depend_on_sizes_alone():
    def lengths(a, b):
        return [(way, kind, len(data)) for way, kind, data in transcript(intersect, a, b)]

    other = [f"a much longer name, number {n}" for n in range(8)]
    assert lengths(IDS, IDS[:5]) == lengths(IDS, other[:5]) == lengths(other, IDS[3:])
    assert lengths(IDS, IDS[:5]) != lengths(IDS, IDS[:6])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("find", HOW)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one is needed"),
        (["a", "b", "a"], "must be there once each, got 'a' twice"),
        (["a", "\ud800"], "must be Unicode text"),
    ],
)
def test_bad_ids_are_named_before_anything_is_sent(find, ids, message):
    one, _ = pair()
    channel = Channel(one, "b")
    with pytest.raises(DataError, match=message):
        find(channel, ids, first=True)
    assert channel.sent == {}


def changing(number, change):
    """Party b's channel, of which the message with a number is changed."""

    def tampered(channel):
        send, count = channel.send, iter(range(100))

        def other(kind, payload):
            send(kind, change(payload) if next(count) == number else payload)

        channel.send = other
        return channel

    return tampered


def other_bit(data):
    """Another point, most likely."""
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda data: b"{}", "did not say how many ids"),
        (0, lambda data: of_facts({"ids": 0}), "did not say how many ids"),
        (0, lambda data: of_facts({"ids": True}), "did not say how many ids"),
        (0, lambda data: of_facts({"ids": 2**40}), "did not say how many ids"),
        (0, lambda data: of_facts({"ids": 6}), "points of 160 bytes where 192 were expected"),
        (1, lambda data: data[:-1], "points of 159 bytes where 160 were expected"),
        (1, lambda data: data + bytes(32), "points of 192 bytes where 160 were expected"),
        (1, lambda data: bytes(32) + data[32:], "low order"),
        (1, lambda data: data[32:64] + data[32:], "the same point twice"),
        (1, lambda data: b"\xff" * 32 + data[32:], "not below"),
        (2, lambda data: data[32:64] + data[32:], "the same point twice"),
        (2, lambda data: data[:-32] + b"\xff" * 32, "not below"),
        (2, lambda data: data[32:] + data[:32], "id order mismatch"),
        (3, other_bit, "id order mismatch: b found other common ids than the 5 found here"),
        (3, lambda data: b"", "id order mismatch"),
    ],
)
def test_what_is_changed_is_refused(number, change, message):
    found, _ = together(intersect, IDS, IDS[:5], tamper=changing(number, change))
    assert isinstance(found, TransferError) and message in str(found), found


def test_a_changed_point_never_gives_a_wrong_pair():
    """A changed id of b is one that a does not have: then both find one less."""
    others = IDS[:5]
    for number, count in ((1, 5), (2, 8)):
        for at in range(0, count * 32, 32):
            change = changing(number, lambda data, at=at: data[:at] + other_bit(data[at:]))
            found, theirs = together(intersect, IDS, others, tamper=change)
            if isinstance(found, list) and isinstance(theirs, list):
                assert [IDS[row] for row in found] == [others[row] for row in theirs]
                assert len(found) == (4 if number == 1 else 5)
            else:
                assert isinstance(found, TransferError) and isinstance(theirs, TransferError)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda data: of_facts({"ids": 4}), "an array of 20 bytes where 16 were expected"),
        (1, lambda data: of_array(np.full(5, 2**32 - 1, np.uint32)), "where 21474836475 were expected"),
        (2, lambda data: data + b"x", "sent ids of"),
        (3, other_bit, "id order mismatch"),
    ],
)
def test_what_is_changed_in_the_clear_is_refused(number, change, message):
    found, _ = together(disclosed, IDS, IDS[:5], tamper=changing(number, change))
    assert isinstance(found, TransferError) and message in str(found), found
