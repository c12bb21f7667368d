"""Whether a server can be reached, and what refusals mean, in words that say what to do."""

import socket
import ssl
import time
import urllib.request
from email.utils import parsedate_to_datetime

import httpx

from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ClientFiles
from fedsim.deploy.node import Ended
from fedsim.errors import RunError

CONNECT_S = 5.0
AHEAD_S, BEHIND_S = 5, 305  # of the server: a signature from outside this window is refused
_EXPIRED, _NOT_YET, _NAME, _IP = 10, 9, 62, 64  # OpenSSL's X509_V_ERR_*


def reach(server: Address, files: ClientFiles | None) -> str | None:
    """Open a connection, and close it without a request.

    Args:
        server: where.
        files: whose CA must have signed its certificate; None: it speaks no TLS.

    Returns:
        None if the server answers, or a proxy stands between so that only Flower can try; else why it does not answer,
        which may change with time.

    Raises:
        RunError: what waiting does not change: it is not the right server, or there is something wrong with it.
    """
    if proxied(server):
        return None
    try:
        with socket.create_connection((server.host, server.port), timeout=CONNECT_S) as connection:
            if files is None:
                return None
            with _context(files).wrap_socket(connection, server_hostname=server.host):
                return None
    except ssl.SSLCertVerificationError as error:
        raise RunError(_untrusted(server, files, error)) from error
    except ssl.SSLEOFError:
        return "it closes connections"
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
            what = "start it with --certs, or this client with --insecure if both are on one machine"
            raise RunError(f"the server at {server} speaks no TLS: {what}") from error
        raise RunError(f"no TLS connection with the server at {server}: {error.reason or error}") from error
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def explained(ended: Ended, server: Address, files: ClientFiles | None) -> tuple[str, bool]:
    """Why a SuperNode that nobody asked to has ended, and whether another try may help.

    A key that was never taken by this server will not be taken later either; the caller knows whether it was.
    """
    told = f": {ended.told}" if ended.told else ""
    if ended.status < 0:
        return f"Flower's SuperNode was ended by signal {-ended.status}", True
    if ended.code == 0 and ended.status == 0:  # it ends so after a 401, and says nothing
        lost = f"the server at {server} does not know this node any more; was it started anew?"
        return (lost, True) if ended.online else (_unsigned(server, files), False)
    if "[code: 2004]" in ended.told:
        key = "its key is not registered there, or another client runs with the same key"
        return f"the server at {server} does not take this client: {key}", False
    if "[code: 2001]" in ended.told or (files is None and "/register-node" in ended.told):
        return f"the server at {server} takes only clients with keys: use --certs", False
    how = f"its code {ended.code}" if ended.code else f"status {ended.status}"
    return f"Flower's SuperNode ended with {how}{told}", ended.online


def speaks_tls(server: Address) -> bool:
    """Whether a server that was asked in the clear does not answer so."""
    try:
        with socket.create_connection((server.host, server.port), timeout=CONNECT_S) as connection:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            with context.wrap_socket(connection):
                return True
    except OSError:
        return False


def _unsigned(server: Address, files: ClientFiles | None) -> str:
    ahead = clock_ahead(server, files)
    if ahead is not None and not -BEHIND_S <= ahead <= AHEAD_S:
        off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
        rule = f"it must be at most {AHEAD_S} s ahead and {BEHIND_S} s behind; set the clock"
        return f"this machine's clock is {off} that of the server at {server}: {rule}"
    return f"the server at {server} does not accept this client's signature"


def clock_ahead(server: Address, files: ClientFiles | None) -> float | None:
    """Seconds that this machine's clock is ahead of the server's, to about one; None if it does not say.

    The request is for nothing, and the server may report it as refused.
    """
    verify = _context(files) if files else True
    try:
        url = f"{'https' if files else 'http'}://{server}/"
        got = httpx.get(url, verify=verify, timeout=CONNECT_S, trust_env=proxied(server))
        then = parsedate_to_datetime(got.headers["date"]).timestamp()
    except (httpx.HTTPError, OSError, KeyError, ValueError):
        return None
    return time.time() - then - 0.5  # the header has whole seconds


def _context(files: ClientFiles) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks what Flower's does
    context.load_verify_locations(cafile=files.ca)
    return context


def _untrusted(server: Address, files: ClientFiles | None, error: ssl.SSLCertVerificationError) -> str:
    start = f"the certificate of the server at {server}"
    if error.verify_code == _EXPIRED:
        return f"{start} has expired, or this machine's clock is wrong; renew it with fedsim certs --renew"
    if error.verify_code == _NOT_YET:
        return f"{start} is not valid yet: this machine's clock or that of the one that made it is wrong"
    if error.verify_code in (_NAME, _IP):
        remedy = "connect by a name that it was made for, or make one for this name with fedsim certs --host"
        return f"{start} is not for the name {server.host}; {remedy}"
    ca = files.ca if files else "its CA"
    rule = "the client's folder and the server's must come from the same fedsim certs"
    return f"{start} is not signed by {ca} ({error.verify_message}); {rule}"


def proxied(server: Address) -> bool:
    """Whether Flower would go through a proxy of the environment."""
    found = urllib.request.getproxies()
    return bool(found) and not server.is_loopback and not urllib.request.proxy_bypass(server.host)
