"""The preflight check of a client: everything that must be so, looked at before anything starts.

Each check returns what it has found, or raises ``Problem``, ``Skipped`` or what ``fedsim client`` itself would raise.
"""

import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from fedsim.api.folders import folder_of
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.deploy import interventions, reaching
from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ClientFiles, client_files
from fedsim.deploy.joined import Options, state_folder
from fedsim.deploy.joining import participant
from fedsim.deploy.participation import Participant, versions
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.params import num_entries, of

State = Literal["ok", "problem", "skipped"]

ROOM = 20  # models that must fit on the disk
TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """One check. what: found. remedy: what to do about a problem. exit_code: of the command that found a problem."""

    name: str
    state: State
    what: str
    remedy: str = ""
    exit_code: int = 0


class Problem(Exception):  # noqa: N818 -- it becomes a finding
    """What is wrong, and what to do."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy


class Skipped(Exception):  # noqa: N818 -- it becomes a finding
    """Why this could not be looked at."""


@dataclass
class Found:
    """What earlier checks have found for later ones.

    security: the certificates are as they must be, or there are to be none.
    known, connected, trusted: name, connection and TLS are well, or are the business of a proxy.
    """

    checked: bool = False
    participant: Participant | None = None
    security: bool = False
    files: ClientFiles | None = None
    known: bool = False
    connected: bool = False
    trusted: bool = False


def examine(config: Path, overrides: Mapping[str, Any], options: Options) -> Iterator[Finding]:
    """Look at everything that a client with these arguments needs; nothing is started and nothing is written.

    Yields:
        One finding for each check, in an order in which a later one may need an earlier one.

    Raises:
        ConfigError: no certificates, and the server is not at a loopback address.
    """
    found, server = Found(), options.server
    if options.certs is None and not server.is_loopback:
        raise ConfigError(f"--insecure: for a server at a loopback address only, got {server}; use --certs")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", check_versions),
        ("config", lambda: check_config(found, config, overrides)),
        ("data", lambda: check_data(found, config, overrides, options)),
        ("disk", lambda: check_disk(state_folder(options), found.participant)),
        ("certificates", lambda: check_certificates(found, options)),
        ("name", lambda: check_name(found, server)),
        ("connection", lambda: check_connection(found, server)),
        ("TLS", lambda: check_tls(found, server)),
        ("clock", lambda: check_clock(found, server)),
        ("key", lambda: check_key(found, server)),
    ]
    for name, check in checks:
        yield _finding(name, check)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    wrong = DataError.exit_code
    try:
        return Finding(name, "ok", check())
    except Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except Problem as problem:
        return Finding(name, "problem", str(problem), problem.remedy, wrong)
    except ConfigError as error:
        return Finding(name, "problem", str(error), exit_code=ConfigError.exit_code)
    except (FedsimError, OSError) as error:
        return Finding(name, "problem", str(error), exit_code=wrong)


def check_versions() -> str:
    """Whether Flower is the one that the quick ways are for."""
    found = f"{versions()}, flwr {version('flwr')}, {platform.system()}"
    if not interventions.fits("client"):
        remedy = f"install flwr {interventions.MADE_FOR}; with this one, rounds take some seconds longer"
        raise Problem(f"{found}; this version of Flower is not the one that fedsim's quick path was made for", remedy)
    return found


def check_config(found: Found, config: Path, overrides: Mapping[str, Any]) -> str:
    """Whether the config is right."""
    with importable(folder_of(config)):
        checked = config_files.load(config, overrides)
    found.checked = True
    return f"{config}: {checked.name}, {checked.data.clients} clients"


def check_data(found: Found, config: Path, overrides: Mapping[str, Any], options: Options) -> str:
    """Whether the data is there, and this client has some of it."""
    if not found.checked:
        raise Skipped("the config is not as it must be")
    partition, own_data = options.partition, options.own_data
    states = state_folder(options)
    who = participant(config, overrides, partition=partition, own_data=own_data, states=states, say=lambda _: None)
    found.participant = who
    return f"client {partition} has {len(who.train)} examples to train on and {len(who.test)} held out"


def check_disk(folder: Path, who: Participant | None) -> str:
    """Whether what a client keeps between rounds has room where it is kept."""
    at = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(at).free
    entries = 0 if who is None else num_entries(of(who.work.model)[0])
    needed = ROOM * 4 * entries + 50_000_000
    told = f"{free / 1e9:.1f} GB free in {at}"
    elsewhere = "choose another folder with --state"
    if not (at.is_dir() and os.access(at, os.W_OK | os.X_OK)):
        raise Problem(f"{at} cannot be written to", elsewhere)
    if free < needed:
        raise Problem(f"{told}, {needed / 1e9:.1f} GB needed", f"free some, or {elsewhere}")
    return told


def check_certificates(found: Found, options: Options) -> str:
    """Whether the files are as they must be; without any, whether that is allowed."""
    if options.certs is not None:
        found.files = client_files(options.certs, options.partition)
        found.security = True
        return f"{found.files.folder}: authority and keys are as they must be"
    found.security = True
    raise Skipped("--insecure: no certificates, and a server on this machine only")


def check_name(found: Found, server: Address) -> str:
    """Whether the server's name has an address."""
    try:
        addresses = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except OSError as error:
        if reaching.proxied(server):
            raise Skipped("a proxy looks it up") from error
        raise Problem(f"{server.host} is not known: {error.strerror or error}", "is the name right?") from error
    found.known = True
    return f"{server.host} is {', '.join(sorted({str(one[4][0]) for one in addresses}))}"


def check_connection(found: Found, server: Address) -> str:
    """Whether something listens there."""
    if reaching.proxied(server):
        found.connected = True
        raise Skipped("a proxy makes it")
    if not found.known:
        raise Skipped("the server's name is not known")
    try:
        with socket.create_connection((server.host, server.port), TIMEOUT_S) as link:
            where = link.getpeername()[0]
    except OSError as error:
        remedy = "is fedsim server running there, and does a firewall let this machine in?"
        raise Problem(f"{server} does not answer: {error.strerror or error}", remedy) from error
    found.connected = True
    return f"{server} answers (at {where})"


def check_tls(found: Found, server: Address) -> str:
    """Whether the server is the one whose authority the client trusts; what is wrong is told apart."""
    _need_connection(found)
    if reaching.proxied(server):
        found.trusted = True
        raise Skipped("a proxy stands between; the next checks would fail without it")
    if found.files is None and reaching.speaks_tls(server):
        raise Problem(f"the server at {server} speaks TLS", "use --certs instead of --insecure")
    missing = reaching.reach(server, found.files)
    if missing is not None:
        raise Problem(f"no TLS connection with {server}: {missing}", "is this the port of fedsim server?")
    found.trusted = True
    return "the server is who its certificate says" if found.files else "plain, as --insecure says"


def check_clock(found: Found, server: Address) -> str:
    """Whether the clocks agree well enough for signatures: they hold the time."""
    _need_trust(found)
    ahead = reaching.clock_ahead(server, found.files)
    if ahead is None:
        raise Skipped("the server did not tell its time")
    told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server"
    if not -reaching.BEHIND_S <= ahead <= reaching.AHEAD_S:
        rule = f"at most {reaching.AHEAD_S} s ahead or {reaching.BEHIND_S} s behind is accepted"
        raise Problem(told, f"set the clock: {rule}")
    return told


def check_key(found: Found, server: Address) -> str:
    """Whether the server knows the client's key: its node is there for a moment."""
    if found.security and found.files is None:
        raise Skipped("--insecure: there are no keys")
    _need_trust(found)
    if not interventions.fits("client"):
        raise Skipped("this version of Flower cannot be asked")
    from fedsim.deploy.interventions.client import registered  # noqa: PLC0415 -- its names are those of one version

    assert found.files is not None, "there are files where there is security"
    refusal = registered(server, found.files)
    if refusal:
        known = "is its key in the folder that the server was started with (--certs)?"
        raise Problem(refusal, f"is this client running already? if not, {known}")
    return "the server knows this key"


def _need_connection(found: Found) -> None:
    if not found.connected:
        raise Skipped("there is no connection")
    if not found.security:
        raise Skipped("the certificates are not in order")


def _need_trust(found: Found) -> None:
    _need_connection(found)
    if not found.trusted:
        raise Skipped("the server is not the right one")
