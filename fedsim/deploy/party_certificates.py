"""Certificates of the parties of a transfer: each is both server and client of its peers, and is known by its role.

A folder has ``party-a``, ``party-b`` and ``party-helper`` beside ``ca.crt`` and ``ca.key``. Each holds all that the
machine of this party needs: ``ca.crt``, ``party.crt``, ``party.key``.
"""

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedsim.deploy import authority
from fedsim.deploy import certificates as c
from fedsim.errors import ConfigError, DataError

ROLES = ("a", "b", "helper")
_USES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


@dataclass(frozen=True)
class PartyFiles:
    """What a party needs."""

    ca: Path
    certificate: Path
    key: Path


def name_of(role: str) -> str:
    """The name that the certificate of a role is for, and that of its folder.

    >>> name_of("a")
    'party-a'
    """
    return f"{c.PARTY}-{role}"


def write_party_certificates(folder: Path, *, days: int = 365, renew: bool = False) -> list[Path]:
    """Make what is missing: the authority, and a certificate and key for each party. No key is ever replaced.

    Args:
        folder: may exist, with an authority; also that of a federation.
        days: how long the certificates are good.
        renew: make new certificates even if they are there, for the same keys.

    Returns:
        The files that were made.

    Raises:
        ConfigError: days are out of range, or the folder cannot be written.
        DataError: something that is there, or should be, is not as it must be; names the file.
    """
    if not 1 <= days <= authority.CA_DAYS:
        raise ConfigError(f"--days: must be between 1 and {authority.CA_DAYS}, got {days}")
    made: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (folder / f"{c.CA}.crt").exists():
            made += authority.make_authority(folder)
        for role in ROLES:
            made += _party(folder, role, days, renew=renew)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from error
    return made


def _party(folder: Path, role: str, days: int, *, renew: bool) -> list[Path]:
    own, name = folder / name_of(role), name_of(role)
    made = authority.own_folder(own, (folder / f"{c.CA}.crt").read_bytes())
    if renew or not (own / f"{c.PARTY}.crt").exists():
        names = [x509.DNSName(name)]
        made += authority.issue(folder, own / c.PARTY, subject=name, names=names, uses=_USES, days=days)
    return made


def party_files(folder: Path, role: str) -> PartyFiles:
    """The files of a party, checked: in ``folder`` itself, or in its ``party-ROLE``.

    Raises:
        DataError: a file is missing, unreadable or not what it should be; the key is readable by others or belongs to
            another certificate; the certificate has expired, or is of another authority or another role. Names the
            file and the rule.
    """
    own = folder if (folder / f"{c.PARTY}.crt").exists() else folder / name_of(role)
    files = PartyFiles(own / f"{c.CA}.crt", own / f"{c.PARTY}.crt", own / f"{c.PARTY}.key")
    ca, certificate = c.load_certificate(files.ca), c.load_certificate(files.certificate)
    c.check_dates(files.ca, ca)
    c.check_dates(files.certificate, certificate)
    c.check_issued(files.certificate, certificate, ca)
    c.check_key(files.key, certificate)
    if name_of(role) not in names_in(certificate):
        raise DataError(f"{files.certificate}: must be for {name_of(role)}, is for {', '.join(names_in(certificate))}")
    return files


def names_in(certificate: x509.Certificate) -> list[str]:
    """The DNS names that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return found.get_values_for_type(x509.DNSName)
