"""The preflight check, against small servers that are wrong in one thing each, and against the real one."""

import contextlib
import datetime
import http.server
import json
import shutil
import socket
import ssl
import threading
import time
from base64 import b64decode
from email.utils import formatdate

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeRequest,
    DeactivateNodeResponse,
)

from fedsim.config import build
from fedsim.config.load import load
from fedsim.data import partition_files
from fedsim.deploy import authority, certificates, doctor, interventions
from fedsim.deploy.address import Address
from fedsim.deploy.joined import Options
from fedsim.deploy.superlink import superlink
from fedsim.errors import ConfigError

CONFIG = """
data: {dataset: digits, clients: 6, split: {name: dirichlet, alpha: 0.5}}
model: {name: mlp, hidden: [8]}
train: {rounds: 2, batch_size: 32}
"""
NODE = 1234567890123456789


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor") / "certs"
    authority.make(folder, ["localhost"], 2)
    return folder


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path / "config.yaml"


def examined(config, server, certs, *, partition=0, overrides=None, state=None):
    """The findings by name."""
    options = Options(server, certs, partition, state=state or config.parent / "state")
    return {one.name: one for one in doctor.examine(config, overrides or {}, options)}


def states(found):
    return {name: one.state for name, one in found.items()}


GOOD = dict.fromkeys(("versions", "config", "data", "disk", "certificates"), "ok")
THERE = {**GOOD, "name": "ok", "connection": "ok"}
NO_TRUST = {"clock": "skipped", "key": "skipped"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as fedsim server does: 404, and to a node with a key in ``keys``, signed just now, what a node asks."""

    ahead = 0.0
    keys: tuple[bytes, ...] = ()
    calls: list[str]

    def do_GET(self):
        self.send_error(404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.calls.append(self.path)
        pem, signature = (b64decode(self.headers[name]) for name in ("flwr-public-key", "flwr-signature"))
        key, stamp = serialization.load_pem_public_key(pem), self.headers["flwr-timestamp"]
        key.verify(signature, stamp.encode(), ec.ECDSA(hashes.SHA256()))
        assert abs(time.time() - datetime.datetime.fromisoformat(stamp).timestamp()) < 60
        if pem not in self.keys:
            return self.answer(412, json.dumps({"code": 2004, "detail": "Failed"}).encode())
        if self.path.endswith("/activate-node"):
            assert ActivateNodeRequest.FromString(body).public_key == pem
            return self.answer(200, ActivateNodeResponse(node_id=NODE).SerializeToString())
        assert DeactivateNodeRequest.FromString(body).node_id == NODE
        return self.answer(200, DeactivateNodeResponse().SerializeToString())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf" if status == 200 else "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp=None):
        return formatdate(time.time() + self.ahead, usegmt=True)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(certs=None, ahead=0.0, clients=(0, 1)):
    """A server with the server's files of a folder; without a folder, without TLS."""
    public = [
        serialization.load_ssh_public_key((certs / f"client-{k}/client.pub").read_bytes()) for k in clients if certs
    ]
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    given = {"ahead": ahead, "keys": tuple(key.public_bytes(*form) for key in public), "calls": []}
    handler = type("Given", (Handler,), given)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None
    if certs is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certs / "server.crt", certs / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Address("localhost", server.server_address[1]), handler.calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_all_is_in_place_and_nothing_is_left(config, made):
    with serving(made) as (server, calls):
        found = examined(config, server, made / "client-1", partition=1)
    assert states(found) == {**THERE, "TLS": "ok", "clock": "ok", "key": "ok"}, found
    assert calls == ["/v1/fleet/activate-node", "/v1/fleet/deactivate-node"]
    assert not any(one.remedy or one.exit_code for one in found.values())
    assert "flwr 1.41" in found["versions"].what and "localhost is" in found["name"].what
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_a_key_that_the_server_does_not_know(config, made):
    with serving(made, clients=(0,)) as (server, calls):
        found = examined(config, server, made, partition=1)["key"]
    assert (found.state, found.exit_code) == ("problem", 3)
    assert found.what == "the key is not registered there, or a client with this key is connected"
    assert "that the server was started with" in found.remedy and calls == ["/v1/fleet/activate-node"]


def changed(folder, first, last, host="localhost"):
    """A folder whose server certificate is good between two times, in days from now, for a host."""
    ca = certificates.load_certificate(folder / "ca.crt")
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    pem = (
        x509.CertificateBuilder(ca.subject, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]))
        .public_key(certificates.load_certificate(folder / "server.crt").public_key())
        .serial_number(3)
        .not_valid_before(now + first * day)
        .not_valid_after(now + last * day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), False)
        .sign(certificates.check_key(folder / "ca.key", ca), hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )
    (folder / "server.crt").write_bytes(pem)


@pytest.mark.parametrize(
    ("dates", "host", "what"),
    [
        ((-2, -1), "localhost", "has expired, or this machine's clock is wrong; renew it with fedsim certs --renew"),
        ((1, 2), "localhost", "is not valid yet: this machine's clock"),
        ((-1, 1), "other.example", "is not for the name localhost; connect by a name that it was made for"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_told_apart(config, made, dates, host, what):
    certs = shutil.copytree(made, config.parent / "certs")
    changed(certs, *dates, host)
    with serving(certs) as (server, calls):
        found = examined(config, server, made)
    assert states(found) == {**THERE, "TLS": "problem", **NO_TRUST} and not calls
    assert what in found["TLS"].what


def test_a_server_of_another_authority(config, made, tmp_path):
    authority.make(tmp_path / "other", ["localhost"], 1)
    with serving(tmp_path / "other", clients=(0,)) as (server, calls):
        found = examined(config, server, made)
    assert states(found) == {**THERE, "TLS": "problem", **NO_TRUST} and not calls
    assert f"is not signed by {made / 'client-0' / 'ca.crt'}" in found["TLS"].what


def test_plain_and_tls_do_not_meet(config, made):
    with serving() as (server, _):
        found = examined(config, server, made)
    assert states(found) == {**THERE, "TLS": "problem", **NO_TRUST}
    assert "speaks no TLS" in found["TLS"].what
    with serving(made) as (server, _):
        found = examined(config, server, None)
    assert states(found) == {**THERE, "certificates": "skipped", "TLS": "problem", **NO_TRUST}
    assert (found["TLS"].remedy, found["TLS"].exit_code) == ("use --certs instead of --insecure", 3)


def test_without_certificates_on_this_machine(config):
    with serving() as (server, _):
        found = examined(config, server, None)
    assert states(found) == {**THERE, "certificates": "skipped", "TLS": "ok", "clock": "ok", "key": "skipped"}
    options = Options(Address("fl.example.org", 1), None, 0)
    with pytest.raises(ConfigError, match=r"loopback address only, got fl\.example\.org:1"):
        next(doctor.examine(config, {}, options))


@pytest.mark.parametrize(
    ("ahead", "state", "what"),
    [
        (-9, "problem", "s ahead of the server"),
        (-3, "ok", "s ahead of the server"),
        (295, "ok", "s behind the server"),
        (315, "problem", "s behind the server"),
    ],
)
def test_the_clock_may_be_five_seconds_ahead_and_five_minutes_behind(config, made, ahead, state, what):
    with serving(made, ahead=ahead) as (server, _):
        found = examined(config, server, made)["clock"]
    assert found.state == state and found.what.endswith(what)
    assert abs(int(found.what.split()[0]) - abs(ahead)) <= 2
    assert ("at most 5 s ahead or 305 s behind" in found.remedy) == (state == "problem")


def test_nobody_there(config, made):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = examined(config, Address("localhost", taken.getsockname()[1]), made)
    assert states(found) == {**THERE, "connection": "problem", "TLS": "skipped", **NO_TRUST}
    assert found["connection"].what.endswith("does not answer: Connection refused")


def test_a_name_that_is_not_known(config, made):
    found = examined(config, Address("nobody.invalid", 1), made)
    rest = {"name": "problem", "connection": "skipped", "TLS": "skipped", **NO_TRUST}
    assert states(found) == {**GOOD, **rest} and "nobody.invalid is not known" in found["name"].what


def test_someone_who_never_answers(config, made, monkeypatch):
    monkeypatch.setattr(doctor.reaching, "CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = examined(config, Address("localhost", silent.getsockname()[1]), made)
    assert states(found) == {**THERE, "TLS": "problem", **NO_TRUST} and "no answer" in found["TLS"].what


def test_behind_a_proxy_nothing_is_asked_directly(config, made, monkeypatch):
    asked = []
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor.socket, "create_connection", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(doctor.reaching, "clock_ahead", lambda *_: 0.0)
    monkeypatch.setattr("fedsim.deploy.interventions.client.registered", lambda *_: "")
    found = examined(config, Address("far.invalid", 1), made)
    proxied = dict.fromkeys(("name", "connection", "TLS"), "skipped")
    assert states(found) == {**GOOD, **proxied, "clock": "ok", "key": "ok"} and not asked


def test_a_config_that_is_wrong(config, made):
    overrides = {"model.hiden": 3, "train.round": 2}
    found = examined(config, Address("nobody.invalid", 1), made, overrides=overrides)
    assert (found["config"].state, found["config"].exit_code, found["data"].state) == ("problem", 2, "skipped")
    assert "model.hiden: unknown key" in found["config"].what and "train.round" in found["config"].what
    assert examined(config.with_name("none.yaml"), Address("nobody.invalid", 1), made)["config"].exit_code == 2


def test_a_part_that_is_not_there(config, made):
    found = examined(config, Address("nobody.invalid", 1), made, partition=1, overrides={"data.clients": 1})
    assert (found["config"].state, found["data"].state, found["data"].exit_code) == ("ok", "problem", 2)
    assert "--partition: must be below data.clients (1), got 1" in found["data"].what


def test_a_client_without_examples_and_data_that_is_not_there(config, made):
    labels = build.federated_data(load(config)).train.labels
    path = config.parent / "parts.npz"
    partition_files.save(partition_files.from_lists([range(len(labels)), []]), labels, path)
    overrides = {"data.clients": 2, "data.split": {"name": "file", "path": str(path)}}
    found = examined(config, Address("nobody.invalid", 1), made, partition=1, overrides=overrides)["data"]
    assert (found.state, found.exit_code) == ("problem", 3), found
    assert "needs at least 1 examples, client 1 has 0" in found.what
    overrides = {"data.dataset": {"name": "npz", "path": "none.npz"}}
    found = examined(config, Address("nobody.invalid", 1), made, overrides=overrides)["data"]
    assert (found.state, found.exit_code) == ("problem", 3) and "none.npz" in found.what


def test_certificates_that_are_not_in_order(config, made, tmp_path):
    certs = shutil.copytree(made / "client-0", tmp_path / "client-0")
    (certs / "client.key").chmod(0o644)
    with serving(made) as (server, calls):
        found = examined(config, server, certs)
    rest = {"certificates": "problem", "TLS": "skipped", **NO_TRUST}
    assert states(found) == {**THERE, **rest} and not calls
    assert "must not be readable by others" in found["certificates"].what


def test_a_disk_that_is_full_and_one_that_cannot_be_written(config, made, monkeypatch, tmp_path):
    server = Address("nobody.invalid", 1)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    found = examined(config, server, made)["disk"]
    assert found.state == "problem" and "0.1 GB needed" in found.what and "--state" in found.remedy
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    found = examined(config, server, made, state=tmp_path / "file" / "state")["disk"]
    assert found.state == "problem" and "cannot be written to" in found.what
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)  # root may write everywhere
    assert examined(config, server, made)["disk"].state == "problem"


def test_another_flower(config, made, monkeypatch):
    monkeypatch.setattr(interventions, "MADE_FOR", "1.40")
    with serving(made) as (server, calls):
        found = examined(config, server, made)
    assert states(found) == {**THERE, "versions": "problem", "TLS": "ok", "clock": "ok", "key": "skipped"}
    assert "install flwr 1.40" in found["versions"].remedy and not calls


def test_the_real_server(config, made, tmp_path):
    """Twice, as a node that had stayed online would be refused the second time; then with a stranger's key."""
    strange = shutil.copytree(made / "client-0", tmp_path / "strange")
    authority.make(tmp_path / "other", ["localhost"], 1)
    for name in ("client.key", "client.pub"):
        shutil.copy(tmp_path / "other" / "client-0" / name, strange / name)
    said = []
    with superlink(Address("127.0.0.1", 0), certificates.server_files(made), say=said.append) as link:
        server = Address("localhost", link.address.port)
        for _ in range(2):
            found = examined(config, server, made, partition=1)
            assert states(found) == {**THERE, "TLS": "ok", "clock": "ok", "key": "ok"}, found
        found = examined(config, server, strange)
    assert states(found) == {**THERE, "TLS": "ok", "clock": "ok", "key": "problem"}, found
    assert any("key is not registered" in line for line in said)
