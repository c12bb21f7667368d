"""Certificates of parties: made in a federation's style, checked by OpenSSL, and refused where they are wrong."""

import shutil
import stat
import subprocess

import pytest

from fedsim.deploy import authority, checks
from fedsim.deploy.certificates import server_files
from fedsim.deploy.party_certificates import ROLES, party_files, write_party_certificates
from fedsim.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certs") / "certs"
    write_party_certificates(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "certs")


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl's command is not there")
@pytest.mark.parametrize("role", ROLES)
def test_openssl_finds_them_good_and_as_they_should_be(made, role):
    path = made / f"party-{role}" / "party.crt"
    for purpose in ("sslserver", "sslclient"):
        verified = run("openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", made / "ca.crt", path)
        assert verified.returncode == 0, verified.stderr
    text = run("openssl", "x509", "-in", path, "-noout", "-text").stdout
    assert f"DNS:party-{role}\n" in text and "CA:FALSE" in text
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in text


def test_each_folder_has_all_that_its_machine_needs_and_nobody_else_reads_a_key(made, tmp_path):
    for role in ROLES:
        own = made / f"party-{role}"
        assert sorted(path.name for path in own.iterdir()) == ["ca.crt", "party.crt", "party.key"]
        alone = shutil.copytree(own, tmp_path / role)
        assert party_files(alone, role).key == alone / "party.key"
        assert party_files(made, role).key == own / "party.key"
        assert stat.S_IMODE((own / "party.key").stat().st_mode) == 0o600
    assert len({(made / f"party-{role}" / "party.key").read_bytes() for role in ROLES}) == len(ROLES)


def test_a_second_call_changes_nothing_and_renewing_keeps_keys(folder):
    def contents(suffix):
        return {path: path.read_bytes() for path in folder.rglob(f"*{suffix}")}

    keys, certificates = contents(".key"), contents("party.crt")
    assert write_party_certificates(folder) == []
    new = write_party_certificates(folder, renew=True, days=30)
    assert {path.name for path in new} == {"party.crt"} and len(new) == len(ROLES)
    assert contents(".key") == keys and not set(contents("party.crt").values()) & set(certificates.values())
    assert party_files(folder, "a")


def test_what_is_lost_is_made_again_and_no_key_is_replaced(folder):
    key = (folder / "party-a" / "party.key").read_bytes()
    (folder / "party-a" / "party.crt").unlink()
    shutil.rmtree(folder / "party-b")
    new = write_party_certificates(folder)
    assert sorted(str(path.relative_to(folder)) for path in new) == [
        *("party-a/party.crt", "party-b/ca.crt", "party-b/party.crt", "party-b/party.key")
    ]
    assert (folder / "party-a" / "party.key").read_bytes() == key


def test_a_federation_may_have_parties_and_its_server_is_none(tmp_path):
    folder = tmp_path / "certs"
    authority.make(folder, ["localhost"], 1)
    assert len(write_party_certificates(folder)) == 3 * len(ROLES)
    assert server_files(folder) and party_files(folder, "helper")
    kinds = [one.kind for one in checks.check(folder)]
    assert kinds.count("party") == 3 and kinds.count("server") == 1 and not any(o.problem for o in checks.check(folder))
    shutil.copy(folder / "server.crt", folder / "party-a" / "party.crt")
    shutil.copy(folder / "server.key", folder / "party-a" / "party.key")
    with pytest.raises(DataError, match="must be for party-a, is for localhost"):
        party_files(folder, "a")


def test_wrong_files_are_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"party\.crt: must be for party-b, is for party-a"):
        party_files(folder / "party-a", "b")
    (folder / "party-a" / "party.key").chmod(0o644)
    with pytest.raises(DataError, match="must not be readable by others"):
        party_files(folder, "a")
    shutil.copy(folder / "party-helper" / "party.key", folder / "party-b" / "party.key")
    with pytest.raises(DataError, match=r"does not belong to party\.crt"):
        party_files(folder, "b")
    write_party_certificates(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "ca.crt", folder / "party-helper" / "ca.crt")
    with pytest.raises(DataError, match="must be signed by the authority"):
        party_files(folder, "helper")
    with pytest.raises(DataError, match="missing"):
        party_files(tmp_path, "a")


def test_what_cannot_be_made(folder, tmp_path):
    for days in (0, 3651):
        with pytest.raises(ConfigError, match=f"--days: must be between 1 and 3650, got {days}"):
            write_party_certificates(tmp_path / "new", days=days)
    (folder / "ca.key").unlink()
    assert write_party_certificates(folder) == []
    with pytest.raises(DataError, match=r"ca\.key: missing, and needed to sign the party's certificate"):
        write_party_certificates(folder, renew=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_party_certificates(tmp_path / "file")


def test_the_check_finds_what_is_wrong_in_each_folder(folder):
    assert not any(one.problem for one in checks.check(folder))
    assert [one.kind for one in checks.check(folder / "party-a")] == ["authority", "party", "private key"]
    (folder / "party-a" / "party.key").unlink()
    (folder / "party-b" / "party.key").chmod(0o644)
    found = checks.check(folder)
    assert [one.kind for one in found if one.file.parent.name == "party-a"] == ["party, key elsewhere"]
    assert [one.problem for one in found if one.problem] == [
        f"{folder}/party-b/party.key: a private key must not be readable by others; "
        f"chmod 600 {folder}/party-b/party.key"
    ]
