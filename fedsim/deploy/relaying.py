"""A transfer through Flower's machines: ``fedsim server`` passes on sealed frames, ``fedsim client`` is a party."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from fedsim import runs
from fedsim.api import folders, transferring
from fedsim.config import load as config_files
from fedsim.config import parties
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.deploy import joined, members, server
from fedsim.deploy.client import run_client
from fedsim.deploy.party_certificates import ROLES
from fedsim.deploy.refusals import Say
from fedsim.deploy.superlink import superlink
from fedsim.errors import ConfigError, RunError
from fedsim.records import RoundRecord
from fedsim.report import report
from fedsim.transfer.channel import Channel
from fedsim.transfer.links import SealedLink
from fedsim.transfer.protocols import multiplication_of
from fedsim.transfer.relayed import PASS, Mailbox, party_app, relay
from fedsim.transfer.sharing import help_both
from fedsim.transfer.terms import Role

STOCK = "--stock: a party of a transfer lives through many messages, which Flower's supported interfaces do not offer"


def asked(config: Path, overrides: Mapping[str, Any]) -> Config | None:
    """The checked config, if it is of a transfer."""
    with importable(folders.folder_of(config)):
        found = config_files.load(config, overrides)
    return None if found.transfer is None else found


def roles_of(config: Config) -> tuple[str, ...]:
    """Who takes part, by number of the client: a helper only where one deals triples."""
    assert config.transfer is not None
    helped = config.transfer.protocol == "secret-sharing" and config.transfer.triples == "helper"
    return ROLES if helped else ROLES[:2]


def serve(config: Config, options: server.Options, say: Say) -> int:
    """Pass on frames between the parties until they have finished: bytes passed on. Nothing is written.

    Raises:
        ConfigError, DataError: the options or certificates are not as they must be.
        RunError: a party did not come, went away, or failed.
    """
    if options.stock:
        raise ConfigError(STOCK)
    files = server.listening_files(options)
    roles = roles_of(config)
    with superlink(options.listen, files, say=say) as link, link.grid() as grid:
        post = members.Post(grid, link.check)
        say(f"listening on {link.address}" + ("" if files else ", without TLS"))
        nodes = _nodes(post, link.nodes, roles, options.wait_s, say)

        def exchange(contents: Mapping[int, RecordDict]) -> Mapping[int, RecordDict]:
            found = {}
            for node, reply in post.exchange(contents, PASS, options.round_timeout_s).items():
                if isinstance(reply, str):
                    raise RunError(f"a party {reply}")
                if reply.has_error():
                    raise RunError(f"a party failed: {reply.error.reason}")
                found[node] = reply.content
            return found

        named = {roles[client]: node for client, node in link.nodes.items() if client < len(roles)}
        passed = relay(exchange, nodes, named)
    say(f"passed on {passed} bytes that only the parties can read")
    return passed


def _nodes(
    post: members.Post, registered: Mapping[int, int], roles: tuple[str, ...], wait_s: float, say: Say
) -> list[int]:
    """Nodes of the parties, once all are there."""
    wanted = {node for client, node in registered.items() if client < len(roles)} if registered else None

    def here() -> set[int]:
        online = post.online()
        return online if wanted is None else online & wanted

    say(f"waiting for {len(roles)} parties: clients 0 to {len(roles) - 1} are {', '.join(roles)}")
    members.until(lambda: len(here()) >= len(roles), wait_s, post.check, "the parties have not all come")
    return sorted(here())[: len(roles)]


def join(config: Config, path: Path, options: joined.Options, say: Say) -> None:
    """Be a party, or the helper, behind a server; its part of the run is written here.

    Raises:
        ConfigError, DataError: the config, the data or the certificates are not as they must be.
        TransferError: the run failed. RunError: the server does not take this client, or did not come.
    """
    roles = roles_of(config)
    if options.stock:
        raise ConfigError(STOCK)
    if options.partition >= len(roles):
        raise ConfigError(f"--partition: must be below {len(roles)}, the number of parties, got {options.partition}")
    role, files = roles[options.partition], joined.connecting_files(options)
    torch.set_num_threads(1)
    mailbox, over, raised = Mailbox(role), threading.Event(), list[BaseException]()
    act = (
        _helper(mailbox, roles)
        if role == "helper"
        else _party(config, path, role_of(role), mailbox, helped="helper" in roles, say=say)
    )

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)
        finally:
            mailbox.abandon()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    say(f"party {role}" if role != "helper" else "the helper")
    try:
        run_client(
            party_app(lambda _: mailbox, over=over.set),
            options.server,
            files,
            partition=options.partition,
            say=say,
            state=joined.state_folder(options),
            until=over,
            wait_s=options.wait_s,
        )
    finally:
        mailbox.abandon()
        thread.join(30)
    if raised:
        raise raised[0]


def role_of(role: str) -> Role:
    """The role of a party that has data."""
    return "a" if role == "a" else "b"


def _party(config: Config, path: Path, role: Role, mailbox: Mailbox, *, helped: bool, say: Say) -> Callable[[], None]:
    peer: Role = "b" if role == "a" else "a"
    prepared = transferring.prepare(config, role)
    link = SealedLink(mailbox.link(peer), role == "a")
    helper = SealedLink(mailbox.link("helper"), True) if helped else None

    def act() -> None:
        channel = Channel(link, f"party {peer}")
        at_helper = None if helper is None else Channel(helper, "the helper")
        try:
            with multiplication_of(parties.agreed(config), at_helper) as multiplication:
                folder = transferring.run_party(
                    config,
                    role,
                    channel,
                    multiplication,
                    beside=folders.folder_of(path),
                    on_start=folders.ignore,
                    on_round=lambda record: say(told(record)),
                    prepared=prepared,
                )
            say(f"finished: {report.write(folder)}{_accuracy(folder)}")
        finally:
            for one in (channel, at_helper):
                if one is not None:
                    one.close()

    return act


def told(record: RoundRecord) -> str:
    """A line of an iteration at one party; the loss is known at A."""
    loss = "" if record.train_loss is None else f"  loss {record.train_loss:.4f}"
    return f"iteration {record.round}{loss}  {record.seconds:.2f} s"


def _accuracy(folder: Path) -> str:
    found = runs.open_run(folder).summary().get("accuracy")
    return "" if found is None else f", accuracy {100 * found:.2f} %"


def _helper(mailbox: Mailbox, roles: tuple[str, ...]) -> Callable[[], None]:
    ends = [SealedLink(mailbox.link(role), False) for role in roles[:2]]

    def act() -> None:
        channels = [Channel(link, f"party {role}") for link, role in zip(ends, roles, strict=False)]
        try:
            help_both(*channels)
        finally:
            for channel in channels:
                channel.close()

    return act
