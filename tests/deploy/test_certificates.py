"""Certificates and keys: made, checked by OpenSSL and a real handshake, and refused where they are wrong."""

import datetime
import shutil
import socket
import ssl
import stat
import subprocess
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedsim.deploy import authority, certificates, checks
from fedsim.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "certs"
    authority.make(folder, ["fl.example.org", "10.1.2.3", "2001:db8::5"], 2)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "certs")


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def handshake(folder, name, ca=None):
    """A TLS connection to a server with these files, by this name; raises what the client's check raises."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=str(ca or folder / "ca.crt"))
    ours, theirs = socket.socketpair()

    def answer():
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=name):
            pass
    finally:
        ours.close()
        thread.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl's command is not there")
def test_openssl_finds_them_good_and_as_they_should_be(made):
    assert run("openssl", "verify", "-x509_strict", "-CAfile", made / "ca.crt", made / "server.crt").returncode == 0
    text = run("openssl", "x509", "-in", made / "server.crt", "-noout", "-text").stdout
    names = "DNS:fl.example.org, IP Address:10.1.2.3, IP Address:2001:DB8:0:0:0:0:0:5, DNS:localhost"
    assert names in text and "TLS Web Server Authentication" in text and "CA:FALSE" in text
    text = run("openssl", "x509", "-in", made / "ca.crt", "-noout", "-text").stdout
    assert "CA:TRUE, pathlen:0" in text and "Certificate Sign, CRL Sign" in text and "P-384" in text


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not there")
def test_ssh_reads_the_clients_keys(made):
    derived = run("ssh-keygen", "-y", "-f", made / "client-0" / "client.key").stdout.split()[:2]
    assert derived == (made / "client-0" / "client.pub").read_text().split()[:2]


@pytest.mark.parametrize("name", ["fl.example.org", "10.1.2.3", "2001:db8::5", "localhost", "127.0.0.1", "::1"])
def test_a_handshake_by_each_name(made, name):
    handshake(made, name)


def test_a_handshake_by_another_name_or_authority_fails(made, tmp_path):
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, "other.example.org")
    authority.make(tmp_path / "other", ["fl.example.org"], 1)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
        handshake(made, "fl.example.org", tmp_path / "other" / "ca.crt")


def test_nobody_else_can_read_a_key(made):
    for path in [made, *made.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        private = path.is_dir() or path.suffix == ".key"
        assert mode == (0o700 if path.is_dir() else 0o600) if private else not mode & 0o022, path


def test_a_second_call_adds_what_is_missing_and_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert authority.make(folder, [], 2) == []
    new = authority.make(folder, [], 3)
    assert {path.parent.name for path in new} == {"client-2"} and len(new) == 3
    assert all(path.read_bytes() == content for path, content in before.items())


def test_renewing_makes_a_new_server_certificate_of_the_same_authority(folder):
    ca = (folder / "ca.crt").read_bytes()
    new = authority.make(folder, ["new.example.org"], 2, renew=True)
    assert [path.name for path in new] == ["server.crt"]
    assert (folder / "ca.crt").read_bytes() == ca
    handshake(folder, "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(folder, "fl.example.org")


def keys_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".key", ".pub")}


@pytest.mark.parametrize(
    "lost", ["ca.crt", "server.crt", "client-0/ca.crt", "client-1/client.pub", "client-1/client.key"]
)
def test_a_lost_file_never_costs_a_key(folder, lost):
    before = keys_of(folder)
    (folder / lost).unlink()
    if lost == "client-1/client.key":  # it may be on the client's machine alone
        del before[folder / lost]
    authority.make(folder, ["fl.example.org"], 2)
    assert keys_of(folder) == before
    assert not any(one.problem for one in checks.check(folder))
    handshake(folder, "fl.example.org")


def test_a_new_certificate_of_an_old_authority_is_trusted_by_old_clients(folder, tmp_path):
    shutil.copy(folder / "ca.crt", tmp_path / "old.crt")
    (folder / "ca.crt").unlink()
    authority.make(folder, ["fl.example.org"], 2, renew=True)
    handshake(folder, "fl.example.org", tmp_path / "old.crt")


def test_an_authority_that_is_gone_is_not_replaced_by_another(folder):
    for name in ("ca.crt", "ca.key"):
        (folder / name).unlink()
    before = keys_of(folder)
    with pytest.raises(DataError, match=r"ca\.crt: missing, but clients trust an authority: copy .*client-\d/ca\.crt"):
        authority.make(folder, ["a"], 3)
    assert keys_of(folder) == before


def test_an_authority_whose_key_is_elsewhere_serves_new_clients_but_signs_nothing(folder):
    (folder / "ca.key").unlink()
    assert {path.parent.name for path in authority.make(folder, [], 3)} == {"client-2"}
    with pytest.raises(DataError, match=r"ca\.key: missing, and needed to sign the server's certificate"):
        authority.make(folder, ["a"], 2, renew=True)


def test_a_key_that_appears_meanwhile_is_not_overwritten(tmp_path):
    (tmp_path / "ca.key").write_text("somebody else's")
    with pytest.raises(FileExistsError):
        authority._write(tmp_path / "ca.key", b"mine", private=True)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody else's"]


@pytest.mark.parametrize(
    ("hosts", "clients", "days", "line"),
    [
        ([], 1, 365, "--host: needed"),
        (["a b"], 1, 365, "--host: 'a b' is no host name or address"),
        (["10.0.0.300"], 1, 365, "--host: '10.0.0.300'"),
        (["0.0.0.0", "::"], 1, 365, "--host: 0.0.0.0 is no address that a client can connect to\n--host: :: is"),
        (["a"], 0, 365, "--clients: must be between 1 and 100000, got 0"),
        (["a"], 1, 0, "--days: must be between 1 and 3650, got 0"),
    ],
)
def test_what_cannot_be_made(tmp_path, hosts, clients, days, line):
    with pytest.raises(ConfigError, match=line):
        authority.make(tmp_path / "new", hosts, clients, days=days)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        authority.make(tmp_path / "file" / "certs", ["a"], 1)


def test_what_server_and_clients_need(made):
    files = certificates.server_files(made)
    assert sorted(files.clients) == [0, 1] and files.certificate == made / "server.crt"
    for where in (made, made / "client-1"):
        assert certificates.client_files(where, 1).key == made / "client-1" / "client.key"
    with pytest.raises(DataError, match="client-1: holds the key of client 1, not that of client 0"):
        certificates.client_files(made / "client-1", 0)


def test_a_folder_may_have_another_name(made, tmp_path):
    own = shutil.copytree(made / "client-1", tmp_path / "mine")
    assert certificates.client_files(own, 1).folder == own


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl's command is not there")
def test_a_certificate_of_rsa_that_somebody_else_made_is_good(folder):
    (folder / "server.key").unlink()
    (folder / "names").write_text("subjectAltName=DNS:rsa.example.org\nbasicConstraints=CA:FALSE\n")
    request = ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-out", folder / "request"]
    assert run(*request, "-keyout", folder / "server.key").returncode == 0
    (folder / "server.key").chmod(0o600)
    sign = ["openssl", "x509", "-req", "-in", folder / "request", "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key"]
    more = ["-set_serial", "7", "-days", "9", "-extfile", folder / "names", "-out", folder / "server.crt"]
    assert run(*sign, *more).returncode == 0
    certificates.server_files(folder)
    handshake(folder, "rsa.example.org")


def test_clients_keys_are_read_as_flower_reads_them(made):
    """With the calls that flwr 1.41 makes for --auth-supernode-private-key and for flwr supernode register."""
    from flwr.supercore.primitives.asymmetric import sign_message, uses_nist_ec_curve, verify_signature

    private = serialization.load_ssh_private_key((made / "client-0" / "client.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((made / "client-0" / "client.pub").read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey) and uses_nist_ec_curve(public)
    assert verify_signature(public, b"now", sign_message(private, b"now"))


def expired(folder, name="server"):
    """The same certificate, over since yesterday."""
    ca = certificates.load_certificate(folder / "ca.crt")
    signer = certificates.check_key(folder / "ca.key", ca)
    old = certificates.load_certificate(folder / f"{name}.crt")
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer)
    builder = builder.public_key(old.public_key()).serial_number(5)
    builder = builder.not_valid_before(now - datetime.timedelta(days=9))
    builder = builder.not_valid_after(now - datetime.timedelta(days=1))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    pem = builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    (folder / f"{name}.crt").write_bytes(pem)


def test_an_expired_certificate_is_refused_in_a_handshake(folder):
    expired(folder)
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        handshake(folder, "fl.example.org")


def other_authority(folder):
    other = folder.parent / "other"
    authority.make(other, ["a"], 1)
    shutil.copy(other / "ca.crt", folder / "ca.crt")


def other_kind(folder):
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    raw = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / "client-0" / "client.pub").write_bytes(raw)


WRONG = {
    "no authority": (lambda f: (f / "ca.crt").unlink(), "ca.crt: missing"),
    "no certificate": (lambda f: (f / "server.crt").write_text("x"), r"server.crt: is no certificate \(PEM\)"),
    "expired": (expired, "server.crt: expired on .*; make a new one with fedsim certs --renew"),
    "expired authority": (lambda f: expired(f, "ca"), "ca.crt: expired on .*; begin with a new folder"),
    "other authority": (other_authority, "server.crt: must be signed by the authority in ca.crt"),
    "no key": (lambda f: (f / "server.key").unlink(), "server.key: missing"),
    "other key": (lambda f: shutil.copy(f / "ca.key", f / "server.key"), "server.key: does not belong to server.crt"),
    "open key": (lambda f: (f / "server.key").chmod(0o640), "server.key: a private key must not be readable by others"),
    "no clients": (lambda f: [shutil.rmtree(f / f"client-{k}") for k in (0, 1)], "has no client-0/client.pub"),
    "rubbish": (lambda f: (f / "client-0" / "client.pub").write_text("x"), "client.pub: is no public key"),
    "other kind": (other_kind, "client.pub: must be a key on a NIST elliptic curve"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_server_is_told_what_is_wrong(wrong, folder):
    change, message = WRONG[wrong]
    change(folder)
    with pytest.raises(DataError, match=message):
        certificates.server_files(folder)
    assert any(one.problem for one in checks.check(folder))


def strangers_key(folder):
    raw = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (folder / "client-0" / "client.key").write_bytes(raw)


CLIENTS_WRONG = {
    "no key": (lambda f: (f / "client-0" / "client.key").unlink(), "client-0/client.key: missing"),
    "open key": (lambda f: (f / "client-0" / "client.key").chmod(0o644), "must not be readable by others"),
    "rubbish": (lambda f: (f / "client-0" / "client.key").write_text("x"), r"is no private key \(OpenSSH"),
    "other key": (strangers_key, "client.pub: is not the public key of client.key"),
    "no authority": (lambda f: (f / "client-0" / "ca.crt").unlink(), "client-0/ca.crt: missing"),
}


@pytest.mark.parametrize("wrong", CLIENTS_WRONG)
def test_a_client_is_told_what_is_wrong(wrong, folder):
    change, message = CLIENTS_WRONG[wrong]
    change(folder)
    with pytest.raises(DataError, match=message):
        certificates.client_files(folder, 0)


def test_the_check_tells_names_and_days(made):
    found = checks.check(made)
    server = found[2]
    assert server.days_left == 364 and server.names.startswith("fl.example.org, 10.1.2.3")
    assert len({one.fingerprint for one in found if one.fingerprint}) == 4


def test_the_check_of_no_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        checks.check(tmp_path / "nothing")
