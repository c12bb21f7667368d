"""Command for the parties of a transfer on separate machines."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedsim.cli.arguments import CHANGES
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.deploy.meeting import Options

LISTEN = typer.Option(None, metavar="HOST:PORT", help="Wait here for the other party (a helper: for both).")
CONNECT = typer.Option(None, metavar="HOST:PORT", help="Where the other party listens.")
HELPER = typer.Option(None, metavar="HOST:PORT", help="Where the helper listens, if triples come from one.")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command(name="transfer-party")(transfer_party)


def transfer_party(
    config: Path = typer.Argument(metavar="CONFIG", hidden=True),
    changes: list[str] = CHANGES,
    role: str | None = typer.Option(None, help="a (with labels), b (without), or helper.  [needed]"),
    listen: str | None = LISTEN,
    connect: str | None = CONNECT,
    helper: str | None = HELPER,
    certs: Path | None = typer.Option(None, help="Folder made by fedsim certs --parties, or this party's part of it."),
    insecure: bool = typer.Option(False, "--insecure", help="No TLS; loopback addresses only."),
    wait: float | None = typer.Option(None, help="Seconds to wait for the others.  [default: for ever]"),
) -> None:
    """Be one party of a transfer, on this machine.

    CONFIG is a YAML file with a transfer section; KEY.PATH=VALUE replaces a value in it. A run folder with this
    party's part is written. What both parties need alike
    is compared when they meet; model, optimizer, pruning and data may be each party's own.
    """
    from fedsim.cli import display
    from fedsim.cli.running import finish
    from fedsim.config.read import parse_overrides
    from fedsim.deploy import meeting
    from fedsim.deploy.relaying import told

    options = _options(role, listen, connect, helper, certs, insecure, wait)
    console = display.console()
    with display.for_console(console) as shows:
        done = meeting.take_part(
            config,
            parse_overrides(changes or []),
            options,
            lambda line: typer.echo(line, err=True),
            on_start=lambda run, pair: shows.begin(f"{run.config['name']}: party {role}", [], pair.rounds),
            on_round=lambda record: typer.echo(told(record)),
            progress=shows.loading,
        )
    if done is not None:
        finish(console, done)


def _options(
    role: str | None,
    listen: str | None,
    connect: str | None,
    helper: str | None,
    certs: Path | None,
    insecure: bool,
    wait: float | None,
) -> "Options":
    from fedsim.deploy import meeting
    from fedsim.deploy.address import Address

    if role not in meeting.ROLES:
        raise ConfigError(
            f"--role: must be {', '.join(meeting.ROLES[:-1])} or {meeting.ROLES[-1]}, got {role or 'none'}"
        )
    if (certs is None) != insecure:
        raise ConfigError("--certs: give either the folder of certificates or --insecure")
    if (listen is None) == (connect is None):
        raise ConfigError("--listen: give either --listen or --connect; one party listens, the other connects")
    if role == "helper" and listen is None:
        raise ConfigError("--listen: needed, a helper waits for both parties")
    return meeting.Options(
        role=role,
        listen=None if listen is None else Address.parse(listen, "--listen"),
        connect=None if connect is None else Address.parse(connect, "--connect"),
        helper=None if helper is None else Address.parse(helper, "--helper"),
        certs=certs,
        wait_s=wait,
    )
