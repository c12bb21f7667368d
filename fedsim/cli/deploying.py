"""Commands for separate machines: server and client."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from fedsim.cli.arguments import CHANGES
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.deploy import joined
    from fedsim.deploy.server import Options

T = TypeVar("T")
CERTS = typer.Option(None, help="Folder made by fedsim certs.")
INSECURE = typer.Option(False, "--insecure", help="No TLS and no keys; loopback addresses only.")
SERVER = typer.Option(None, metavar="HOST:PORT", help="Of fedsim server.  [needed]")
PARTITION = typer.Option(None, help="Number of this client, from 0: the part it holds.  [needed]")
OWN_DATA = typer.Option(False, "--own-data", help="All of CONFIG's data is this client's.")
STATE = typer.Option(None, help="Folder for what is kept between rounds.  [default: user cache]")
STOCK = typer.Option(False, "--stock", help="Use only Flower's supported interfaces; slower.")


def _number(default: float, text: str) -> Any:
    return typer.Option(default, show_default=False, help=f"{text}  [default: {default:g}]")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(server)
    app.command()(client)


def server(
    config: Path | None = typer.Argument(None, metavar="CONFIG", hidden=True),
    changes: list[str] = CHANGES,
    listen: str | None = typer.Option(None, metavar="HOST:PORT", help="Where clients connect to.  [needed]"),
    certs: Path | None = CERTS,
    insecure: bool = INSECURE,
    clients: int | None = typer.Option(None, help="Start when so many are there.  [default: data.clients]"),
    min_clients: int | None = typer.Option(None, help="Of a cohort, in later rounds.  [default: half of it]"),
    wait: float = _number(600, "Seconds to wait for clients that are needed, before giving up."),
    round_timeout: float = _number(600, "Seconds to wait for a round's updates."),
    max_norm_ratio: float = _number(30, "Leave out updates so many times longer than the median."),
    resume: Path | None = typer.Option(None, metavar="RUN", help="Go on with this run, instead of CONFIG."),
    stock: bool = STOCK,
) -> None:
    """Run a federation with clients on separate machines, and write its run folder.

    CONFIG is the YAML file that the clients have, too; KEY.PATH=VALUE replaces a value in it.
    """
    from fedsim.cli.running import shown
    from fedsim.config.read import parse_overrides
    from fedsim.deploy import relaying
    from fedsim.deploy import server as deployed
    from fedsim.deploy.address import Address

    options = deployed.Options(
        listen=Address.parse(_given(listen, "--listen", "where clients connect to, such as 0.0.0.0:9443"), "--listen"),
        certs=_certs(certs, insecure),
        clients=clients,
        min_clients=min_clients,
        wait_s=wait,
        round_timeout_s=round_timeout,
        max_norm_ratio=max_norm_ratio,
        stock=stock,
    )
    if (config is None) == (resume is None):
        raise ConfigError("CONFIG: give either a config or --resume RUN")
    if resume is not None:
        folder = resume
        if changes:
            raise ConfigError(f"--resume: goes on with the run's own config, {changes[0]} cannot change it")
        shown(lambda **hooks: deployed.resume(folder, options, _say, **hooks), again=_again(options))
    elif config is not None:
        path, overrides = config, parse_overrides(changes or [])
        transfer = relaying.asked(path, overrides)
        if transfer is not None:
            relaying.serve(transfer, options, _say)
            return
        shown(lambda **hooks: deployed.serve(path, overrides, options, _say, **hooks), again=_again(options))


def client(
    config: Path = typer.Argument(metavar="CONFIG", hidden=True),
    changes: list[str] = CHANGES,
    server: str | None = SERVER,
    partition: int | None = PARTITION,
    own_data: bool = OWN_DATA,
    certs: Path | None = CERTS,
    insecure: bool = INSECURE,
    wait: float | None = typer.Option(None, help="Seconds to wait for the server.  [default: for ever]"),
    state: Path | None = STATE,
    stock: bool = STOCK,
) -> None:
    """Be one client of a federation that fedsim server runs.

    CONFIG is the server's YAML file, perhaps with a data section of this client's own (--own-data).
    """
    from fedsim.config.read import parse_overrides
    from fedsim.deploy import relaying
    from fedsim.deploy.joined import join

    given = {"own_data": own_data, "state": state, "wait_s": wait, "stock": stock}
    options = options_of_client(server, certs, insecure, partition, **given)
    overrides = parse_overrides(changes or [])
    transfer = relaying.asked(config, overrides)
    if transfer is not None:
        relaying.join(transfer, config, options, _say)
        return
    join(config, overrides, options, _say)


def options_of_client(
    server: str | None, certs: Path | None, insecure: bool, partition: int | None, **more: Any
) -> "joined.Options":
    """What the arguments say of a client."""
    from fedsim.deploy import joined
    from fedsim.deploy.address import Address

    address = Address.parse(_given(server, "--server", "HOST:PORT of fedsim server"), "--server")
    number = _given(partition, "--partition", "the number of this client")
    return joined.Options(address, _certs(certs, insecure), number, **more)


def _given(value: T | None, option: str, what: str) -> T:
    if value is None:
        raise ConfigError(f"{option}: needed, {what}")
    return value


def _certs(certs: Path | None, insecure: bool) -> Path | None:
    if (certs is None) != insecure:
        raise ConfigError("--certs: give either the folder of certificates or --insecure")
    return certs


def _again(options: "Options") -> str:
    security = "--insecure" if options.certs is None else f"--certs {options.certs}"
    return f"fedsim server --listen {options.listen} {security} --resume"


def _say(line: str) -> None:
    typer.echo(line, err=True)
