"""``fedsim transfer-party``: one party of a transfer on this machine, directly connected to the others."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.api import folders, transferring
from fedsim.api.running import Run
from fedsim.config import build, parties
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.deploy.address import Address
from fedsim.deploy.listening import listeners
from fedsim.deploy.parties import connect, listen
from fedsim.deploy.party_certificates import ROLES, PartyFiles, party_files
from fedsim.deploy.refusals import Say
from fedsim.deploy.relaying import role_of, roles_of
from fedsim.errors import ConfigError
from fedsim.recording import OnRound
from fedsim.transfer.channel import Channel
from fedsim.transfer.links import Link
from fedsim.transfer.protocols import multiplication_of
from fedsim.transfer.sharing import help_both
from fedsim.transfer.terms import Role

__all__ = ["ROLES", "Options", "take_part"]


@dataclass(frozen=True)
class Options:
    """Who this is, and where the others are.

    role: a, b or helper. listen, connect: where this party waits, or where the other one does; one of them.
    helper: where the helper waits, if there is one.
    certs: folder made by ``fedsim certs --parties``, or this party's in it; None: no TLS, loopback only.
    wait_s: for the others; None: for ever.
    """

    role: str
    listen: Address | None
    connect: Address | None
    helper: Address | None
    certs: Path | None
    wait_s: float | None


def take_part(
    config: Path,
    overrides: Mapping[str, Any],
    options: Options,
    say: Say,
    *,
    on_start: Callable[[Run, transferring.Pair], None],
    on_round: OnRound,
    progress: build.Progress = build.silent,
) -> Run | None:
    """Be a party until the transfer is over.

    Returns:
        This party's part of the run; None for a helper.

    Raises:
        ConfigError, DataError: the config, the data or the certificates are not as they must be.
        TransferError: the others did not come, went away, or the run failed.
    """
    with importable(folders.folder_of(config)), folders.one_thread():
        checked = config_files.load(config, overrides)
        parties.section(checked)
        helped = "helper" in roles_of(checked)
        files = None if options.certs is None else party_files(options.certs, options.role)
        if options.role == "helper":
            _check_needed(helped)
            _help(options, files, say)
            return None
        if helped != (options.helper is not None):
            rule = "needed, this protocol's triples come from one" if helped else "this protocol needs none"
            raise ConfigError(f"--helper: {rule} (transfer.protocol, transfer.triples)")
        prepared = transferring.prepare(checked, role_of(options.role), progress)
        beside = folders.folder_of(config)
        with _channels(options, files, say) as (channel, helper), _multiplying(checked, helper) as multiplication:
            folder = transferring.run_party(
                checked,
                role_of(options.role),
                channel,
                multiplication,
                beside=beside,
                on_start=lambda folder, pair: on_start(Run(folder), pair),
                on_round=on_round,
                prepared=prepared,
            )
    return Run(folder)


def _check_needed(helped: bool) -> None:
    if not helped:
        raise ConfigError("--role: helper is needed only with transfer.protocol: secret-sharing and triples: helper")


def _multiplying(config: Config, helper: Channel | None) -> Any:
    return multiplication_of(parties.agreed(config), helper)


@contextlib.contextmanager
def _channels(options: Options, files: PartyFiles | None, say: Say) -> Iterator[tuple[Channel, Channel | None]]:
    """To the other party, and to the helper if there is one; closed in the end."""
    role = role_of(options.role)
    peer: Role = "b" if role == "a" else "a"
    met: dict[str, Any] = {"role": role, "say": say, "wait_s": options.wait_s}
    with contextlib.ExitStack() as open_ones:

        def channel_to(link: Link, name: str) -> Channel:
            made = Channel(link, name)
            open_ones.callback(made.close)
            return made

        if options.listen is not None:
            channel = channel_to(listen(options.listen, files, peer=peer, **met), f"party {peer}")
        else:
            assert options.connect is not None
            channel = channel_to(connect(options.connect, files, peer=peer, **met), f"party {peer}")
        say(f"connected to party {peer}" + ("" if files else ", without TLS"))
        helper = None
        if options.helper is not None:
            if role == "b":
                channel.receive("hello")  # the helper takes party a first
            helper = channel_to(connect(options.helper, files, peer="helper", **met), "the helper")
            if role == "a":
                channel.send("hello", b"")
        yield channel, helper


def _help(options: Options, files: PartyFiles | None, say: Say) -> None:
    """Wait for both parties, and deal triples until they have finished."""
    assert options.listen is not None
    own = listeners(options.listen)
    channels: list[Channel] = []
    try:
        for peer in ("a", "b"):
            link = listen(options.listen, files, role="helper", peer=peer, say=say, wait_s=options.wait_s, sockets=own)
            channels.append(Channel(link, f"party {peer}"))
        dealt = help_both(*channels)
    finally:
        for channel in channels:
            channel.close()
        for one in own:
            one.close()
    say(f"dealt triples {dealt} times")
