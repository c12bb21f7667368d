"""The secret-shared end and its helper: products against exact integers, and what the helper sees."""

import contextlib
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from transfer_runs import AGREED, Heard, party

from fedsim.errors import TransferError
from fedsim.transfer import ring, triples
from fedsim.transfer.channel import Channel, of_facts
from fedsim.transfer.fixed import decode, encode_coefficients, encode_secrets
from fedsim.transfer.links import pair
from fedsim.transfer.sharing import Helped, SecretSharing, batches, help_both
from fedsim.transfer.terms import Plan, Product, Shape, plan
from fedsim.transfer.together import run_together

MIXED = Plan(
    (12, 6), (Product(0, Shape(2, 3, 2, 3)), Product(1, Shape(1, 1, 6, 1)), Product(0, Shape(1, 2, 4, 3))), 0, 0, False
)
PLANS = {"rows": plan("a", 6, 4, 5, 0), "entries": plan("b", 6, 3, 5, 11), "mixed": MIXED}


class Helper:
    """A helper in a thread, whose channels keep what they hear; after ``with``, how often it has dealt."""

    def __init__(self):
        links = [pair(), pair()]
        self.heard = Heard(), Heard()
        self.at_helper = [
            Channel(mine, f"party {role}", timeout_s=20, record=heard)
            for (mine, _), role, heard in zip(links, "ab", self.heard, strict=True)
        ]
        self.at_parties = [Channel(theirs, "the helper", timeout_s=20) for _, theirs in links]
        self.dealt = self.error = None

    def _act(self):
        try:
            self.dealt = help_both(*self.at_helper)
        except TransferError as error:
            self.error = error

    def __enter__(self):
        self.thread = threading.Thread(target=self._act)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.thread.join(20)
        for channel in (*self.at_helper, *self.at_parties):
            channel.close()


def both_ways(own, other, draw, times=1):
    """A exchanges ``own`` for ``other`` with B."""
    ends = pair()
    given = {
        role: [draw.uniform(-60, 60, size) for size in wanted.sources] for role, wanted in (("a", other), ("b", own))
    }
    mine = {
        role: [draw.normal(size=product.shape[:3]) for product in wanted.products]
        for role, wanted in (("a", own), ("b", other))
    }
    found, opened = {}, Heard()

    def act(role, end, helper, of_role, of_other):
        channel = Channel(end, "other", timeout_s=20, record=opened if role == "a" else None)
        multiplication = SecretSharing(Helped(helper))
        multiplication.begin(channel, role, of_role, of_other, times)
        found[role] = [
            multiplication.exchange(channel, role, of_role, mine[role], other=of_other, secrets=given[role])
            for _ in range(times)
        ]
        multiplication.end(channel)

    with Helper() as helper:
        threads = [
            threading.Thread(target=act, args=("a", ends[0], helper.at_parties[0], own, other)),
            threading.Thread(target=act, args=("b", ends[1], helper.at_parties[1], other, own)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found, mine, given, opened, helper


@pytest.mark.parametrize("theirs", PLANS)
@pytest.mark.parametrize("ours", PLANS)
def test_both_find_the_exact_products_of_both_encodings(ours, theirs):
    own, other = PLANS[ours], PLANS[theirs]
    found, mine, given, opened, helper = both_ways(own, other, np.random.default_rng(1), times=3)
    for role, wanted, sources in (("a", own, given["b"]), ("b", other, given["a"])):
        for again in found[role]:
            for product, values, one in zip(wanted.products, mine[role], again, strict=True):
                batch, _, terms, columns = product.shape
                x, y = encode_coefficients(values), encode_secrets(sources[product.source])
                y = y.reshape(batch, terms, columns).astype(object)
                whole = np.stack([x.values[b].astype(object) @ y[b] for b in range(batch)])
                assert np.array_equal(one, decode(whole.astype(np.int64), x.fraction))
    assert helper.dealt == 3
    assert len(set(opened.of("sent", "opened"))) == 3  # the same factors, a new mask each time


def test_a_source_is_opened_once_for_all_products_that_read_it():
    _, _, _, opened, _ = both_ways(MIXED, PLANS["rows"], np.random.default_rng(2))
    (received,) = opened.of("received", "opened")
    coefficients = sum(np.prod(product.shape[:3]) for product in PLANS["rows"].products)
    assert len(received) == 8 * (sum(MIXED.sources) + coefficients)


def test_products_of_one_source_are_one_batch():
    assert batches(MIXED) == [
        triples.Batch((Shape(2, 3, 2, 3), Shape(1, 2, 4, 3))),
        triples.Batch((Shape(1, 1, 6, 1),)),
    ]


def test_the_helper_hears_shapes_and_nothing_else_and_sends_no_two_pieces_twice():
    """Its messages are the same whatever the parties' numbers are; what it sends is new each time."""
    agreed, heard = AGREED, []
    for seed in (0, 5):
        with Helper() as helper:
            ends = tuple(SecretSharing(Helped(channel)) for channel in helper.at_parties)
            sharing = replace(agreed, protocol="secret-sharing", iterations=3)
            run_together(party("a", seed=seed), party("b", seed=seed), sharing, ends, lambda _: None)
        heard.append(helper.heard)
    for one, other in zip(*heard, strict=True):
        asked = one.of("received")
        assert asked == other.of("received")
        for message in asked:
            content = json.loads(message)
            assert content == {"over": True} or content.keys() == {"own", "other"}
            assert all(type(size) is int for name in content.keys() - {"over"} for size in _flat(content[name]))
        sent = one.of("sent") + other.of("sent")
        words = [message[at : at + 8] for message in sent for at in range(0, len(message), 8)]
        assert len(set(words)) == len(words)


def _flat(shapes):
    return [size for batch in shapes for shape in batch for size in shape]


def test_a_triple_is_a_product_and_each_party_has_its_own_halves():
    """From the messages themselves: ``F_left + F_right = D E`` in Z_2^64, and nobody is sent the other's seed."""
    asked = {"own": [[[1, 2, 3, 2]]], "other": []}
    with Helper() as helper:
        helper.at_parties[0].send("factor", of_facts(asked))
        helper.at_parties[1].send("factor", of_facts({"own": [], "other": asked["own"]}))
        left, right = (channel.receive("factor") for channel in helper.at_parties)
        for channel in helper.at_parties:
            channel.send("factor", of_facts({"over": True}))
    assert (len(left), len(right)) == (32, 32 + 8 * 4)
    assert left not in right
    d = ring.expand(left, "D 0", (1, 2, 3))
    e = ring.expand(right[:32], "E", (6,)).reshape(1, 3, 2)
    f_left, f_right = ring.expand(left, "F 0", (1, 2, 2)), ring.from_bytes(right[32:], (1, 2, 2))
    expected = (d.astype(object) @ e.astype(object)) % 2**64
    assert np.array_equal((f_left + f_right).astype(object), expected)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ({"own": [[[1, 2, 3, 2]]], "other": []}, {"own": [], "other": []}, "different products"),
        ({"own": [[[1, 2, 3, 2]]], "other": []}, {"own": [], "other": [[[1, 2, 3, 3]]]}, "different products"),
        ({"over": True}, {"own": [], "other": []}, "one party has finished, the other asks for more"),
        ({"own": [[[1, 2, 3]]], "other": []}, {"own": [], "other": []}, "triples of no shape"),
        ({"own": [[[1, 2, 3, -1]]], "other": []}, {"own": [], "other": []}, "triples of no shape"),
        ({"own": 5, "other": []}, {"own": [], "other": []}, "triples of no shape"),
        ({}, {}, "triples of no shape"),
    ],
)
def test_what_a_helper_does_not_deal_it_tells_both(a, b, text):
    with Helper() as helper:
        for channel, asked in zip(helper.at_parties, (a, b), strict=True):
            channel.send("factor", of_facts(asked))
        for channel in helper.at_parties:
            with pytest.raises(TransferError, match=f"the helper stopped: .*{text}"):
                channel.receive("factor")
    assert text in str(helper.error)
    assert helper.dealt is None


def test_a_helper_whose_party_is_gone_tells_the_other():
    with Helper() as helper:
        helper.at_parties[1].close()
        helper.at_parties[0].send("factor", of_facts({"own": [], "other": []}))
        with contextlib.suppress(TransferError):
            helper.at_parties[1].send("factor", b"")
        with pytest.raises(TransferError, match="the helper stopped: party b: the peer is gone"):
            helper.at_parties[0].receive("factor")
