"""Two parties over real sockets with real certificates: the right one gets in, whoever else comes is refused."""

import contextlib
import socket
import ssl
import threading
import time

import pytest

from fedsim.deploy import authority, parties
from fedsim.deploy.address import Address
from fedsim.deploy.listening import listeners
from fedsim.deploy.party_certificates import PartyFiles, party_files, write_party_certificates
from fedsim.errors import ConfigError, DataError, TransferError
from fedsim.transfer import frames
from fedsim.transfer.channel import Channel

HERE = Address("127.0.0.1", 0)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs")
    authority.make(folder, ["localhost"], 1)
    write_party_certificates(folder)
    return folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stranger")
    write_party_certificates(folder)
    return folder


class Listening:
    """Party a, listening in a thread."""

    def __init__(self, files, **more):
        self.said, self.link, self.error = [], None, None
        self.sockets = listeners(HERE)
        self.address = Address("127.0.0.1", self.sockets[0].getsockname()[1])
        options = {"role": "a", "peer": "b", "say": self.said.append, "wait_s": 20, "timeout_s": 5} | more
        self.thread = threading.Thread(target=self._listen, args=(files, options), daemon=True)
        self.thread.start()

    def _listen(self, files, options):
        try:
            self.link = parties.listen(self.address, files, sockets=self.sockets, **options)
        except Exception as error:
            self.error = error

    def entered(self):
        """The link, once the right party is there."""
        self.thread.join(20)
        assert self.error is None and self.link is not None, self.error
        return self.link

    def refused(self):
        """The first line about somebody refused."""
        for _ in range(400):
            found = [line for line in self.said if line.startswith("refused")]
            if found:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(self.said)

    def close(self):
        for one in self.sockets:
            one.close()
        if self.link:
            self.link.close()


@pytest.fixture
def listen():
    open_ones = []

    def start(files, **more):
        open_ones.append(Listening(files, **more))
        return open_ones[-1]

    yield start
    for one in open_ones:
        one.close()


def connect(address, files, *, role="b", peer="a", wait_s=5.0, say=lambda line: None):
    return parties.connect(address, files, role=role, peer=peer, say=say, wait_s=wait_s, timeout_s=5)


def converse(link, other):
    """Both ways, with a message that is larger than any buffer."""
    one, two = Channel(link, "party b", timeout_s=5), Channel(other, "party a", timeout_s=5)
    payload = bytes(range(256)) * 2**13
    sender = threading.Thread(target=lambda: one.send("secrets", payload), daemon=True)
    sender.start()
    assert two.receive("secrets") == payload
    sender.join(5)
    two.send("loss", b"1")
    assert one.receive("loss") == b"1"
    one.close()
    with pytest.raises(TransferError, match="party a: the peer is gone"):
        two.receive("loss")
    two.close()


def the_right_one_still_gets_in(listening, files):
    assert listening.thread.is_alive()
    link = connect(listening.address, files)
    converse(listening.entered(), link)


# ---------------------------------------------------------------- the right ones


def test_two_parties_talk_over_tls_1_3(certs, listen):
    listening = listen(party_files(certs, "a"))
    link = connect(listening.address, party_files(certs, "b"))
    other = listening.entered()
    assert link._socket.version() == other._socket.version() == "TLSv1.3"
    assert listening.said == [f"listening on {listening.address} for party b"]
    converse(other, link)


def test_what_crosses_is_encrypted(certs, listen):
    """A relay between them sees nothing of a message."""
    listening = listen(party_files(certs, "a"))
    seen = bytearray()
    (door,) = listeners(HERE)
    door.setblocking(True)

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while piece := source.recv(2**16):
                seen.extend(piece)
                sink.sendall(piece)

    def relay():
        near, _ = door.accept()
        far = socket.create_connection(("127.0.0.1", listening.address.port))
        for ends in ((near, far), (far, near)):
            threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=relay, daemon=True).start()
    link = connect(Address("127.0.0.1", door.getsockname()[1]), party_files(certs, "b"))
    one, two = Channel(link, "a", timeout_s=5), Channel(listening.entered(), "b", timeout_s=5)
    one.send("secrets", b"a very plain text" * 10)
    assert two.receive("secrets").startswith(b"a very plain text")
    assert len(seen) > 1000 and b"very plain" not in seen and frames.MAGIC not in seen and b"party-b" not in seen
    one.close()
    door.close()


def test_a_third_party_comes_later_to_the_same_sockets(certs, listen):
    listening = listen(party_files(certs, "a"))
    link = connect(listening.address, party_files(certs, "b"))
    listening.entered()
    listening.thread = threading.Thread(
        target=listening._listen,
        args=(party_files(certs, "a"), {"role": "a", "peer": "helper", "say": listening.said.append, "wait_s": 10}),
        daemon=True,
    )
    first = listening.link
    listening.thread.start()
    helper = connect(listening.address, party_files(certs, "helper"), role="helper")
    converse(listening.entered(), helper)
    converse(first, link)


def test_without_certificates_on_loopback(listen):
    listening = listen(None)
    link = connect(listening.address, None)
    assert listening.said == [f"listening on {listening.address} for party b, without TLS"]
    converse(listening.entered(), link)


def test_it_makes_and_closes_its_own_sockets():
    said, found = [], []
    thread = threading.Thread(
        target=lambda: found.append(parties.listen(HERE, None, role="a", peer="b", say=said.append, wait_s=10)),
        daemon=True,
    )
    thread.start()
    while not said:
        time.sleep(0.01)
    address = Address.parse(said[0].split()[2], "--listen")
    link = connect(address, None)
    thread.join(10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.host, address.port), timeout=2)
    converse(found[0], link)


def test_who_connects_first_waits(certs):
    with socket.create_server(("127.0.0.1", 0)) as one:
        address = Address("127.0.0.1", one.getsockname()[1])
    said, found = [], []
    thread = threading.Thread(
        target=lambda: found.append(connect(address, party_files(certs, "b"), wait_s=15, say=said.append)), daemon=True
    )
    thread.start()
    while not said:
        time.sleep(0.01)
    link = parties.listen(address, party_files(certs, "a"), role="a", peer="b", say=lambda line: None, wait_s=15)
    thread.join(10)
    assert said == [f"waiting for party a at {address}: connection refused"]
    converse(link, found[0])


# ---------------------------------------------------------------- nobody, and the wrong ones


def test_nobody_comes():
    with pytest.raises(TransferError, match=r"party b did not connect within 0\.1 s"):
        parties.listen(HERE, None, role="a", peer="b", say=lambda line: None, wait_s=0.1)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    with pytest.raises(TransferError, match=rf"party a at 127\.0\.0\.1:{port}: connection refused, for 0\.2 s"):
        connect(Address("127.0.0.1", port), None, wait_s=0.2)


def test_without_certificates_other_machines_are_refused():
    say = {"say": lambda line: None, "wait_s": 1}
    for host in ("0.0.0.0", "192.0.2.1", "example.org"):
        with pytest.raises(
            ConfigError, match="--listen: without certificates a party may listen on a loopback address"
        ):
            parties.listen(Address(host, 0), None, role="a", peer="b", **say)
        with pytest.raises(
            ConfigError, match=rf"--connect: without .* got {host}:9; certificates come from fedsim certs"
        ):
            parties.connect(Address(host, 9), None, role="b", peer="a", **say)


CASES = {
    "another authority": ("stranger", "b", "certificate is not accepted here", "does not know the authority"),
    "the role of the listener": ("certs", "a", "party-b is expected here, not one for party-a", "party-b is expected"),
    "the role of the helper": ("certs", "helper", "not one for party-helper", "party-b is expected here"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_certificate_is_refused_on_both_sides_and_listening_goes_on(case, certs, stranger, listen):
    whose, role, here, there = CASES[case]
    folder = {"certs": certs, "stranger": stranger}[whose]
    files = party_files(folder, role)
    files = PartyFiles(certs / "ca.crt", files.certificate, files.key)
    listening = listen(party_files(certs, "a"))
    with pytest.raises(TransferError, match=rf"party a at 127\.0\.0\.1:[0-9]+: .*{there}"):
        connect(listening.address, files, role="b")
    assert here in listening.refused() and listening.refused().startswith("refused 127.0.0.1: ")
    the_right_one_still_gets_in(listening, party_files(certs, "b"))


def test_a_listener_of_another_authority_is_refused_on_both_sides(certs, stranger, listen):
    listening = listen(party_files(stranger, "a"))
    with pytest.raises(
        TransferError, match=r"certificate is not accepted here .*must come from one fedsim certs --parties"
    ):
        connect(listening.address, party_files(certs, "b"))
    assert "does not know the authority" in listening.refused()


def test_a_listener_of_another_role_is_refused_on_both_sides(certs, listen):
    listening = listen(party_files(certs, "helper"), role="helper")
    with pytest.raises(TransferError, match="a certificate for party-a is expected here, not one for party-helper"):
        connect(listening.address, party_files(certs, "b"))
    assert "it stopped: a certificate for party-a is expected here" in listening.refused()


def test_the_federations_server_is_no_party(certs, listen):
    files = PartyFiles(certs / "ca.crt", certs / "server.crt", certs / "server.key")
    listening = listen(party_files(certs, "a"))
    with pytest.raises(TransferError, match="does not accept this party's certificate"):
        connect(listening.address, files)
    assert "unsuitable certificate purpose" in listening.refused()


def test_two_parties_of_one_role_find_out_without_certificates(listen):
    listening = listen(None)
    with pytest.raises(TransferError, match="it stopped: party b is expected here, not party a"):
        connect(listening.address, None, role="a", peer="b")
    assert listening.refused() == "refused 127.0.0.1: party b is expected here, not party a"
    the_right_one_still_gets_in(listening, None)


def test_one_with_certificates_and_one_without(certs, listen):
    with_tls, without = listen(party_files(certs, "a")), listen(None)
    with pytest.raises(TransferError, match="do both have certificates, or neither"):
        connect(with_tls.address, None)
    assert "speaks no TLS" in with_tls.refused()
    with pytest.raises(TransferError, match="was it started without certificates"):
        connect(without.address, party_files(certs, "b"))
    assert "not a fedsim party" in without.refused()
    the_right_one_still_gets_in(with_tls, party_files(certs, "b"))
    the_right_one_still_gets_in(without, None)


def test_a_certificate_is_wanted_and_old_tls_is_not(certs, listen):
    listening = listen(party_files(certs, "a"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certs / "ca.crt")
    with socket.create_connection(("127.0.0.1", listening.address.port)) as plain:
        one = context.wrap_socket(plain)
        with pytest.raises(OSError), one:
            one.recv(1)
            one.recv(1)
    assert "it has no certificate" in listening.refused()
    context.load_cert_chain(certs / "party-b" / "party.crt", certs / "party-b" / "party.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", listening.address.port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)
    the_right_one_still_gets_in(listening, party_files(certs, "b"))
    assert any("speaks no TLS 1.3" in line for line in listening.said)


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "binary": bytes(range(256)) * 40,
    "nothing": b"",
    "half a frame": frames.frame("welcome", 0, b'{"role":"b"}')[:30],
    "a promise": frames.header("welcome", 0, 2**30),
    "another kind": frames.frame("loss", 0, b""),
    "another number": frames.frame("welcome", 1, b'{"role":"b"}'),
    "no role": frames.frame("welcome", 0, b"{}"),
    "no facts": frames.frame("welcome", 0, b"[" * 1000),
    "escapes": frames.frame("welcome", 0, b'{"role":"\\u001b[2J\\n"}'),
    "stops": frames.frame("abort", 0, b"\x1b[2J"),
}


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_refused_in_one_printable_line_and_listening_goes_on(what, tls, certs, listen):
    listening = listen(party_files(certs, "a") if tls else None)
    with socket.create_connection(("127.0.0.1", listening.address.port)) as one:
        one.sendall(GARBAGE[what])
        one.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while one.recv(2**16):
                pass
    line = listening.refused()
    assert line.isascii() and line.isprintable()
    the_right_one_still_gets_in(listening, party_files(certs, "b") if tls else None)


def test_who_says_nothing_does_not_stay(certs, listen, monkeypatch):
    monkeypatch.setattr(parties, "HANDSHAKE_S", 0.2)
    for files, mine in ((None, None), (party_files(certs, "a"), party_files(certs, "b"))):
        listening = listen(files)
        with socket.create_connection(("127.0.0.1", listening.address.port)):
            assert listening.refused().endswith("it did not say who it is within 0.2 s")
        monkeypatch.setattr(parties, "HANDSHAKE_S", 10.0)
        the_right_one_still_gets_in(listening, mine)
        monkeypatch.setattr(parties, "HANDSHAKE_S", 0.2)


@pytest.mark.parametrize("what", ["http", "nothing", "half a frame", "no role", "stops"])
def test_a_connecting_party_refuses_garbage_too(what):
    (door,) = listeners(HERE)
    door.setblocking(True)

    def answer():
        one, _ = door.accept()
        one.sendall(GARBAGE[what])
        one.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while one.recv(2**16):
                pass
        one.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(TransferError, match=r"^party a at 127\.0\.0\.1:[0-9]+: ") as caught:
        connect(Address("127.0.0.1", door.getsockname()[1]), None)
    assert str(caught.value).isprintable()
    door.close()


def test_files_that_cannot_be_used(certs, tmp_path):
    (tmp_path / "ca.crt").write_text("rubbish")
    files = PartyFiles(tmp_path / "ca.crt", certs / "party-a" / "party.crt", certs / "party-a" / "party.key")
    with pytest.raises(DataError, match="cannot be used for TLS"):
        parties.listen(HERE, files, role="a", peer="b", say=lambda line: None, wait_s=1)
