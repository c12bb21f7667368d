"""What the table of ``fedsim certs check`` says about folders in which one thing is wrong."""

import shutil
import subprocess

import pytest

from fedsim.deploy import authority, checks


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks") / "certs"
    authority.make(folder, ["fl.example.org"], 3)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "certs")


def problems(folder):
    found = checks.check(folder)
    return {str(one.file.relative_to(folder)): one.problem for one in found if one.problem}


def test_the_rows_of_a_good_folder(made):
    rows = [(str(one.file.relative_to(made)), one.kind, one.problem) for one in checks.check(made)]
    assert rows == [
        ("ca.crt", "authority", ""),
        ("ca.key", "private key", ""),
        ("server.crt", "server", ""),
        ("server.key", "private key", ""),
        *((f"client-{k}/client.pub", "client", "") for k in range(3)),
    ]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl's command is not there")
@pytest.mark.parametrize(("row", "name"), [(0, "ca.crt"), (2, "server.crt")])
def test_fingerprint_and_expiry_are_those_that_openssl_gives(made, row, name):
    command = ["openssl", "x509", "-in", made / name, "-noout", "-fingerprint", "-sha256", "-enddate"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    one = checks.check(made)[row]
    assert one.fingerprint == said.splitlines()[0].split("=")[1].replace(":", "").lower()
    assert said.splitlines()[1] == f"notAfter={one.until:%b} {one.until.day:2} {one.until:%H:%M:%S %Y} GMT"


@pytest.mark.skipif(not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="a command is not there")
def test_the_fingerprint_of_a_client_is_that_of_its_key_as_openssl_writes_it(made):
    key = made / "client-1" / "client.key"
    pem = made.parent / "as-pem"
    shutil.copy(key, pem)
    subprocess.run(["ssh-keygen", "-q", "-p", "-m", "PEM", "-N", "", "-f", pem], check=True, stdout=subprocess.DEVNULL)
    command = ["openssl", "pkey", "-in", pem, "-pubout", "-outform", "DER"]
    der = subprocess.run(command, capture_output=True, check=True).stdout
    digest = subprocess.run(["openssl", "dgst", "-sha256"], input=der, capture_output=True, check=True).stdout
    assert checks.check(made)[5].fingerprint == digest.split()[-1].decode()


def test_private_keys_that_a_server_does_not_need_may_be_elsewhere(folder):
    (folder / "ca.key").unlink()
    (folder / "client-1" / "client.key").unlink()
    found = checks.check(folder)
    assert [one.problem for one in found] == [""] * 6
    assert [one.kind for one in found[3:]] == ["client", "client, key elsewhere", "client"]


def test_a_clients_own_folder_needs_its_key(made, tmp_path):
    own = shutil.copytree(made / "client-1", tmp_path / "client-1")
    assert [one.kind for one in checks.check(own)] == ["authority", "client"] and not problems(own)
    (own / "client.key").chmod(0o604)
    assert "must not be readable by others" in problems(own)["client.pub"]


def other(folder, name):
    authority.make(folder.parent / "other", ["fl.example.org"], 1)
    return folder.parent / "other" / name


WRONG = [
    (lambda f: (f / "ca.crt").unlink(), {"ca.crt": "ca.crt: missing"}),
    (lambda f: (f / "server.crt").unlink(), {"server.crt": "server.crt: missing"}),
    (lambda f: (f / "server.key").unlink(), {"server.key": "server.key: missing"}),
    (lambda f: (f / "server.key").chmod(0o640), {"server.key": "must not be readable by others"}),
    (lambda f: shutil.copy(other(f, "ca.key"), f / "ca.key"), {"ca.key": "does not belong to ca.crt"}),
    (
        lambda f: [shutil.copy(other(f, name), f / name) for name in ("server.crt", "server.key")],
        {"server.crt": "must be signed by the authority in ca.crt"},
    ),
    (
        lambda f: shutil.copy(other(f, "ca.crt"), f / "client-1" / "ca.crt"),
        {"client-1/client.pub": "client-1/ca.crt: is another authority than"},
    ),
    (lambda f: (f / "client-2" / "ca.crt").unlink(), {"client-2/client.pub": "client-2/ca.crt: missing"}),
    (lambda f: (f / "client-2" / "client.pub").unlink(), {"client-2/client.pub": "client.pub: missing"}),
    (lambda f: (f / "client-0" / "client.pub").write_text("x"), {"client-0/client.pub": "is no public key"}),
    (
        lambda f: [shutil.copy(f / "client-0" / name, f / "client-2" / name) for name in ("client.key", "client.pub")],
        {"client-2/client.pub": "is the same key as that of client-0"},
    ),
    (lambda f: [shutil.rmtree(f / f"client-{k}") for k in range(3)], {"client-0/client.pub": "has no client-0"}),
]


@pytest.mark.parametrize(("change", "wrong"), WRONG)
def test_each_mistake_is_one_line_in_the_row_it_belongs_to(folder, change, wrong):
    change(folder)
    found = problems(folder)
    assert found.keys() == wrong.keys(), found
    assert all(text in found[name] for name, text in wrong.items()), found


def test_clients_are_in_the_order_of_their_numbers(folder):
    shutil.copytree(folder / "client-2", folder / "client-10")
    (folder / "client-other").mkdir()
    names = [one.names for one in checks.check(folder)][4:]
    assert names == ["client-0", "client-1", "client-2", "client-10"]
