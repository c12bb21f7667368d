"""The protocols against each other: the same gradients, nets and predictions, over whatever carries the messages."""

import contextlib
import math
import socket
import ssl
import subprocess
from dataclasses import replace

import pytest
import torch
from transfer_pairs import NETS
from transfer_runs import AGREED, ASKS, PEOPLE, PROTOCOLS, Watched, furthest, multiplications, party, same, transfer

from fedsim.transfer import protocols, terms
from fedsim.transfer.encrypted import ciphertexts_of
from fedsim.transfer.links import SealedLink, SocketLink, pair
from fedsim.transfer.multiplication import Clear
from fedsim.transfer.relayed import in_process
from fedsim.transfer.together import run_together

PAIRS = [*[(kind, kind) for kind in NETS], ("linear", "deep"), ("dropout", "linear"), ("head only", "mlp")]


def gradients(kind_a, kind_b, agreed):
    """Of the first iteration at each party, and what came of the run."""
    watched = Watched(), Watched()
    a, b = (
        party(role, kind, optimizer=one.optimizer)
        for role, kind, one in zip("ab", (kind_a, kind_b), watched, strict=True)
    )
    done = transfer(a, b, agreed)
    return [one.gradients[0] for one in watched], done


@pytest.mark.parametrize("alignment", ["distance", "inner-product"])
@pytest.mark.parametrize(("kind_a", "kind_b"), PAIRS)
def test_all_protocols_find_the_same_gradient_and_the_encrypted_ones_bit_for_bit(kind_a, kind_b, alignment):
    found = {
        protocol: gradients(kind_a, kind_b, replace(AGREED, protocol=protocol, alignment=alignment))
        for protocol in PROTOCOLS
    }
    (plain, clear), (paillier, encrypted), (sharing, shared) = found.values()
    for at in range(2):
        assert furthest(plain[at], paillier[at]) < 1e-6
        assert same(paillier[at], sharing[at])
        assert max(float(one.abs().max()) for one in plain[at].values()) > 1e-2  # so that 1e-6 says something
    assert encrypted.ends.a.losses == shared.ends.a.losses
    assert clear.ends.a.losses == pytest.approx(shared.ends.a.losses, abs=1e-6)
    for other in (encrypted, shared):
        assert torch.equal(clear.ends.b.predicted, other.ends.b.predicted)
    assert len(clear.ends.b.predicted) == ASKS
    assert clear.ends.a.predicted is None
    assert clear.ends.b.losses == []


def test_multiplying_in_the_clear_gives_what_autograd_gives_to_thirteen_places():
    """The twin of the encrypted protocols without their rounding: what is left of the difference is float64's."""
    agreed = replace(AGREED, protocol="secret-sharing", iterations=3)  # any but plain multiplies
    found = []
    for ends in ((Clear(), Clear()), None):
        watched = Watched(), Watched()
        a, b = (party(role, "deep", optimizer=one.optimizer) for role, one in zip("ab", watched, strict=True))
        if ends is None:
            transfer(a, b, replace(agreed, protocol="plain"))
        else:
            run_together(a, b, agreed, ends, lambda _: None)
        found.append(watched)
    for multiplied, differentiated in zip(*found, strict=True):
        assert len(multiplied.gradients) == 3
        for one, other in zip(multiplied.gradients, differentiated.gradients, strict=True):
            assert furthest(one, other) < 1e-13


# ---------------------------------------------------------------- over whatever carries the messages


@contextlib.contextmanager
def queues(tmp_path):
    yield pair()


@contextlib.contextmanager
def sealed(tmp_path):
    one, two = pair()
    yield SealedLink(one, True), SealedLink(two, False)


@contextlib.contextmanager
def sockets(tmp_path):
    yield [SocketLink(one, timeout_s=20) for one in socket.socketpair()]


@contextlib.contextmanager
def tls(tmp_path):
    """TLS 1.3 over two sockets of the loopback interface, with a certificate made here."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    made += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run([str(one) for one in made], check=True, capture_output=True)
    serves = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serves.load_cert_chain(cert, key)
    asks = ssl.create_default_context(cafile=str(cert))
    with socket.create_server(("127.0.0.1", 0)) as waiting:
        raw = socket.create_connection(waiting.getsockname())
        accepted, _ = waiting.accept()
    # neither side waits for the other before its first message: the handshakes are made by the parties' own threads
    one = asks.wrap_socket(raw, server_hostname="localhost", do_handshake_on_connect=False)
    two = serves.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
    yield SocketLink(one, timeout_s=20), SocketLink(two, timeout_s=20)


@contextlib.contextmanager
def flower(tmp_path):
    with in_process() as ends:
        yield ends


@pytest.fixture(scope="module")
def expected():
    """Nets after four steps by secret sharing over queues."""
    return transfer(party("a", "mlp"), party("b", "linear"), replace(AGREED, protocol="secret-sharing", iterations=4))


@pytest.mark.parametrize("carrier", [queues, sealed, sockets, tls, flower])
@pytest.mark.parametrize("protocol", ["paillier", "secret-sharing"])
def test_several_steps_over_any_link_end_in_the_same_nets_bit_for_bit(protocol, carrier, expected, tmp_path):
    agreed = replace(AGREED, protocol=protocol, iterations=4)
    a, b = party("a", "mlp"), party("b", "linear")
    with carrier(tmp_path) as links:
        done = transfer(a, b, agreed, links=tuple(links))
    for found, before, wanted in zip(done.nets, (a, b), expected.nets, strict=True):
        assert same(found, wanted)
        assert furthest(found, before.params) > 1e-3
    assert torch.equal(done.ends.b.predicted, expected.ends.b.predicted)
    assert done.ends.a.losses == expected.ends.a.losses


def test_processes_that_calculate_change_nothing(expected, monkeypatch):
    monkeypatch.setattr(protocols, "workers", lambda: 2)
    agreed = replace(AGREED, protocol="paillier", iterations=4)
    with protocols.multiplications(agreed) as ends:
        done = run_together(party("a", "mlp"), party("b", "linear"), agreed, ends, lambda _: None)
    assert same(done.a.params, expected.nets[0])
    assert same(done.b.params, expected.nets[1])


def test_triples_that_the_parties_make_themselves_give_the_same_nets(expected):
    agreed = replace(AGREED, protocol="secret-sharing", iterations=4, triples="paillier")
    done = transfer(party("a", "mlp"), party("b", "linear"), agreed)
    assert done.counted[0]["triples"] == expected.counted[0]["triples"] > 0
    assert same(done.nets[0], expected.nets[0])
    assert same(done.nets[1], expected.nets[1])
    assert torch.equal(done.ends.b.predicted, expected.ends.b.predicted)


@pytest.mark.slow
def test_keys_as_they_are_used_give_the_same_nets(expected):
    done = transfer(
        party("a", "mlp"), party("b", "linear"), replace(AGREED, protocol="paillier", iterations=4, key_bits=2048)
    )
    assert same(done.nets[0], expected.nets[0])
    assert same(done.nets[1], expected.nets[1])


# ---------------------------------------------------------------- how many ciphertexts


def by_hand(role, *, n, d, head, body, slots):
    """Ciphertexts that a party is sent and that it sends back, an iteration."""
    groups = math.ceil(d / slots)
    if head and not body:  # whole rows: d of the matrix of the labels' part, then one row a person
        secrets = (d + n) * groups
        answers = head * groups if groups > 1 else math.ceil(head / (slots // d))
        if role == "a":
            secrets += d * (d + 1) // 2 + 1  # single entries of a symmetric matrix, and B's own part of the loss
            answers += 1
        return secrets, answers
    secrets = d * (d + n) + (d if role == "a" else 0)
    answers = math.ceil(d * head / slots) + math.ceil(body / slots) + (role == "a")
    return secrets, answers


@pytest.mark.parametrize(("bits", "slots"), [(1024, 15), (2048, 31), (3072, 47)])
@pytest.mark.parametrize("role", ["a", "b"])
@pytest.mark.parametrize(("head", "body"), [(16, 0), (33, 512), (0, 40), (1, 1)])
def test_the_number_of_ciphertexts_is_that_of_the_formula(role, head, body, bits, slots):
    for n, d in ((200, 16), (12, 5), (40, 31), (40, 32), (1, 1), (7, 100)):
        plan = terms.plan(role, n, d, head, body)
        assert ciphertexts_of(plan, bits) == by_hand(role, n=n, d=d, head=head, body=body, slots=slots)


@pytest.mark.parametrize(("kind", "hidden"), [("linear", 5), ("linear", 17), ("mlp", 5), ("head only", 16)])
def test_so_many_are_sent_and_counted_and_each_has_four_times_the_bits_of_a_byte(kind, hidden):
    """Two iterations, and a prediction: B sends the hidden values of 9 rows, A their masked scores."""
    times, size, slots = 2, 1024 // 4, 15
    agreed = replace(AGREED, protocol="paillier", hidden=hidden, iterations=times)
    a, b = (party(role, kind, hidden=hidden) for role in "ab")
    sizes = {}
    for role, one in (("a", a), ("b", b)):
        head = one.params[one.net.head_names[0]].shape[1] + 1
        body = sum(one.params[name].numel() for name in one.net.body_names(one.params))
        sizes[role] = by_hand(role, n=PEOPLE, d=hidden, head=head, body=body, slots=slots)
    done = transfer(a, b, agreed)
    asked = hidden * math.ceil(ASKS / slots)
    secrets_of = {"a": times * sizes["b"][0], "b": times * sizes["a"][0] + asked}
    masked_by = {"a": times * sizes["a"][1] + math.ceil(ASKS / slots), "b": times * sizes["b"][1]}
    for at, (role, other) in enumerate(["ab", "ba"]):
        counted = done.counted[at]["ciphertexts"]
        assert counted == {"secrets": secrets_of[role], "masked": masked_by[role]}
        sent = {what: sum(map(len, done.heard[at].of("sent", what))) for what in ("secrets", "masked", "opened")}
        assert sent["secrets"] == size * secrets_of[role]
        assert sent["masked"] == size * masked_by[role]
        assert sent["opened"] == size // 2 * masked_by[other]
        for what in ("secrets", "masked", "opened"):  # with 24 bytes of a header each
            messages = done.heard[at].of("sent", what)
            assert done.ends[2 + at][what] == sum(map(len, messages)) + 24 * len(messages)


def test_the_headline_number_of_the_shipped_config():
    """200 people, 16 hidden values, a linear net, 2048 bits: 353 ciphertexts to A, 216 to B."""
    a, b = (ciphertexts_of(terms.plan(role, 200, 16, 16, 0), 2048) for role in "ab")
    assert (a[0], b[0]) == (216 + 137, 216)


def test_an_end_says_what_it_counted():
    for protocol, keys in (("plain", set()), ("paillier", {"ciphertexts", "seconds"})):
        with multiplications(replace(AGREED, protocol=protocol)) as ends:
            assert set(ends[0].describe()) == keys
    done = transfer(party("a"), party("b"), replace(AGREED, protocol="secret-sharing", iterations=3))
    assert done.counted[0]["triples"] == done.counted[1]["triples"] == 3 * 3 + 1  # two of A's, one of B's; scores
