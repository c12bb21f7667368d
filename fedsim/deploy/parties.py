"""A connection between two parties on separate machines: TCP, with TLS 1.3 in which each proves its role.

Both certificates must be signed by the one authority that either side knows, and each must be for the role that the
other side expects. After that each says its role in a ``welcome`` message, so that without certificates, too, two
parties of one role find out; one that refuses says why in an ``abort`` message. Then the link is free to be used.
"""

import contextlib
import selectors
import socket
import ssl
import time
from collections.abc import Iterator

from cryptography import x509

from fedsim.deploy.address import Address
from fedsim.deploy.listening import listeners
from fedsim.deploy.party_certificates import PartyFiles, name_of, names_in
from fedsim.deploy.refusals import Refusals, Say, plain
from fedsim.errors import ConfigError, DataError, TransferError
from fedsim.transfer.channel import Channel, facts, of_facts
from fedsim.transfer.links import GONE, TIMEOUT_S, SocketLink

HANDSHAKE_S = 10.0  # for TLS, and again for what each says of itself
CONNECT_S = 10.0
RETRY_S = 0.5
_DRAIN_S, _DRAIN_BYTES = 1.0, 2**18
_REASONS = {
    "HTTP_REQUEST": "it speaks no TLS; was it started without certificates?",
    "WRONG_VERSION_NUMBER": "it speaks no TLS; was it started without certificates?",
    "RECORD_LAYER_FAILURE": "it speaks no TLS; was it started without certificates?",
    "UNEXPECTED_EOF_WHILE_READING": "it closed the connection; was it started without certificates?",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it has no certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of this party's certificate; both must come from one "
    "fedsim certs --parties",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it finds this party's certificate expired; is its clock right?",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this party's certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it does not accept this party's certificate",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "it speaks no TLS 1.3",
}


def listen(
    where: Address,
    files: PartyFiles | None,
    *,
    role: str,
    peer: str,
    say: Say,
    wait_s: float | None = None,
    timeout_s: float = TIMEOUT_S,
    sockets: list[socket.socket] | None = None,
) -> SocketLink:
    """Wait until the other party connects. Whoever else does is refused, with a line that says why.

    A stranger who says nothing keeps others waiting for some twenty seconds.

    Args:
        where: to listen; port 0 takes any free one.
        files: of this party; None: no TLS, for loopback addresses only.
        role: of this party: a, b, helper.
        peer: role that the other must have.
        say: takes a line for people.
        wait_s: how long; None: for ever.
        timeout_s: of what is sent over the link.
        sockets: already listening at ``where``, which stay open; None: make them, and close them in the end.

    Raises:
        ConfigError: it cannot listen there, or there are no certificates for an address that others can reach.
        DataError: the certificates cannot be used.
        TransferError: nobody came in time.
    """
    _check_loopback(where, files, "--listen: without certificates a party may listen on a loopback address only")
    context = _context(files, ssl.PROTOCOL_TLS_SERVER)
    own = sockets or listeners(where)
    try:
        shown = Address(where.host, own[0].getsockname()[1])
        say(f"listening on {shown} for party {peer}" + ("" if files else ", without TLS"))
        refusals = Refusals(say)
        for connection, address in _accepted(own, wait_s, peer):
            try:
                return _entered(connection, context, role, peer, timeout_s, server=True)
            except _Refused as error:
                refusals.note(address, str(error))
        raise AssertionError("unreachable")
    finally:
        for one in own if sockets is None else []:
            one.close()


def connect(
    where: Address,
    files: PartyFiles | None,
    *,
    role: str,
    peer: str,
    say: Say,
    wait_s: float | None = None,
    timeout_s: float = TIMEOUT_S,
) -> SocketLink:
    """Connect to the other party, again and again while nobody listens there.

    Args:
        where: the other party listens.
        wait_s: how long to try; None: for ever.
        files, role, peer, say, timeout_s: as for :func:`listen`.

    Raises:
        ConfigError: there are no certificates, and the address is another machine's.
        DataError: the certificates cannot be used.
        TransferError: nobody listens there in time; or the one that does is not the right one, or refuses.
    """
    _check_loopback(where, files, "--connect: without certificates the other party must be at a loopback address")
    context = _context(files, ssl.PROTOCOL_TLS_CLIENT)
    connection = _reached(where, peer, wait_s, say)
    try:
        return _entered(connection, context, role, peer, timeout_s, server=False)
    except _Refused as error:
        raise TransferError(f"party {peer} at {where}: {error}") from error


class _Refused(Exception):  # noqa: N818
    """Why a connection is not what it should be."""


def _check_loopback(where: Address, files: PartyFiles | None, rule: str) -> None:
    if files is None and not where.is_loopback:
        raise ConfigError(f"{rule}, got {where}; certificates come from fedsim certs --parties")


def _context(files: PartyFiles | None, protocol: int) -> ssl.SSLContext | None:
    if files is None:
        return None
    context = ssl.SSLContext(protocol)
    context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED  # names are roles, checked in _named
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_cert_chain(files.certificate, files.key)
        context.load_verify_locations(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        raise DataError(f"{files.certificate}, {files.key} and {files.ca} cannot be used for TLS: {error}") from error
    return context


# ---------------------------------------------------------------- TCP


def _accepted(own: list[socket.socket], wait_s: float | None, peer: str) -> Iterator[tuple[socket.socket, str]]:
    """Connections as they come, and from where."""
    deadline = None if wait_s is None else time.monotonic() + wait_s
    with selectors.DefaultSelector() as selector:
        for one in own:
            selector.register(one, selectors.EVENT_READ)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TransferError(f"party {peer} did not connect within {wait_s:g} s")
            for key, _ in selector.select(left):
                with contextlib.suppress(OSError):  # one that is gone again
                    connection, address = key.fileobj.accept()  # type: ignore[union-attr]
                    yield connection, str(address[0])


def _reached(where: Address, peer: str, wait_s: float | None, say: Say) -> socket.socket:
    deadline, told = time.monotonic() + (float("inf") if wait_s is None else wait_s), ""
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection((where.host, where.port), timeout=max(min(left, CONNECT_S), RETRY_S))
        except OSError as error:
            reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        if left <= RETRY_S:
            raise TransferError(f"party {peer} at {where}: {reason}, for {wait_s:g} s")
        if reason != told:
            say(f"waiting for party {peer} at {where}: {reason}")
            told = reason
        time.sleep(RETRY_S)


# ---------------------------------------------------------------- TLS and roles


def _entered(
    connection: socket.socket, context: ssl.SSLContext | None, role: str, peer: str, timeout_s: float, *, server: bool
) -> SocketLink:
    """A connection as a link to the right party. Raises _Refused, and closes it, if it is to another."""
    try:
        connection.settimeout(HANDSHAKE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if context is not None:
            connection = context.wrap_socket(connection, server_side=server, do_handshake_on_connect=False)
        with _explained():
            if isinstance(connection, ssl.SSLSocket):
                connection.do_handshake()
            _introduced(connection, role, peer, server=server)
    except BaseException:
        _drained(connection)
        raise
    return SocketLink(connection, timeout_s=timeout_s)


def _introduced(connection: socket.socket, role: str, peer: str, *, server: bool) -> None:
    """Check the role in the certificate, and the one that the other party says; tell it if it is the wrong one."""
    channel = Channel(SocketLink(connection, timeout_s=HANDSHAKE_S), "it", timeout_s=HANDSHAKE_S)
    try:
        _check_certificate(connection, peer)
        if not server:
            channel.send("welcome", of_facts({"role": role}))
        said = facts(channel.receive("welcome")).get("role")
        if said != peer:
            raise _Refused(f"party {peer} is expected here, not party {plain(str(said), 20)}")
        if server:
            channel.send("welcome", of_facts({"role": role}))
    except _Refused as error:
        channel.abort(str(error))
        raise


def _check_certificate(connection: socket.socket, peer: str) -> None:
    if not isinstance(connection, ssl.SSLSocket):
        return
    certificate = connection.getpeercert(binary_form=True)
    names = names_in(x509.load_der_x509_certificate(certificate)) if certificate else []
    if name_of(peer) not in names:
        found = plain(", ".join(names)) or "nobody"
        raise _Refused(f"a certificate for {name_of(peer)} is expected here, not one for {found}")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Whatever ends a handshake, in words."""
    try:
        yield
    except (OSError, TransferError) as error:
        cause = error.__cause__ if isinstance(error, TransferError) else error
        while isinstance(cause, TransferError):
            cause = cause.__cause__
        raise _Refused(_words(error, cause)) from error


def _words(error: Exception, cause: BaseException | None) -> str:
    if isinstance(cause, ssl.SSLCertVerificationError):
        rule = "both certificates must come from one fedsim certs --parties"
        return f"its certificate is not accepted here ({cause.verify_message}); {rule}"
    if isinstance(cause, ssl.SSLError):
        return _REASONS.get(cause.reason or "", f"no TLS connection, {cause.reason or cause}")
    if isinstance(cause, TimeoutError):
        return f"it did not say who it is within {HANDSHAKE_S:g} s"
    if isinstance(error, OSError) or str(error) == f"it: {GONE}":
        return "it closed the connection before it said who it is; do both have certificates, or neither?"
    return str(error).removeprefix("it: ")


def _drained(connection: socket.socket) -> None:
    """Close a connection such that what was said last arrives: unread bytes would make it a reset."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        deadline, left = time.monotonic() + _DRAIN_S, _DRAIN_BYTES
        while left > 0 and (wait := deadline - time.monotonic()) > 0:
            connection.settimeout(wait)
            piece = connection.recv(2**16)
            if not piece:
                break
            left -= len(piece)
    connection.close()
