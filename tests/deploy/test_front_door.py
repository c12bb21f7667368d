"""The front door from outside: what it passes, what it refuses, and what it says about it."""

import datetime
import json
import os
import socket
import ssl
import threading
import time
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedsim.deploy import front_door as fd
from fedsim.deploy.address import Address
from fedsim.deploy.authority import make
from fedsim.deploy.certificates import check_key, load_certificate, server_files
from fedsim.deploy.interventions import server as quick
from fedsim.deploy.refusals import LINES, WINDOW_S, Refusals, plain
from fedsim.deploy.superlink_child import running
from fedsim.errors import ConfigError, DataError

HERE = Address("127.0.0.1", 0)
KEY = {"flwr-public-key": "known"}
PULL = "/v1/fleet/pull-messages"


class Fake(ThreadingHTTPServer):
    """A SuperLink that answers as it is told and remembers what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answer, self.waits = [], (200, b"yes", "application/x-protobuf"), 0.0


class Handler(BaseHTTPRequestHandler):
    protocol_version, wbufsize = "HTTP/1.1", 2**16

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, dict(self.headers.items()), body))
        time.sleep(self.server.waits)
        status, content, kind = self.server.answer
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (("content-length", len(content)), ("content-type", kind), ("flwr-note", "n"), ("x", "y")):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def upstream():
    fake = Fake()
    thread = threading.Thread(target=fake.serve_forever, args=(0.02,))
    thread.start()
    fake.url = f"http://127.0.0.1:{fake.server_port}"
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join(5)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs")
    make(folder, ["127.0.0.1"], 2)
    return folder


@pytest.fixture
def said():
    return []


@pytest.fixture
def door(upstream, certs, said):
    with fd.front_door(HERE, upstream.url, server_files(certs), said.append, known={b"known"}) as door:
        yield door


def trusting(ca):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    return context


@pytest.fixture
def client(door, certs):
    with httpx.Client(base_url=f"https://{door.address}", verify=trusting(certs / "ca.crt"), trust_env=False) as client:
        yield client


def raw(door, certs, data, host="127.0.0.1"):
    """What comes back for these bytes, until the connection ends."""
    with (
        socket.create_connection((host, door.address.port), 5) as plain_socket,
        trusting(certs / "ca.crt").wrap_socket(plain_socket, server_hostname=host) as stream,
    ):
        stream.sendall(data)
        got = b""
        while part := stream.recv(65536):
            got += part
        return got


def line(said, word, wait=3.0):
    """The line with a word in it, once it is there."""
    end = time.monotonic() + wait
    while time.monotonic() < end:
        found = [one for one in said if word in one]
        if found:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no line with {word!r} in {said}")


def test_a_call_of_the_fleet_passes_with_the_headers_that_matter(client, upstream, said):
    headers = {**KEY, "content-type": "application/x-protobuf", "cookie": "c", "x-forwarded-for": "1.2.3.4"}
    for call in fd.CALLS:
        reply = client.post(f"/v1/fleet/{call}", content=b"\x00body", headers=headers)
        assert (reply.status_code, reply.content) == (200, b"yes")
        assert reply.headers["content-type"] == "application/x-protobuf"
        assert reply.headers["flwr-note"] == "n"
        assert "x" not in reply.headers and "server" not in reply.headers
    assert [path for path, _, _ in upstream.asked] == [f"/v1/fleet/{call}" for call in fd.CALLS]
    names = {name.lower() for name in upstream.asked[0][1]}
    assert {"flwr-public-key", "content-type"} <= names
    assert not {"cookie", "x-forwarded-for"} & names
    assert upstream.asked[0][2] == b"\x00body"
    assert said == []


def test_many_calls_share_a_connection_on_both_sides(client, door, upstream):
    for _ in range(5):
        client.post(PULL, headers=KEY)
    assert len(door._open) == 1
    assert len({headers["Host"] for _, headers, _ in upstream.asked}) == 1


PATHS = [
    "/",
    "/health",
    "/docs",
    "/openapi.json",
    "/v1/control/start-run",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "//v1/control/start-run",
    "//v1/fleet/pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages#x",
    "/v1/fleet/pull%2dmessages",
    "/V1/fleet/pull-messages",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "http://127.0.0.1/v1/control/start-run",
    "http://127.0.0.1/v1/fleet/pull-messages",
    "*",
    "pull-messages",
]


@pytest.mark.parametrize("path", PATHS)
def test_every_other_path_is_not_there(path, door, certs, upstream, said):
    request = f"POST {path} HTTP/1.1\r\nhost: x\r\nflwr-public-key: known\r\ncontent-length: 0\r\n\r\n"
    head, _, body = raw(door, certs, request.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404") and body == b""
    assert upstream.asked == []
    word = "without a key" if "register-node" in path and "control" not in path else "no such path"
    assert line(said, word).startswith("refused 127.0.0.1: ")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH"])
def test_only_post_passes(method, client, upstream, said):
    reply = client.request(method, PULL, headers=KEY)
    assert (reply.status_code, reply.content) == (404, b"")
    assert upstream.asked == []
    assert f"{method} {PULL}" in line(said, "not a POST")


def test_without_tls_keyless_nodes_may_register(upstream, said):
    with fd.front_door(HERE, upstream.url, None, said.append) as door:
        reply = httpx.post(f"http://{door.address}/v1/fleet/register-node", content=b"k", trust_env=False)
    assert reply.status_code == 200
    assert [path for path, _, _ in upstream.asked] == ["/v1/fleet/register-node"]


def test_an_unregistered_key_gets_flowers_own_answer_and_no_further(client, upstream, said):
    other = {"flwr-public-key": "other", "flwr-signature": "secret-signature"}
    reply = client.post("/v1/fleet/activate-node", content=b"x", headers=other)
    assert (reply.status_code, reply.json()["code"]) == (412, 2004)
    for headers in (other, {}):
        assert client.post("/v1/fleet/push-object", content=b"x" * 10**6, headers=headers).status_code == 401
    assert upstream.asked == []
    assert "activate-node" in line(said, "not registered")
    assert not any("other" in one or "secret" in one for one in said)


def test_a_key_that_the_superlink_does_not_take(client, upstream, said):
    upstream.answer = 412, json.dumps({"code": 2004, "detail": "no"}).encode(), "application/json"
    reply = client.post("/v1/fleet/activate-node", headers=KEY)
    assert (reply.status_code, reply.json()["code"]) == (412, 2004)
    assert "still seems to be online" in line(said, "activate-node")


@pytest.mark.parametrize(
    ("offset", "words"), [(60, "60 s ahead of"), (-400, "400 s behind"), (0, "signature is not that of the node")]
)
def test_a_wrong_clock_is_told_from_a_wrong_signature(offset, words, client, upstream, said):
    upstream.answer = 401, b'{"detail":"Invalid SuperNode authentication"}', "application/json"
    signed = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=offset)).isoformat()
    assert client.post(PULL, headers={**KEY, "flwr-timestamp": signed, "flwr-signature": "s"}).status_code == 401
    assert words in line(said, "refused")
    assert signed not in said[0]


@pytest.mark.parametrize("signed", ["", "yesterday", "2020-01-01T00:00:00", "\u00e9"])
def test_a_time_that_is_none_is_a_wrong_signature(signed, client, upstream, said):
    upstream.answer = 401, b"{}", "application/json"
    client.post(PULL, headers={**KEY, "flwr-timestamp": signed.encode("latin-1")})
    line(said, "signature is not that of the node")


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not(client, upstream, said, monkeypatch):
    monkeypatch.setattr(fd, "BODY_BYTES", 100_000)
    assert client.post(PULL, content=b"x" * 100_000, headers=KEY).status_code == 200
    assert client.post(PULL, content=b"x" * 100_001, headers=KEY).status_code == 413
    assert "100001" in line(said, "above the limit")
    assert client.post(PULL, content=iter([b"x" * 50_000] * 2), headers=KEY).status_code == 200
    assert client.post(PULL, content=iter([b"x" * 50_000] * 3), headers=KEY).status_code == 413
    assert [len(body) for _, _, body in upstream.asked] == [100_000, 100_000]


def test_the_limit_leaves_room_for_flowers_largest_chunk():
    from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK

    assert 2 * CHUNK < fd.BODY_BYTES <= 2**24


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(fd, "LINGER_S", 0.05)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /" + b"a" * 100_000,
        b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\nflwr-public-key: known\r\n"
        b"transfer-encoding: chunked\r\n\r\nnot a chunk\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_and_ended(data, door, certs, upstream, said):
    assert raw(door, certs, data)[9:12] in (b"400", b"431")
    assert upstream.asked == []
    assert all(one.isascii() and one.isprintable() for one in said)
    line(said, "not HTTP")


def test_a_client_that_wants_leave_to_send_gets_it(door, certs, upstream):
    head = (
        "host: x\r\nflwr-public-key: known\r\nexpect: 100-continue\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    )
    got = raw(door, certs, f"POST {PULL} HTTP/1.1\r\n{head}".encode())
    assert got.startswith(b"HTTP/1.1 100") and b"HTTP/1.1 200" in got
    assert upstream.asked[0][2] == b"ok"


def test_a_body_that_comes_too_slowly_is_not_waited_for(door, certs, said, monkeypatch):
    monkeypatch.setattr(fd, "TRANSFER_S", 0.1)
    monkeypatch.setattr(fd, "LINGER_S", 0.1)
    head = f"POST {PULL} HTTP/1.1\r\nhost: x\r\nflwr-public-key: known\r\ncontent-length: 9\r\n\r\nslow"
    assert raw(door, certs, head.encode()).startswith(b"HTTP/1.1 408")
    line(said, "too slowly")


def test_one_who_says_nothing_is_not_waited_for(door, certs, monkeypatch):
    monkeypatch.setattr(fd, "FIRST_S", 0.1)
    assert raw(door, certs, b"") == b""
    assert raw(door, certs, b"POST /v1") == b""


def test_connections_are_bounded(door, said, monkeypatch):
    monkeypatch.setattr(fd, "PER_ADDRESS", 3)
    sockets = [socket.create_connection(("127.0.0.1", door.address.port), 5) for _ in range(4)]
    try:
        line(said, "too many connections")
        assert len(door._open) == 3
    finally:
        for one in sockets:
            one.close()


def test_an_upstream_that_is_away_is_503_and_one_that_breaks_off_502(client, upstream, said, door):
    upstream.answer = 0, b"", ""
    assert client.post(PULL, headers=KEY).status_code == 502
    assert len(upstream.asked) == 1  # never again by itself
    upstream.shutdown()
    upstream.server_close()
    assert client.post(PULL, headers=KEY).status_code == 503
    line(said, "SuperLink is away")
    door.check()


def test_an_upstream_that_hangs_is_504(certs, upstream, said, monkeypatch):
    monkeypatch.setattr(fd, "UPSTREAM", httpx.Timeout(0.2))
    upstream.waits = 0.5
    with (
        fd.front_door(HERE, upstream.url, server_files(certs), said.append) as door,
        httpx.Client(base_url=f"https://{door.address}", verify=trusting(certs / "ca.crt"), trust_env=False) as client,
    ):
        assert client.post(PULL).status_code == 504
    assert len(upstream.asked) == 1


def test_a_redirect_is_handed_on_and_not_followed(client, upstream):
    upstream.answer = 307, b"", "text/plain"
    assert client.post(PULL, headers=KEY).status_code == 307
    assert len(upstream.asked) == 1


def test_an_unknown_authority_is_refused_by_the_client_and_said_here(door, tmp_path, said):
    make(tmp_path, ["127.0.0.1"], 1)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(f"https://{door.address}{PULL}", verify=trusting(tmp_path / "ca.crt"), trust_env=False)
    assert "ca.crt" in line(said, "does not know the CA")


def test_another_name_than_the_certificates_is_said(door, certs, said):
    with (
        socket.create_connection(("127.0.0.1", door.address.port), 5) as plain_socket,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        trusting(certs / "ca.crt").wrap_socket(plain_socket, server_hostname="other.example.org")
    line(said, "a name that is not in it")


def test_plain_http_is_said(door, said, upstream):
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://{door.address}{PULL}", trust_env=False)
    assert "--insecure" in line(said, "plain HTTP")
    assert upstream.asked == []


def test_a_connection_that_ends_in_the_handshake_is_said(door, said):
    socket.create_connection(("127.0.0.1", door.address.port)).close()
    line(said, "during the handshake")


def test_an_expired_certificate_is_refused_by_the_client_and_said_here(certs, tmp_path, upstream, said):
    files = server_files(certs)
    certificate, signer = load_certificate(files.certificate), check_key(certs / "ca.key", load_certificate(files.ca))
    before = certificate.not_valid_before_utc - datetime.timedelta(days=10)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificate.subject)
        .issuer_name(certificate.issuer)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(before)
        .not_valid_after(before + datetime.timedelta(days=1))
    )
    for one in certificate.extensions:
        builder = builder.add_extension(one.value, one.critical)
    pem = serialization.Encoding.PEM
    (tmp_path / "server.crt").write_bytes(builder.sign(signer, hashes.SHA384()).public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.key").write_bytes(private)
    old = type(files)(files.ca, tmp_path / "server.crt", tmp_path / "server.key", files.clients)
    with fd.front_door(HERE, upstream.url, old, said.append) as door:
        with pytest.raises(httpx.ConnectError, match="expired"):
            httpx.post(f"https://{door.address}{PULL}", verify=trusting(certs / "ca.crt"), trust_env=False)
        line(said, "certificate expired")


def test_a_key_of_another_certificate_cannot_be_used(certs, tmp_path, upstream):
    make(tmp_path, ["127.0.0.1"], 1)
    files = server_files(certs)
    mixed = type(files)(files.ca, files.certificate, tmp_path / "server.key", files.clients)
    with pytest.raises(DataError, match=r"server\.key"), fd.front_door(HERE, upstream.url, mixed, print):
        pass


def test_a_port_in_use_is_a_mistake_of_the_command_line(door, upstream):
    with (
        pytest.raises(ConfigError, match=rf"--listen: .*{door.address.port}.*in use"),
        fd.front_door(door.address, upstream.url, None, print),
    ):
        pass


def test_an_address_of_another_machine_cannot_be_listened_on(upstream):
    with (
        pytest.raises(ConfigError, match=r"--listen: .*does not have the address"),
        fd.front_door(Address("192.0.2.1", 0), upstream.url, None, print),
    ):
        pass


@pytest.mark.parametrize(
    ("host", "asked"), [("::1", "[::1]"), ("::", "[::1]"), ("::", "127.0.0.1"), ("0.0.0.0", "127.0.0.1")]
)
def test_both_kinds_of_addresses(host, asked, upstream, said):
    with fd.front_door(Address(host, 0), upstream.url, None, said.append) as door:
        assert door.address.port > 0
        assert httpx.post(f"http://{asked}:{door.address.port}{PULL}", trust_env=False).status_code == 200
        httpx.get(f"http://{asked}:{door.address.port}{PULL}", trust_env=False)
        assert line(said, "not a POST").startswith(f"refused {asked.strip('[]')}: ")


def test_closing_is_quick_with_open_connections(upstream, certs, said):
    upstream.waits = 3.0
    with fd.front_door(HERE, upstream.url, server_files(certs), said.append) as door:
        idle = socket.create_connection(("127.0.0.1", door.address.port))
        context = trusting(certs / "ca.crt")

        def ask():
            with pytest.raises(httpx.TransportError):
                httpx.post(f"https://{door.address}{PULL}", verify=context, trust_env=False)

        busy = threading.Thread(target=ask)
        busy.start()
        while len(door._open) < 2 or not upstream.asked:
            time.sleep(0.01)
        began = time.monotonic()
    took = time.monotonic() - began
    assert took < 2
    busy.join(5)
    idle.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", door.address.port))


def test_of_many_refusals_few_lines_are_left():
    said, now = [], [0.0]
    refusals = Refusals(said.append, lambda: now[0])
    for k in range(1000):
        refusals.note("10.0.0.1", "no such path", f"/{k}")
    assert said == ["refused 10.0.0.1: no such path (/0)"]
    for k in range(1000):
        refusals.note(f"10.0.1.{k}", "no such path")
    assert len(said) == LINES
    now[0] = WINDOW_S + 1
    refusals.tick()
    assert said[LINES:] == [
        "refused 10.0.0.1: no such path, 999 more times",
        f"refused {1000 - LINES + 1} more requests, of other addresses or for other reasons",
    ]
    refusals.note("10.0.0.1", "no such path")
    assert said[-1] == "refused 10.0.0.1: no such path"
    now[0] = 3 * WINDOW_S
    refusals.tick()
    assert len(said) == LINES + 3


def test_what_a_stranger_writes_cannot_act_on_a_terminal():
    assert plain("a\x1b[2J\r\nb\u202e") == r"a\x1b[2J\r\nb\u202e"
    assert len(plain("\x00" * 1000)) <= 83


# ---- before Flower's own SuperLink


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with running(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("log") / "log", {}, "process") as child:
        yield child


@pytest.mark.slow
def test_a_real_superlink_behind_the_door(real, certs, said):
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PullMessagesRequest
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.node_pb2 import Node

    files = server_files(certs)
    nodes = quick.register(real.address, {0: files.clients[0]})
    key = serialization.load_ssh_private_key((certs / "client-0" / "client.key").read_bytes(), None)
    name = quick.header(files.clients[0])

    def signed(seconds=0.0, key=key, name=name):
        at = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).isoformat()
        signature = b64encode(key.sign(at.encode(), ec.ECDSA(hashes.SHA256()))).decode()
        kinds = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
        return {**kinds, "flwr-public-key": name, "flwr-timestamp": at, "flwr-signature": signature}

    activate = ActivateNodeRequest(public_key=quick._pem(files.clients[0]), heartbeat_interval=10).SerializeToString()
    pull = PullMessagesRequest(node=Node(node_id=nodes[0])).SerializeToString()
    with (
        fd.front_door(HERE, f"http://{real.address}", files, said.append, known={name}) as door,
        httpx.Client(base_url=f"https://{door.address}", verify=trusting(certs / "ca.crt"), trust_env=False) as client,
    ):

        def post(call, body, headers):
            said.clear()
            door.refusals.ends = float("-inf")
            door.refusals.more.clear()
            return client.post(f"/v1/fleet/{call}", content=body, headers=headers)

        reply = post("activate-node", activate, signed())
        assert reply.status_code == 200
        found = ActivateNodeResponse()
        found.ParseFromString(reply.content)
        assert found.node_id == nodes[0]
        assert post("pull-messages", pull, signed()).status_code == 200
        assert post("pull-messages", pull, signed(4)).status_code == 200
        assert post("pull-messages", pull, signed(7)).status_code == 401
        assert "7 s ahead" in line(said, "clock")
        assert post("pull-messages", pull, signed(-308)).status_code == 401
        assert "308 s behind" in line(said, "clock")
        assert post("pull-messages", pull, signed(key=ec.generate_private_key(ec.SECP384R1()))).status_code == 401
        line(said, "signature is not that of the node")
        another = PullMessagesRequest(node=Node(node_id=nodes[0] + 1)).SerializeToString()
        assert post("pull-messages", another, signed()).status_code == 401
        reply = post("activate-node", activate, signed())
        assert (reply.status_code, reply.json()["code"]) == (412, 2004)
        line(said, "still seems to be online")
        beat = SendNodeHeartbeatRequest(node=Node(node_id=nodes[0]), heartbeat_interval=5).SerializeToString()
        assert post("send-node-heartbeat", beat, signed()).status_code == 400
        line(said, "answers 400")
        assert post("pull-messages", b"\xff\xff", signed()).status_code == 400
        for path in PATHS[:7]:
            assert client.post(path, headers=signed()).status_code == 404


@pytest.mark.slow
def test_the_doors_answer_to_an_unregistered_key_is_the_superlinks(real, certs, said):
    from flwr.proto.fleet_pb2 import ActivateNodeRequest

    files = server_files(certs)
    body = ActivateNodeRequest(public_key=quick._pem(files.clients[1]), heartbeat_interval=10).SerializeToString()
    key = serialization.load_ssh_private_key((certs / "client-1" / "client.key").read_bytes(), None)
    at = datetime.datetime.now(datetime.UTC).isoformat()
    headers = {
        "content-type": PROTOBUF_MEDIA_TYPE,
        "flwr-public-key": quick.header(files.clients[1]),
        "flwr-timestamp": at,
        "flwr-signature": b64encode(key.sign(at.encode(), ec.ECDSA(hashes.SHA256()))).decode(),
    }
    own = httpx.post(f"http://{real.address}/v1/fleet/activate-node", content=body, headers=headers, trust_env=False)
    with fd.front_door(HERE, f"http://{real.address}", files, said.append, known={b"another"}) as door:
        url = f"https://{door.address}/v1/fleet/activate-node"
        doors = httpx.post(url, content=body, headers=headers, verify=trusting(certs / "ca.crt"), trust_env=False)
    assert (doors.status_code, doors.json()) == (own.status_code, own.json())
    assert os.environ.get("FLWR_HOME") is None
