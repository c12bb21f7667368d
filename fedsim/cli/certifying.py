"""Commands for the certificates of separate machines: certs, doctor."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedsim.cli.arguments import CHANGES, CONFIG
from fedsim.cli.deploying import CERTS, INSECURE, OWN_DATA, PARTITION, SERVER, STATE, options_of_client
from fedsim.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsim.deploy.checks import Checked

_STYLES = {"ok": "green", "problem": "bold red", "skipped": "dim"}


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(certs)
    app.command()(doctor)


def certs(
    what: list[str] = typer.Argument(metavar="[check] DIR", hidden=True),
    host: list[str] = typer.Option([], metavar="NAME", help="Name or address of the server; may be repeated."),
    clients: int | None = typer.Option(None, help="Make keys for so many clients."),
    days: int = typer.Option(
        365, show_default=False, help="The server's certificate is good for so long.  [default: 365]"
    ),
    renew: bool = typer.Option(False, "--renew", help="A new server certificate, from the same authority."),
    parties: bool = typer.Option(False, "--parties", help="For the two parties of a transfer, and their helper."),
) -> None:
    """Make the certificates and keys of a federation on separate machines, or check them.

    fedsim certs DIR --host NAME --clients N makes what is missing: an authority, the server's certificate, a pair
    of keys for each client. With --parties instead it makes the certificates of a transfer's parties. fedsim certs
    check DIR shows what is in DIR, when it expires and what is wrong.
    """
    if what[0] == "check" and (len(what) == 2 or not (host or clients or renew or parties)):
        if len(what) != 2 or host or clients or renew or parties:
            raise ConfigError("certs check: takes one folder, and no options")
        _check(Path(what[1]))
        return
    if len(what) != 1:
        raise ConfigError(f"certs: takes one folder, got {shlex.join(what)}")
    from fedsim.deploy import authority, checks

    folder = Path(what[0])
    if parties:
        _for_parties(folder, needless=bool(host) or clients is not None, days=days, renew=renew)
        return
    if clients is None:
        raise ConfigError("--clients: needed, the number of clients to make keys for")
    made = authority.make(folder, host, clients, days=days, renew=renew)
    for line in _told(folder, made, checks.check(folder)):
        typer.echo(line)
    if renew:
        typer.echo("start fedsim server again to use the new certificate; clients need nothing new")


def _for_parties(folder: Path, *, needless: bool, days: int, renew: bool) -> None:
    from fedsim.deploy.checks import check
    from fedsim.deploy.party_certificates import ROLES, name_of, write_party_certificates

    if needless:
        raise ConfigError("--parties: goes without --host and --clients; parties are known by their roles")
    made = write_party_certificates(folder, days=days, renew=renew)
    if not made:
        typer.echo(f"{folder}: nothing was missing")
        return
    until = min(one.until for one in check(folder) if one.until)
    typer.echo(f"made {len(made)} files in {folder}; good until {until:%Y-%m-%d}")
    typer.echo(f"copy to each party's machine its own folder, and nothing else: {', '.join(map(name_of, ROLES))}")
    if (folder / "ca.key").exists():
        typer.echo(f"keep {folder / 'ca.key'} somewhere else; only fedsim certs needs it")


def _told(folder: Path, made: list[Path], found: list["Checked"]) -> list[str]:
    if not made:
        return [f"{folder}: nothing was missing"]
    until = [f"{one.file.name} until {one.until:%Y-%m-%d}" for one in found if one.until]
    names = next((one.names for one in found if one.kind == "server"), "")
    lines = [
        f"made {len(made)} file{'s' * (len(made) > 1)} in {folder}; good: {', '.join(until)}",
        f"the server's names: {names}",
    ]
    new = sorted({path.parent.name for path in made} - {folder.name}, key=lambda name: (len(name), name))
    if new:
        shown = ", ".join(new[:3]) + (f" to {new[-1]}" if len(new) > 3 else "")
        lines.append(f"copy to each client's machine its own folder, and nothing else: {shown} in {folder}")
    if (folder / "ca.key").exists():
        lines.append(f"keep {folder / 'ca.key'} somewhere else; only fedsim certs needs it")
    return lines


def _check(folder: Path) -> None:
    from rich.table import Table

    from fedsim.cli.display import console
    from fedsim.deploy.checks import check

    found = check(folder)
    table = Table("file", "kind", "for", "expires", "SHA-256", "", box=None, padding=(0, 2))
    table.columns[4].overflow = "fold"
    for one in found:
        expires = "" if one.until is None else f"{one.until:%Y-%m-%d} ({one.days_left} days)"
        name, state = str(one.file.relative_to(folder)), "problem" if one.problem else "ok"
        table.add_row(name, one.kind, one.names, expires, one.fingerprint, state)
    console().print(table)
    problems = [one.problem for one in found if one.problem]
    for line in problems:
        typer.echo(line)
    if problems:
        raise DataError(f"{folder}: {len(problems)} problem{'s' * (len(problems) > 1)}, see above")


def doctor(
    config: Path = CONFIG,
    changes: list[str] = CHANGES,
    server: str | None = SERVER,
    partition: int | None = PARTITION,
    own_data: bool = OWN_DATA,
    certs: Path | None = CERTS,
    insecure: bool = INSECURE,
    state: Path | None = STATE,
) -> None:
    """Look at everything that fedsim client needs with these arguments, without starting it."""
    from rich.text import Text

    from fedsim.cli.display import console
    from fedsim.config.read import parse_overrides
    from fedsim.deploy.doctor import examine

    options = options_of_client(server, certs, insecure, partition, own_data=own_data, state=state)
    out, codes = console(), []
    for one in examine(config, parse_overrides(changes or []), options):
        codes += [one.exit_code] * (one.state == "problem")
        lines = [*one.what.splitlines(), *one.remedy.splitlines()]
        text = Text.assemble((f"{one.state:<8}", _STYLES[one.state]), f"  {one.name:<12}  ", f"\n{'':24}".join(lines))
        out.print(text, soft_wrap=True)
    if codes:
        told = f"{len(codes)} problem{'s' * (len(codes) > 1)}, see above"
        raise ConfigError(told) if ConfigError.exit_code in codes else DataError(told)
    typer.echo("all is in place")
