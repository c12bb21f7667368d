"""Links: in one process, over real sockets, and encrypted over either."""

import hmac
import socket
import struct
import threading
import time
import tracemalloc

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import TransferError
from fedsim.transfer import frames, links

FRAME = frames.frame("secrets", 3, bytes(range(200)))


@pytest.fixture(params=["queues", "sockets", "sealed"])
def ends(request):
    """Both ends of each kind of link."""
    if request.param == "queues":
        found = links.pair()
    else:
        found = tuple(links.SocketLink(one, timeout_s=5) for one in socket.socketpair())
    if request.param == "sealed":
        found = links.SealedLink(found[0], True, timeout_s=5), links.SealedLink(found[1], False, timeout_s=5)
        for one in found:
            one._agreed(5)  # so that closing is the next thing that an end hears
    yield found
    for one in found:
        one.close()


@pytest.fixture
def over():
    """A link over a socket, and the raw other end."""
    mine, theirs = socket.socketpair()
    link = links.SocketLink(mine, timeout_s=5)
    yield link, theirs
    link.close()
    theirs.close()


def test_frames_arrive_whole_in_order_both_ways(ends):
    one, two = ends
    others = [frames.frame("loss", number, b"x" * number) for number in range(5)]
    for frame in others:
        one.put(frame)
    two.put(FRAME)
    assert [two.take(5) for _ in others] == others
    assert one.take(5) == FRAME


def test_what_was_sent_before_closing_still_arrives_and_then_the_peer_is_gone(ends):
    one, two = ends
    one.put(FRAME)
    one.close()
    one.close()
    assert two.take(5) == FRAME
    for _ in range(2):
        with pytest.raises(TransferError):
            two.take(5)


def test_the_peer_is_gone_in_these_words():
    for one, two in (links.pair(), map(links.SocketLink, socket.socketpair())):
        one.close()
        with pytest.raises(TransferError, match=r"^the peer is gone$"):
            two.take(5)
        with pytest.raises(TransferError):
            two.put(FRAME)
            two.put(FRAME)
        with pytest.raises(TransferError):
            one.put(FRAME)
        with pytest.raises(TransferError):
            one.take(5)
        two.close()


def test_closing_wakes_who_waits(ends):
    one, _ = ends
    caught = []

    def wait():
        try:
            one.take(30)
        except TransferError as error:
            caught.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.1)
    one.close()
    thread.join(10)
    assert len(caught) == 1


def test_no_message_in_time(ends):
    one, _ = ends
    with pytest.raises(TransferError, match=r"no message within 0\.05 s"):
        one.take(0.05)


# ---------------------------------------------------------------- sockets


def test_a_frame_in_the_smallest_pieces(over):
    link, theirs = over

    def drip():
        for at in range(len(FRAME)):
            theirs.sendall(FRAME[at : at + 1])

    threading.Thread(target=drip, daemon=True).start()
    assert link.take(5) == FRAME


def test_a_frame_larger_than_any_buffer(over):
    link, theirs = over
    other = links.SocketLink(theirs, timeout_s=30)
    large = frames.frame("secrets", 0, bytes(range(256)) * 2**14)
    sender = threading.Thread(target=lambda: other.put(large), daemon=True)
    sender.start()
    assert link.take(30) == large
    sender.join(10)


@pytest.mark.parametrize("cut", [1, 23, 24, 100])
def test_an_end_in_the_middle_of_a_message(over, cut):
    link, theirs = over
    theirs.sendall(FRAME[:cut])
    theirs.close()
    with pytest.raises(TransferError, match="ended in the middle of a message"):
        link.take(5)


def test_dripping_does_not_move_the_deadline(over):
    link, theirs = over
    over_now = threading.Event()

    def drip():
        for at in range(len(FRAME)):
            if over_now.wait(0.02):
                return
            theirs.sendall(FRAME[at : at + 1])

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    with pytest.raises(TransferError, match=r"no message within 0\.3 s"):  # all of it would take 4 s
        link.take(0.3)
    with pytest.raises(TransferError, match="broke off"):  # the rest of it is no message
        link.take(0.3)
    with pytest.raises(TransferError, match="broke off"):
        link.put(FRAME)
    over_now.set()
    thread.join(5)


def test_a_peer_that_takes_nothing():
    mine, theirs = socket.socketpair()
    link = links.SocketLink(mine, timeout_s=0.1)
    with pytest.raises(TransferError, match=r"did not take a message within 0\.1 s"):
        link.put(frames.frame("secrets", 0, bytes(2**24)))
    with pytest.raises(TransferError, match="broke off"):
        link.put(FRAME)
    link.close()
    theirs.close()


@pytest.mark.parametrize("length", [2**30, 2**30 + 1, 2**64 - 1])
def test_no_memory_is_taken_for_what_a_header_only_promises(over, length):
    link, theirs = over
    theirs.sendall(struct.pack(">4sHHQQ", b"fsft", 1, 5, 0, length))
    tracemalloc.start()
    with pytest.raises(TransferError, match="at most" if length > 2**30 else "no message within"):
        link.take(0.05)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.binary(max_size=100), st.binary(max_size=100).map(lambda data: FRAME[:6] + data)))
def test_hostile_bytes_are_a_frame_or_a_transfer_error(data):
    mine, theirs = socket.socketpair()
    theirs.sendall(data)
    theirs.close()
    link = links.SocketLink(mine)
    try:
        assert data.startswith(link.take(5))
    except TransferError:
        pass
    finally:
        link.close()


# ---------------------------------------------------------------- sealed


class Relay:
    """One end of a pair whose frames pass through these hands. carried: (from the initiator?, frame)."""

    def __init__(self):
        (self.one, self.left), (self.two, self.right) = links.pair(), links.pair()
        self.carried = []

    def carry(self, count=1, *, forth=True, change=lambda frame: [frame]):
        source, sink = (self.left, self.right) if forth else (self.right, self.left)
        for _ in range(count):
            frame = source.take(5)
            self.carried.append((forth, frame))
            for one in change(frame):
                sink.put(one)

    def sealed(self):
        ends = links.SealedLink(self.one, True), links.SealedLink(self.two, False)
        self.carry()
        self.carry(forth=False)
        return ends


def test_a_relay_reads_nothing_and_sees_lengths():
    relay = Relay()
    one, two = relay.sealed()
    for _ in range(2):
        one.put(FRAME)
        relay.carry()
        assert two.take(5) == FRAME
        two.put(FRAME)
        relay.carry(forth=False)
        assert one.take(5) == FRAME
    carried = [frame for _, frame in relay.carried[2:]]
    assert len(set(carried)) == 4
    assert {len(frame) for frame in carried} == {24 + len(FRAME) + 16}
    assert all(frames.parse_header(frame).kind == "sealed" for frame in carried)
    assert not any(FRAME[at : at + 8] in frame for frame in carried for at in range(24, 216))


def test_a_frame_is_encrypted_as_described():
    """HKDF by its definition with HMAC (RFC 5869), then the cipher."""
    relay = Relay()
    one, two = relay.sealed()
    two.put(FRAME)
    two.put(FRAME)
    relay.carry(2, forth=False)
    public = [frame[24:] for _, frame in relay.carried[:2]]
    shared = one._private.exchange(X25519PublicKey.from_public_bytes(public[1]))
    pseudo = hmac.digest(bytes(32), shared, "sha256")
    info = b"fedsim sealed link 1" + public[0] + public[1]
    first = hmac.digest(pseudo, info + b"\1", "sha256")
    second = hmac.digest(pseudo, first + info + b"\2", "sha256")
    for number, (_, frame) in enumerate(relay.carried[2:]):
        nonce = struct.pack("<Q4x", number)
        assert ChaCha20Poly1305(second).decrypt(nonce, frame[24:], frame[:24]) == FRAME


@pytest.mark.parametrize("at", [0, 5, 7, 15, 23, 24, 100, -1])
def test_every_changed_bit_is_found(at):
    relay = Relay()
    one, two = relay.sealed()
    one.put(FRAME)

    def flip(frame):
        changed = bytearray(frame)
        changed[at] ^= 1
        return [bytes(changed)]

    relay.carry(change=flip)
    with pytest.raises(TransferError):
        two.take(5)


def test_a_repeated_lost_or_reordered_frame_is_found():
    def replayed(relay, one, two):
        one.put(FRAME)
        relay.carry(change=lambda frame: [frame, frame])
        two.take(5)

    def lost(relay, one, two):
        one.put(FRAME)
        one.put(FRAME)
        relay.carry(change=lambda frame: [])
        relay.carry()

    def renumbered(relay, one, two):
        one.put(FRAME)
        relay.carry(change=lambda frame: [])
        one.put(FRAME)
        relay.carry(change=lambda frame: [frames.frame("sealed", 0, frame[24:])])

    def reflected(relay, one, two):
        two.put(FRAME)
        relay.carry(forth=False)
        relay.right.put(relay.carried[-1][1])

    for happens in (replayed, lost, renumbered, reflected):
        relay = Relay()
        one, two = relay.sealed()
        happens(relay, one, two)
        with pytest.raises(TransferError, match="encrypted message"):
            two.take(5)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (frames.frame("exchange", 0, bytes(32)), "low order"),
        (frames.frame("exchange", 0, b"\1" + bytes(31)), "low order"),
        (frames.frame("exchange", 0, bytes(31)), "a public key was expected"),
        (frames.frame("hello", 0, bytes(32)), "a public key was expected"),
        (b"rubbish", "not a fedsim party"),
    ],
)
def test_a_bad_key_is_refused(key, message):
    mine, theirs = links.pair()
    link = links.SealedLink(mine, True)
    theirs.put(key)
    with pytest.raises(TransferError, match=message):
        link.put(FRAME)


def test_two_initiators_do_not_understand_each_other():
    mine, theirs = links.pair()
    one, two = links.SealedLink(mine, True), links.SealedLink(theirs, True)
    one.put(FRAME)
    with pytest.raises(TransferError, match="of another key"):
        two.take(5)


def test_keys_are_new_each_time():
    publics = [links.SealedLink(links.pair()[0], True)._public for _ in range(3)]
    assert len(set(publics)) == 3
