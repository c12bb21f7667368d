"""The folder of certificates and keys: what is in it, and whether it is as it must be.

``ca.crt`` and ``ca.key`` are the authority, ``server.crt`` and ``server.key`` the server's, and ``client-K`` holds all
that the machine of client K needs: ``ca.crt`` and the client's own pair of keys.
"""

import datetime
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedsim.errors import DataError
from fedsim.runs import read_bytes

CA, SERVER, PARTY = "ca", "server", "party"
CLIENT_KEY, CLIENT_PUBLIC = "client.key", "client.pub"


@dataclass(frozen=True)
class ServerFiles:
    """What a server needs. clients: number of the client -> file of its public key."""

    ca: Path
    certificate: Path
    key: Path
    clients: Mapping[int, Path]


@dataclass(frozen=True)
class ClientFiles:
    """What a client needs."""

    ca: Path
    key: Path
    public: Path
    folder: Path


def client_folder(folder: Path, client: int) -> Path:
    """Where the files of a client are, or would be made."""
    return folder / f"client-{client}"


def server_files(folder: Path) -> ServerFiles:
    """The server's part of a folder, checked.

    Raises:
        DataError: a file is missing, unreadable or not what it should be; a key is readable by others or belongs to
            another certificate; the certificate has expired, or is of another authority. Names the file and the rule.
    """
    authority = load_certificate(folder / f"{CA}.crt")
    certificate = load_certificate(folder / f"{SERVER}.crt")
    check_dates(folder / f"{CA}.crt", authority)
    check_dates(folder / f"{SERVER}.crt", certificate)
    check_issued(folder / f"{SERVER}.crt", certificate, authority)
    check_key(folder / f"{SERVER}.key", certificate)
    clients = _clients(folder)
    for path in clients.values():
        load_public(path)
    if not clients:
        raise DataError(f"{folder}: has no client-0/{CLIENT_PUBLIC}; make the clients' keys with fedsim certs")
    return ServerFiles(folder / f"{CA}.crt", folder / f"{SERVER}.crt", folder / f"{SERVER}.key", clients)


def client_files(folder: Path, client: int) -> ClientFiles:
    """The files of a client, checked: in ``folder`` itself, or in its ``client-K``.

    Raises:
        DataError: as for :func:`server_files`; or it is the folder of another client.
    """
    own = folder if (folder / CLIENT_KEY).exists() else client_folder(folder, client)
    owner = number_of(own.absolute())
    if owner not in (None, client):
        raise DataError(f"{own}: holds the key of client {owner}, not that of client {client} (--partition)")
    check_dates(own / f"{CA}.crt", load_certificate(own / f"{CA}.crt"))
    key = load_clients_private(own / CLIENT_KEY)
    if load_public(own / CLIENT_PUBLIC).public_numbers() != key.public_key().public_numbers():
        raise DataError(f"{own / CLIENT_PUBLIC}: is not the public key of {CLIENT_KEY}")
    return ClientFiles(own / f"{CA}.crt", own / CLIENT_KEY, own / CLIENT_PUBLIC, own)


def number_of(folder: Path) -> int | None:
    """Whose folder it is by its name, ``client-K``; None if it has another."""
    match = re.fullmatch(r"client-(0|[1-9][0-9]{0,8})", folder.name)
    return int(match[1]) if match else None


def load_certificate(path: Path) -> x509.Certificate:
    """A certificate. Raises DataError if the file does not hold one."""
    try:
        return x509.load_pem_x509_certificate(read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: is no certificate (PEM)") from error


def load_public(path: Path) -> ec.EllipticCurvePublicKey:
    """A client's public key. Raises DataError if the file does not hold one."""
    try:
        key = serialization.load_ssh_public_key(read_bytes(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DataError(f"{path}: is no public key (OpenSSH)") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DataError(f"{path}: must be a key on a NIST elliptic curve")
    return key


def load_private(path: Path, *, openssh: bool = False) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    """A private key. Raises DataError if the file does not hold one, or if others can read it."""
    check_private(path)
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        key = load(read_bytes(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise DataError(f"{path}: is no private key ({'OpenSSH' if openssh else 'PEM'}, without password)") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise DataError(f"{path}: must be a key on a NIST elliptic curve, or of RSA")
    return key


def load_clients_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A client's private key: of the kind that Flower reads. Raises DataError as :func:`load_private`."""
    key = load_private(path, openssh=True)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{path}: must be a key on a NIST elliptic curve")
    return key


def check_key(path: Path, certificate: x509.Certificate) -> ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey:
    """The private key of a certificate. Raises DataError if it is not, or if others can read it."""
    key = load_private(path)
    if key.public_key() != certificate.public_key():
        raise DataError(f"{path}: does not belong to {path.stem}.crt")
    return key


def check_issued(path: Path, certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Raises DataError if the authority has not signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        rule = f"must be signed by the authority in {CA}.crt; make a new one with fedsim certs --renew"
        raise DataError(f"{path}: {rule}") from error


def check_private(path: Path) -> None:
    """Raises DataError if anybody but its owner can read a key."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise DataError(f"{path}: a private key must not be readable by others; chmod 600 {path}")


def check_dates(path: Path, certificate: x509.Certificate) -> None:
    """Raises DataError if a certificate is no longer good, or not yet."""
    now = datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        renewed = path.stem in (SERVER, PARTY)
        remedy = "make a new one with fedsim certs --renew" if renewed else "begin with a new folder"
        raise DataError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; {remedy}")
    if now < certificate.not_valid_before_utc:
        since = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise DataError(f"{path}: is good from {since} only; this machine's clock says {now:%Y-%m-%d %H:%M}")


def _clients(folder: Path) -> dict[int, Path]:
    paths = {number_of(path.parent): path for path in folder.glob(f"client-*/{CLIENT_PUBLIC}")}
    return {client: paths[client] for client in sorted(number for number in paths if number is not None)}
