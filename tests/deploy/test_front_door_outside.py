"""The front door and the outside world: TLS, addresses, its end, its lines, and Flower's own SuperLink behind it."""

import datetime
import os
import socket
import ssl
import threading
import time
from base64 import b64encode

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from doors import HERE, PATHS, PULL, line, trusting
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedsim.deploy import front_door as fd
from fedsim.deploy.address import Address
from fedsim.deploy.authority import make
from fedsim.deploy.certificates import check_key, load_certificate, server_files
from fedsim.deploy.interventions import server as quick
from fedsim.deploy.refusals import LINES, WINDOW_S, Refusals, plain
from fedsim.deploy.superlink_child import running
from fedsim.errors import ConfigError, DataError


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
