"""Making the certificates and keys of a federation: an authority, a server certificate, a pair of keys per client."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsim.deploy import certificates as c
from fedsim.deploy.address import is_ip, is_name
from fedsim.errors import ConfigError, DataError

CA_DAYS = 3650
EARLIER = datetime.timedelta(minutes=10)  # certificates are good from a little before now: clocks differ
ALWAYS = ("localhost", "127.0.0.1", "::1")  # names of every server certificate, to try things out on one machine

Private = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def make(folder: Path, hosts: Sequence[str], clients: int, *, days: int = 365, renew: bool = False) -> list[Path]:
    """Make what is missing in a folder of certificates. No key that is there is ever replaced.

    Args:
        folder: may exist, with an authority and clients. ``ca.key`` and the clients' private keys may be elsewhere.
        hosts: names and addresses by which clients reach the server.
        clients: number of clients; keys are made for 0 to clients - 1.
        days: how long the server's certificate is good.
        renew: make a new server certificate even if there is one, for the same key.

    Returns:
        The files that were made.

    Raises:
        ConfigError: a host is neither a name nor an address, no host, or a number out of range; or the folder cannot
            be written.
        DataError: something that is there, or should be, is not as it must be; names the file.
    """
    with_server = renew or not (folder / f"{c.SERVER}.crt").exists()
    _check(hosts, clients, days, needed=with_server)
    made: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / f"{c.CA}.crt").exists():
            made += make_authority(folder)
        if with_server:
            made += _server(folder, hosts, days)
        authority = (folder / f"{c.CA}.crt").read_bytes()
        for client in range(clients):
            made += _client(c.client_folder(folder, client), authority)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
    return made


def _check(hosts: Sequence[str], clients: int, days: int, *, needed: bool) -> None:
    problems = [f"--host: {host!r} is no host name or address" for host in hosts if not (is_ip(host) or is_name(host))]
    anywhere = [host for host in hosts if is_ip(host) and ipaddress.ip_address(host).is_unspecified]
    problems += [f"--host: {host} is no address that a client can connect to" for host in anywhere]
    if needed and not hosts:
        problems.append("--host: needed, the name or address by which clients reach the server")
    if not 1 <= clients <= 100_000:
        problems.append(f"--clients: must be between 1 and 100000, got {clients}")
    if not 1 <= days <= CA_DAYS:
        problems.append(f"--days: must be between 1 and {CA_DAYS}, got {days}")
    if problems:
        raise ConfigError(problems)


def make_authority(folder: Path) -> list[Path]:
    """A certificate for ``ca.key`` if that is there: it is the same authority, and what it signed stays good."""
    if not (folder / f"{c.CA}.key").exists() and (left := next(folder.glob(f"client-*/{c.CA}.crt"), None)):
        raise DataError(f"{folder / c.CA}.crt: missing, but clients trust an authority: copy {left} there")
    key, made = _key(folder / f"{c.CA}.key", ec.SECP384R1())
    name = _name("fedsim federation")
    certificate = (
        _certificate(name, name, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return [*made, _write(folder / f"{c.CA}.crt", certificate.public_bytes(serialization.Encoding.PEM))]


def _server(folder: Path, hosts: Sequence[str], days: int) -> list[Path]:
    names = [_general(name) for name in dict.fromkeys([*hosts, *ALWAYS])]
    uses = [ExtendedKeyUsageOID.SERVER_AUTH]
    return issue(folder, folder / c.SERVER, subject=hosts[0][:64], names=names, uses=uses, days=days)


def issue(
    folder: Path,
    stem: Path,
    *,
    subject: str,
    names: Sequence[x509.GeneralName],
    uses: Sequence[x509.ObjectIdentifier],
    days: int,
) -> list[Path]:
    """A certificate ``stem.crt`` for the key ``stem.key``, which is made if it is not there.

    Args:
        folder: of the authority that signs it.
        stem: of the files.
        subject, names, uses: whose it is, by which names, for what.
        days: how long it is good; no longer than the authority.

    Returns:
        The files that were made.

    Raises:
        DataError: the authority's key is missing, or something is not as it must be.
    """
    authority = c.load_certificate(folder / f"{c.CA}.crt")
    if not (folder / f"{c.CA}.key").exists():
        raise DataError(f"{folder / c.CA}.key: missing, and needed to sign the {stem.name}'s certificate; copy it back")
    signer = c.check_key(folder / f"{c.CA}.key", authority)
    last = min(days, (authority.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days)
    if last < 1:
        raise DataError(f"{folder / c.CA}.crt: the authority expires within a day; begin with a new folder")
    key, made = _key(stem.with_name(f"{stem.name}.key"), ec.SECP256R1())
    certificate = (
        _certificate(_name(subject), authority.subject, key.public_key(), last)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_signed_by(authority), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return [*made, _write(stem.with_name(f"{stem.name}.crt"), certificate.public_bytes(serialization.Encoding.PEM))]


def _client(folder: Path, authority: bytes) -> list[Path]:
    """A pair of keys in OpenSSH's format, which is the one that Flower reads.

    A public key without a private one is left alone: the private one may be on the client's machine only.
    """
    made = own_folder(folder, authority)
    if (folder / c.CLIENT_PUBLIC).exists():
        return made
    if (folder / c.CLIENT_KEY).exists():
        key = c.load_clients_private(folder / c.CLIENT_KEY)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        made.append(_write(folder / c.CLIENT_KEY, _pem(key, serialization.PrivateFormat.OpenSSH), private=True))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [*made, _write(folder / c.CLIENT_PUBLIC, public + f" fedsim-{folder.name}\n".encode())]


def own_folder(folder: Path, authority: bytes) -> list[Path]:
    """The folder for one machine, with the authority's certificate; returns it if it was not there."""
    folder.mkdir(exist_ok=True, mode=0o700)
    copy = folder / f"{c.CA}.crt"
    return [] if copy.exists() and copy.read_bytes() == authority else [_write(copy, authority)]


def _key(path: Path, curve: ec.EllipticCurve) -> tuple[Private, list[Path]]:
    """The private key in a file, which is made if it is not there."""
    if path.exists():
        return c.load_private(path), []
    key = ec.generate_private_key(curve)
    return key, [_write(path, _pem(key), private=True)]


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(name)) if is_ip(name) else x509.DNSName(name)


def _signed_by(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        name = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # of an authority that was made otherwise
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(name)


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(
    key: ec.EllipticCurvePrivateKey,
    format: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, format, serialization.NoEncryption())


def _write(path: Path, content: bytes, *, private: bool = False) -> Path:
    """Write atomically; a private file is never readable by others, not even for a moment, and replaces no other."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    mode = 0o600 if private else 0o644
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if private:
            path.hardlink_to(partial)  # fails where replace would overwrite
        else:
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
