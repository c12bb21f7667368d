"""What ``fedsim certs check`` shows: every file of a folder of certificates, how long it is good, and what is wrong."""

import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedsim.deploy import certificates as c
from fedsim.errors import DataError


@dataclass(frozen=True)
class Checked:
    """One file. names: whom it is for. until: of a certificate. fingerprint: SHA-256. problem: "" if all is well."""

    file: Path
    kind: str
    names: str = ""
    until: datetime.datetime | None = None
    fingerprint: str = ""
    problem: str = ""

    @property
    def days_left(self) -> int | None:
        """Whole days until it expires."""
        return None if self.until is None else (self.until - datetime.datetime.now(datetime.UTC)).days


def check(folder: Path) -> list[Checked]:
    """Every file that a server with this folder needs, and every client's and party's; in one's own folder, its own.

    Private keys of authority, clients and parties may be kept elsewhere: a server needs none of them.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    authority = folder / f"{c.CA}.crt"
    if (folder / c.CLIENT_KEY).exists():
        return [_certificate(authority, "authority"), _client(folder, None)]
    if (folder / f"{c.PARTY}.crt").exists():
        return [_certificate(authority, "authority"), *_party(folder)]
    server = folder / f"{c.SERVER}.crt"
    found = [_certificate(authority, "authority")]
    if (folder / f"{c.CA}.key").exists():
        found.append(_key(folder / f"{c.CA}.key", authority))
    parties = [one for path in sorted(folder.glob(f"{c.PARTY}-*/{c.PARTY}.crt")) for one in _party(path.parent)]
    if parties and not server.exists():
        return found + parties
    found += [_certificate(server, "server", authority), _key(folder / f"{c.SERVER}.key", server)]
    numbers = sorted(n for path in folder.glob("client-*") if (n := c.number_of(path)) is not None)
    clients = _distinct([_client(c.client_folder(folder, number), authority) for number in numbers])
    nobody = Checked(c.client_folder(folder, 0) / c.CLIENT_PUBLIC, "client", problem=f"{folder}: has no client-0")
    return found + (clients or [nobody]) + parties


def _party(folder: Path) -> list[Checked]:
    """Its certificate, and its key unless that is on its machine only."""
    path, key = folder / f"{c.PARTY}.crt", folder / f"{c.PARTY}.key"
    found = [_certificate(path, "party", folder / f"{c.CA}.crt")]
    return [*found, _key(key, path)] if key.exists() else [replace(found[0], kind="party, key elsewhere")]


def _certificate(path: Path, kind: str, authority: Path | None = None) -> Checked:
    """authority: who must have signed it, if that is there."""
    try:
        certificate = c.load_certificate(path)
    except DataError as error:
        return Checked(path, kind, problem=str(error))
    checks: list[Callable[[], object]] = [lambda: c.check_dates(path, certificate)]
    if authority is not None and authority.exists():
        checks.append(lambda: c.check_issued(path, certificate, c.load_certificate(authority)))
    return Checked(
        path,
        kind,
        names=_names(certificate),
        until=certificate.not_valid_after_utc,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        problem=_first_problem(*checks),
    )


def _key(path: Path, certificate: Path) -> Checked:
    """A private key; by itself if its certificate cannot be read, which has a line of its own."""
    readable = not _first_problem(lambda: c.load_certificate(certificate))
    key = (lambda: c.check_key(path, c.load_certificate(certificate))) if readable else (lambda: c.load_private(path))
    return Checked(path, "private key", problem=_first_problem(key))


def _client(folder: Path, authority: Path | None) -> Checked:
    """authority: of the federation, whose certificate the client must have; None where only the client's files are."""
    public, number = folder / c.CLIENT_PUBLIC, c.number_of(folder.absolute())
    checks: list[Callable[[], object]] = [lambda: c.load_public(public)]
    kind = "client"
    if authority is None or (folder / c.CLIENT_KEY).exists():
        checks.append(lambda: c.client_files(folder, number or 0))
    else:
        kind = "client, key elsewhere"
    if authority is not None and authority.exists():
        checks.append(lambda: _check_same(folder / f"{c.CA}.crt", authority))
    problem = _first_problem(*checks)
    return Checked(public, kind, folder.absolute().name, fingerprint=_fingerprint(public), problem=problem)


def _check_same(path: Path, authority: Path) -> None:
    if c.load_certificate(path).public_key() != c.load_certificate(authority).public_key():
        rule = f"is another authority than {authority}; copy that there, and to the client's machine"
        raise DataError(f"{path}: {rule}")


def _distinct(clients: list[Checked]) -> list[Checked]:
    owners: dict[str, str] = {}
    found = []
    for one in clients:
        owner = owners.setdefault(one.fingerprint, one.names) if one.fingerprint else one.names
        same = f"{one.file}: is the same key as that of {owner}; every client must have its own"
        found.append(one if owner == one.names or one.problem else replace(one, problem=same))
    return found


def _fingerprint(public: Path) -> str:
    try:
        key = c.load_public(public)
    except DataError:
        return ""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def _names(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return certificate.subject.rfc4514_string()
    return ", ".join(str(name.value) for name in names)


def _first_problem(*checks: Callable[[], object]) -> str:
    for one in checks:
        try:
            one()
        except DataError as error:
            return str(error)
    return ""
