"""What cannot be reached and what is refused, against servers that are wrong in one thing each."""

import contextlib
import datetime
import http.server
import re
import socket
import ssl
import threading
import time
from email.utils import formatdate

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsim.deploy import reaching
from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ClientFiles
from fedsim.deploy.node import Ended
from fedsim.errors import RunError

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def signed(subject, public, issuer, key, dates, *extensions):
    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name(issuer)).public_key(public)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(dates[0]).not_valid_after(dates[1])
    for extension in extensions:
        builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def authority():
    key = ec.generate_private_key(ec.SECP256R1())
    ca = signed("ca", key.public_key(), "ca", key, (NOW - DAY, NOW + DAY), x509.BasicConstraints(True, None))
    return key, ca


@pytest.fixture
def files(authority, tmp_path):
    (tmp_path / "ca.crt").write_bytes(authority[1])
    return ClientFiles(tmp_path / "ca.crt", tmp_path / "client.key", tmp_path / "client.pub", tmp_path)


class Handler(http.server.BaseHTTPRequestHandler):
    ahead = 0.0

    def do_GET(self):
        self.send_error(404)

    def date_time_string(self, timestamp=None):
        return formatdate(time.time() + self.ahead, usegmt=True)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(context=None, ahead=0.0):
    handler = type("Ahead", (Handler,), {"ahead": ahead})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Address("localhost", server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def tls(authority, tmp_path, *, first=NOW - DAY, last=NOW + DAY, host="localhost", by=None):
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([x509.DNSName(host)])
    pem = signed("server", key.public_key(), "ca", by or authority[0], (first, last), names)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "server.pem").write_bytes(private + pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    return context


def test_a_server_of_ones_own_answers(authority, files, tmp_path):
    with serving(tls(authority, tmp_path)) as server:
        assert reaching.reach(server, files) is None


def test_a_plain_server_answers_a_client_without_files():
    with serving() as server:
        assert reaching.reach(server, None) is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"last": NOW - DAY / 2}, "has expired"),
        ({"first": NOW + DAY / 2}, "is not valid yet: this machine's clock"),
        ({"host": "other.example"}, "is not for the name localhost"),
        ({"by": ec.generate_private_key(ec.SECP256R1())}, "is not signed by .*ca.crt"),
    ],
)
def test_a_wrong_certificate_is_not_waited_for(authority, files, tmp_path, wrong, message):
    with serving(tls(authority, tmp_path, **wrong)) as server, pytest.raises(RunError, match=message) as caught:
        reaching.reach(server, files)
    assert str(server) in str(caught.value)


def test_a_plain_server_is_no_server_for_keys(files):
    with serving() as server, pytest.raises(RunError, match="speaks no TLS"):
        reaching.reach(server, files)


def test_it_is_known_whether_a_server_speaks_tls(authority, tmp_path):
    with serving(tls(authority, tmp_path, host="other.example")) as server:
        assert reaching.speaks_tls(server)
    with serving() as server:
        assert not reaching.speaks_tls(server)
    assert not reaching.speaks_tls(server)  # nobody is there


def test_nobody_there_may_change():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert reaching.reach(Address("127.0.0.1", taken.getsockname()[1]), None) == "connection refused"
    assert reaching.reach(Address("no-such-host.invalid", 1), None)


def test_behind_a_proxy_only_flower_can_try(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "near.example")
    assert reaching.reach(Address("far.example", 1), None) is None
    assert reaching.reach(Address("127.0.0.1", 1), None) == "connection refused"


def ended(told="", *, status=1, code=305, online=False):
    return Ended(status, code, told, online)


HERE = Address("localhost", 1)


@pytest.mark.parametrize(
    ("how", "files", "message", "again"),
    [
        (ended(status=-9, code=0), None, "signal 9", True),
        (ended("[code: 2004] Failed"), None, "its key is not registered there", False),
        (ended("[code: 2001] Enabled"), None, "use --certs", False),
        (ended("404 for url 'http://x/v1/fleet/register-node'"), None, "use --certs", False),
        (ended("no idea", code=606), None, "its code 606: no idea", False),
        (ended("ConnectError", online=True), None, "its code 305: ConnectError", True),
        (ended("Traceback", code=0, online=True), None, "status 1: Traceback", True),
        (ended(status=0, code=0, online=True), None, "does not know this node any more", True),
        (ended(status=0, code=0), None, "does not accept this client's signature", False),
    ],
)
def test_an_end_is_explained(how, files, message, again):
    why, may_help = reaching.explained(how, HERE, files)
    assert message in why
    assert may_help is again


@pytest.mark.parametrize(
    ("ahead", "message"),
    [(-8, r"clock is [78] s ahead of that"), (400, r"clock is (399|400) s behind that"), (-2, "sign"), (290, "sign")],
)
def test_a_refused_signature_may_be_the_clocks_mistake(authority, files, tmp_path, ahead, message):
    with serving(tls(authority, tmp_path), ahead=ahead) as server:
        why, again = reaching.explained(ended(status=0, code=0), server, files)
    assert re.search(message, why)
    assert not again
