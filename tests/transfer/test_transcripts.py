"""What each party sees: everything that it receives, or decrypts, and what can be found in it.

Every search is shown to find what it looks for, in a transcript of the plain protocol, or of one whose masks are 0.
False alarms: eight random bytes equal one of ten thousand needles somewhere in three hundred kilobytes with probability
2e-10; each of some forty chi-square tests rejects a true uniform distribution once in a hundred million times.
"""

import os
import secrets as system
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from scipy import stats
from transfer_runs import AGREED, ASKS, PEOPLE, PROTOCOLS, Done, Heard, Watched, multiplications, party, transfer

from fedsim.transfer import alignment, curve, ring, terms
from fedsim.transfer import ciphertexts as c
from fedsim.transfer.fixed import encode_coefficients, encode_secrets
from fedsim.transfer.multiplication import Multiplication
from fedsim.transfer.nets import rows
from fedsim.transfer.together import run_together

ENCRYPTED = ("paillier", "secret-sharing")
ALARM = 1e-8  # of a test of a distribution
WORD = 8


@dataclass
class Spied:
    """An end that keeps what goes in and comes out, unencrypted."""

    inner: Multiplication
    secrets: list[np.ndarray] = field(default_factory=list)
    coefficients: list[np.ndarray] = field(default_factory=list)
    products: list[np.ndarray] = field(default_factory=list)

    def begin(self, *given):
        self.inner.begin(*given)

    def exchange(self, channel, role, own, coefficients, *, other, secrets):
        found = self.inner.exchange(channel, role, own, coefficients, other=other, secrets=secrets)
        self.secrets += [np.array(one) for one in secrets]
        self.coefficients += [np.array(one) for one in coefficients]
        self.products += [np.array(one) for one in found]
        return found

    def end(self, channel):
        self.inner.end(channel)

    def describe(self):
        return self.inner.describe()


def spied(a, b, agreed):
    """A run, and what each party multiplied in it."""
    heard, iterations = (Heard(), Heard()), []
    with multiplications(agreed) as ends:
        spies = Spied(ends[0]), Spied(ends[1])
        done = run_together(a, b, agreed, spies, iterations.append, records=heard)
    return Done(done, heard, iterations, ({}, {})), spies


# ---------------------------------------------------------------- needles


def written(values):
    """Numbers as eight bytes, both ways round, as they could lie in a message; numbers of few bytes say nothing."""
    words = [one.tobytes() for one in np.ascontiguousarray(values).ravel().view("<u8").astype("<u8")[:, None]]
    telling = {word for word in words if len(set(word)) > 2 or len(set(word.strip(b"\0\xff"))) > 1}
    return telling | {word[::-1] for word in telling}


def fixed(values):
    """Fixed-point encodings of secrets, and of digits from which a neighbour has borrowed."""
    encoded = encode_secrets(np.asarray(values, np.float64))
    return written(encoded) | written(encoded - 1)


def needles(one, spy, watched, iterations, agreed):
    """By name: what the other party must not see, as bytes of every encoding that the code has."""
    inputs, at = one.inputs.numpy(), 0 if one.role == "a" else 1
    before = [one.params, *[iteration[1 + at] for iteration in iterations]]
    hidden = np.concatenate([rows(one.net, params, one.inputs, key=None).values.numpy().ravel() for params in before])
    phi = [] if one.labels is None else [(one.labels @ rows(one.net, params, one.inputs, key=None).values)
                                         / len(one.labels) for params in before]  # fmt: skip
    gradients = np.concatenate([tensor.numpy().ravel() for found in watched.gradients for tensor in found.values()])
    products = np.concatenate([one.ravel() for one in spy.products])
    exact = [encode_coefficients(one) for one in spy.coefficients]
    found = {
        "features": written(inputs) | fixed(inputs),
        "hidden": written(hidden) | fixed(hidden),
        "secrets": set().union(*(written(one) | fixed(one) for one in spy.secrets)),
        "coefficients": set().union(*(written(one) for one in spy.coefficients))
        | set().union(*(written(one.values) for one in exact)),
        "gradients": written(gradients) | written(products) | fixed(gradients) | fixed(products)
        | set().union(*(_integer_products(p, x.fraction) for p, x in zip(spy.products, exact, strict=True))),
        "ids": {text.encode() for text in one.ids}
        | {curve.hashed(alignment._hash(alignment._TO_CURVE, text)) for text in one.ids}
        | {alignment._hash(label, text) for text in one.ids for label in (alignment._TO_CURVE, alignment._TO_ORDER)},
    }  # fmt: skip
    if one.labels is not None:
        found["predictor"] = set().union(*(written(one.numpy()) | fixed(one.numpy()) for one in phi))
        signs = one.labels.numpy()
        found["labels"] = {np.array(sign).tobytes() for sign in (1.0, -1.0)}
        found["labels"] |= {np.array(sign * 2**26).tobytes() for sign in (1, -1)}
        found["labels"] |= {signs.astype(np.int8).tobytes(), signs.astype(np.int8)[:PEOPLE].tobytes()}
    return found


def _integer_products(products, fraction):
    exact = np.rint(np.ldexp(products, fraction + 26)).astype(np.int64)
    return written(exact) | written(exact - 1)


def seen(heard):
    """What a party receives, and what it sends back decrypted; not the labels that B is meant to be told."""
    return heard.of("received", *(set(_kinds(heard)) - {"labels"})) + heard.of("sent", "opened")


def _kinds(heard):
    return {kind for _, kind, _ in heard.messages}


def leaks(done, parties, spies, watched, agreed):
    """Names of what the other party could find, by whose it is."""
    found = {}
    for at, (one, spy) in enumerate(zip(parties, spies, strict=True)):
        haystack = seen(done.heard[1 - at])
        for name, wanted in needles(one, spy, watched[at], done.iterations, agreed).items():
            assert wanted
            if any(_holds(message, wanted) for message in haystack):
                found.setdefault(one.role, set()).add(name)
    return found


def _holds(message, wanted):
    """Whether one of these byte strings, at any place, is in a message."""
    long = [needle for needle in wanted if len(needle) != WORD]
    short = {needle for needle in wanted if len(needle) == WORD}
    if any(needle in message for needle in long):
        return True
    return any(message[at : at + WORD] in short for at in range(len(message) - WORD + 1))


def leaking(protocol, kind="linear", iterations=2, triples="helper"):
    agreed = replace(AGREED, protocol=protocol, iterations=iterations, triples=triples)
    watched = Watched(), Watched()
    a, b = (party(role, kind, optimizer=one.optimizer) for role, one in zip("ab", watched, strict=True))
    done, spies = spied(a, b, agreed)
    if protocol == "plain":
        _, spies = spied(a, b, replace(agreed, protocol="secret-sharing"))
    return leaks(done, (a, b), spies, watched, agreed)


# ---------------------------------------------------------------- (a) nothing of the other is in what a party sees


@pytest.mark.parametrize("kind", ["linear", "mlp", "deep"])
@pytest.mark.parametrize("protocol", ENCRYPTED)
def test_no_message_holds_anything_of_the_other_party(protocol, kind):
    assert leaking(protocol, kind) == {}


def test_nor_where_the_parties_make_their_triples():
    assert leaking("secret-sharing", triples="paillier") == {}


def test_the_same_search_finds_them_in_the_plain_protocol():
    found = leaking("plain")
    assert found["a"] >= {"hidden", "predictor", "labels", "ids"}
    assert found["b"] >= {"hidden", "ids", "secrets"}


def test_the_same_search_finds_them_where_triples_are_zero(monkeypatch):
    monkeypatch.setattr(ring, "expand", lambda seed, label, shape: np.zeros(shape, np.uint64))
    found = leaking("secret-sharing")
    assert found["a"] >= {"secrets", "coefficients"}
    assert found["b"] >= {"secrets", "hidden", "coefficients"}


def test_the_same_search_finds_gradients_where_the_masks_of_products_are_zero(monkeypatch):
    monkeypatch.setattr(c.secrets, "randbelow", lambda _: 0)
    found = leaking("paillier", "mlp")
    assert "gradients" in found["a"]
    assert "gradients" in found["b"]


# ---------------------------------------------------------------- (b) nothing comes twice


def duplicates(role):
    """A party all of whose rows are the same, and whose labels are the same."""
    one = party(role)
    same = one.inputs[:1].expand_as(one.inputs).clone()
    labels = None if one.labels is None else torch.ones_like(one.labels)
    asks = None if one.asks is None else same[:ASKS].clone()
    return replace(one, inputs=same, labels=labels, asks=asks)


def pieces(done, protocol):
    """Ciphertexts, masked plaintexts, opened numbers, answers, points: everything that was sent, one by one."""
    sizes = {"secrets": 256, "masked": 256, "opened": 128} if protocol == "paillier" else {"opened": 8, "answer": 8}
    sizes["ids"] = curve.POINT_BYTES
    return {
        kind: [
            message[at : at + size]
            for heard in done.heard
            for message in heard.of("sent", kind)
            if not message.startswith(b"{")
            for at in range(0, len(message), size)
        ]
        for kind, size in sizes.items()
    }


@pytest.mark.parametrize("protocol", ENCRYPTED)
def test_equal_rows_and_labels_give_no_equal_pieces_and_equal_runs_have_none_in_common(protocol):
    agreed = replace(AGREED, protocol=protocol, iterations=2)
    runs = [pieces(transfer(duplicates("a"), duplicates("b"), agreed), protocol) for _ in range(2)]
    for kind, first in runs[0].items():
        assert len(first) > 15
        # points are sent twice: once with one key, once with both, and then common ones are equal by design
        if kind != "ids":
            assert len(set(first)) == len(first)
        assert not set(first) & set(runs[1][kind])


def test_equal_rows_do_give_equal_pieces_where_nothing_hides_them(monkeypatch):
    monkeypatch.setattr(ring, "expand", lambda seed, label, shape: np.zeros(shape, np.uint64))
    agreed = replace(AGREED, protocol="secret-sharing")
    runs = [pieces(transfer(duplicates("a"), duplicates("b"), agreed), "secret-sharing") for _ in range(2)]
    assert len(set(runs[0]["opened"])) < len(runs[0]["opened"]) / 2
    assert set(runs[0]["opened"]) == set(runs[1]["opened"])


# ---------------------------------------------------------------- (c) a simulator that knows nothing does as well


def uniform(counts):
    """P-value of the chi-square test that all are equally likely."""
    assert counts.sum() > 5 * len(counts)
    return stats.chisquare(counts).pvalue


def alike(one, other):
    """P-value of the chi-square test that two histograms are of one distribution."""
    table = np.stack([one, other])
    return stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue


def histogram(data, at=slice(None)):
    return np.bincount(np.frombuffer(data, np.uint8).reshape(-1, WORD)[:, at].ravel(), minlength=256)


@pytest.fixture(scope="module")
def shared():
    """Six iterations of nets of unequal kinds: 4,000 opened numbers or more reach either party."""
    return transfer(party("a", "mlp"), party("b", "deep"), replace(AGREED, protocol="secret-sharing", iterations=6))


@pytest.mark.parametrize("at", [0, 1])
def test_opened_matrices_are_uniform_bytes_and_so_is_what_a_simulator_writes(at, shared):
    opened = b"".join(shared.heard[at].of("received", "opened"))
    simulated = os.urandom(len(opened))
    assert len(opened) > 8 * 4000
    assert alike(histogram(opened), histogram(simulated)) > ALARM
    for place in range(WORD):  # the highest bytes of small numbers would be all 0 or all 255
        assert uniform(histogram(opened, place)) > ALARM
    bits = np.unpackbits(np.frombuffer(opened, np.uint8)).reshape(-1, 64).sum(0)
    deviations = (bits - len(opened) / 16) / np.sqrt(len(opened) / 32)
    assert np.abs(deviations).max() < 6  # 64 bits, a normal deviate each: one false alarm in 8 million


def test_the_same_tests_tell_real_from_simulated_where_triples_are_zero(monkeypatch):
    monkeypatch.setattr(ring, "expand", lambda seed, label, shape: np.zeros(shape, np.uint64))
    done = transfer(party("a", "mlp"), party("b", "deep"), replace(AGREED, protocol="secret-sharing", iterations=6))
    for heard in done.heard:
        opened = b"".join(heard.of("received", "opened"))
        assert alike(histogram(opened), histogram(os.urandom(len(opened)))) < ALARM
        assert uniform(histogram(opened, 7)) < ALARM


@pytest.mark.parametrize("at", [0, 1])
def test_an_answer_is_what_its_receiver_could_write_from_the_product_alone(at):
    """``answer = X Y - D (Y - E) - F_left``: given the product, of numbers that its receiver has or was opened."""
    from fedsim.transfer import triples

    shape = terms.Shape(2, 3, 4, 2)
    batch = triples.Batch((shape,))
    values = np.random.default_rng(at).integers(-(2**30), 2**30, (2, 3, 4))
    secret = np.random.default_rng(at + 9).integers(-(2**31), 2**31, 16)
    left, right = triples.deal(batch)
    d, e = left.factor(0), right.factor()
    opened = triples.open_right(secret, e).reshape(2, 4, 2)
    answered = triples.answer(triples.open_left(values, d), secret.reshape(2, 4, 2), right.products[0])
    product = ring.unsigned(values @ secret.reshape(2, 4, 2))
    assert np.array_equal(answered, product - ring.matmul(d, opened) - left.product(0))


PARTS = 16


def places(numbers, limit):
    """In which of 16 equal parts of [0, limit) numbers lie."""
    return np.bincount([int(number) * PARTS // int(limit) for number in numbers], minlength=PARTS)


def masked_plaintexts(bits=1024, count=600):
    """What a key's owner decrypts of products of the other party: numbers in [0, n), and n."""
    from fedsim.transfer import paillier

    key = paillier.generate(bits, insecure=True)
    values = np.random.default_rng(3).integers(-(2**40), 2**40, (count, 15))
    sent, _ = c.masked(c.encrypt(key, values))
    opened = c.opened(key, sent, count)
    return [int.from_bytes(opened[at : at + 128], "big") for at in range(0, len(opened), 128)], int(key.public.n), sent


def test_masked_products_are_uniform_mod_n():
    numbers, n, _ = masked_plaintexts()
    simulated = [system.randbelow(n) for _ in numbers]
    assert uniform(places(numbers, n)) > ALARM
    assert alike(places(numbers, n), places(simulated, n)) > ALARM
    low = [b"".join((number % 2**960).to_bytes(120, "big") for number in some) for some in (numbers, simulated)]
    assert uniform(histogram(low[0])) > ALARM
    assert alike(*map(histogram, low)) > ALARM


def test_products_without_masks_are_not(monkeypatch):
    monkeypatch.setattr(c.secrets, "randbelow", lambda _: 0)
    numbers, n, _ = masked_plaintexts()
    assert uniform(places(numbers, n)) < ALARM


def test_masks_of_few_bits_would_be_seen_too(monkeypatch):
    monkeypatch.setattr(c.secrets, "randbelow", lambda n: system.randbits(900))
    numbers, n, _ = masked_plaintexts()
    assert uniform(places(numbers, n)) < ALARM


def test_what_is_decrypted_in_a_run_is_uniform_mod_the_receivers_n():
    """Twenty iterations with 17 hidden values: 300 masked numbers that B opens for A, 400 that A opens for B."""
    agreed = replace(AGREED, protocol="paillier", hidden=17, iterations=20)
    a, b = (party(role, hidden=17) for role in "ab")
    done = transfer(a, b, agreed)
    for heard in done.heard:
        (key,) = heard.of("sent", "key")
        n = int.from_bytes(key[1 : 1 + 128], "big")
        for kind, size, limit in (("opened", 128, n), ("secrets", 256, n * n)):
            sent = b"".join(heard.of("sent", kind))
            numbers = [int.from_bytes(sent[at : at + size], "big") for at in range(0, len(sent), size)]
            assert len(numbers) > 250
            assert uniform(places(numbers, limit)) > ALARM
            assert alike(places(numbers, limit), places([system.randbelow(limit) for _ in numbers], limit)) > ALARM


def other_data(role):
    """Another party of the same sizes: other columns, on another scale, other nets, one label alone; ids as long."""
    one = party(role, "mlp", seed=7)
    labels = None if one.labels is None else torch.ones_like(one.labels)
    ids = [text.replace("person", "nosrep") for text in one.ids]
    return replace(one, inputs=one.inputs * 0.01, labels=labels, ids=ids)


@pytest.mark.parametrize(
    ("protocol", "triples"), [*((one, "helper") for one in PROTOCOLS), ("secret-sharing", "paillier")]
)
def test_which_messages_are_sent_and_how_long_they_are_depends_on_public_sizes_alone(protocol, triples):
    agreed = replace(AGREED, protocol=protocol, iterations=3, triples=triples)
    one = transfer(party("a", "mlp"), party("b", "mlp"), agreed)
    two = transfer(other_data("a"), other_data("b"), agreed)
    for first, second in zip(one.heard, two.heard, strict=True):
        assert [(way, kind, len(payload)) for way, kind, payload in first.messages] == [
            (way, kind, len(payload)) for way, kind, payload in second.messages
        ]
    assert any(
        x != y for x, y in zip(one.heard[0].of("sent", "secrets", "opened"),
                               two.heard[0].of("sent", "secrets", "opened"), strict=True)
    )  # fmt: skip


# ---------------------------------------------------------------- (d) only sums


@pytest.mark.parametrize("kind", ["linear", "mlp", "deep", "head only"])
@pytest.mark.parametrize("overlap", [8, 12])
def test_a_party_is_opened_as_many_numbers_as_it_has_parameters_whatever_the_number_of_rows(kind, overlap):
    """So no gradient of a single row is; A learns the loss besides, and in the end the scores of B's questions."""
    times = 2
    agreed = replace(AGREED, protocol="secret-sharing", iterations=times, overlap=overlap)
    a, b = (party(role, kind) for role in "ab")
    done, spies = spied(a, b, agreed)
    for at, (one, more) in enumerate(((a, 1), (b, 0))):
        trained = sum(tensor.numel() for name, tensor in one.params.items() if name not in one.net.frozen)
        answers = done.heard[at].of("received", "answer")
        assert [len(answer) // WORD for answer in answers[:times]] == [trained + more] * times
        assert sum(product.size for product in spies[at].products) == times * (trained + more) + ASKS * more
        assert [len(answer) // WORD for answer in answers[times:]] == ([ASKS] if more else [0])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_under_encryption_there_are_no_more_slots_than_packing_leaves_over(kind):
    """B unmasks so many ciphertexts as its parameters need, whatever the number of rows."""
    sizes = []
    for overlap in (8, 12):
        done = transfer(party("a", kind), party("b", kind), replace(AGREED, protocol="paillier", overlap=overlap))
        sizes.append([len(one) // 128 for one in done.heard[1].of("received", "opened")])
    assert sizes[0] == sizes[1]
    b = party("b", kind)
    most = 1 + sum(tensor.numel() for tensor in b.params.values()) // 15
    assert sum(sizes[0]) <= most + 1
