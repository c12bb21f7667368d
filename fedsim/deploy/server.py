"""``fedsim server``: the round loop, the run folder, and the link to clients on separate machines."""

import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import runs
from fedsim.api import running
from fedsim.config import build, pruned
from fedsim.config import load as config_files
from fedsim.config.schema import Config
from fedsim.deploy import contents, serving, settings
from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ServerFiles, server_files
from fedsim.deploy.members import Members, Post
from fedsim.deploy.refusals import Say
from fedsim.deploy.superlink import superlink
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError
from fedsim.federation import Federation
from fedsim.recording import OnRound
from fedsim.records import ServerState

END_S, END_STOCK_S = 10.0, 60.0  # for clients to hear that the run is over
DEPLOYMENT = {"engine": {"name": "flower", "runtime": "deployment"}}


@dataclass(frozen=True)
class Options:
    """How a server listens and what it puts up with. None: by the number of clients of the federation.

    certs: folder made by ``fedsim certs``; None: no TLS and no keys, for loopback addresses only.
    clients: that must be there before the first round; None: all.
    min_clients: of a cohort, that must be there before any other round; None: half of the cohort, rounded up.
    stock: use nothing of Flower but its supported interfaces, which is slower.
    """

    listen: Address
    certs: Path | None
    clients: int | None = None
    min_clients: int | None = None
    wait_s: float = 600.0
    round_timeout_s: float = 600.0
    max_norm_ratio: float = 30.0
    stock: bool = False


def serve(
    config: Path,
    overrides: Mapping[str, Any],
    options: Options,
    say: Say,
    *,
    on_start: running.OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
) -> running.Run:
    """Run a federation whose clients are on machines of their own, and write its run folder.

    Args:
        config: path of the YAML file, the same that the clients have.
        overrides: dotted key -> value.
        options: see there.
        say: prints a line for a person.
        on_start, on_round, progress: as in :func:`fedsim.run`.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError: nothing was written.
        RunError: the run failed; its state is in the folder.
    """
    changes = {**overrides, **DEPLOYMENT}
    _check(options, config_files.load(config, changes))
    hooks: dict[str, Any] = {"on_start": on_start, "on_round": on_round, "progress": progress}
    return running.run(config, changes, loop=_loop(options, listening_files(options), say), **hooks)


def resume(
    folder: Path,
    options: Options,
    say: Say,
    *,
    on_start: running.OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
) -> running.Run:
    """Go on with a run of :func:`serve` after its last whole round; clients reconnect by themselves."""
    found = runs.open_run(folder).config()
    if found.get("engine") != DEPLOYMENT["engine"]:
        raise ConfigError(f"--resume: {folder} is no run of fedsim server; go on with it with fedsim resume")
    _check(options, config_files.check(found))
    hooks: dict[str, Any] = {"on_start": on_start, "on_round": on_round, "progress": progress}
    return running.resume(folder, loop=_loop(options, listening_files(options), say), **hooks)


def listening_files(options: Options) -> ServerFiles | None:
    """What the server needs of the folder of certificates; None without one.

    Raises:
        ConfigError: there is none, for an address that others can reach.
    """
    if options.certs is not None:
        return server_files(options.certs)
    if not options.listen.is_loopback:
        rule = "without certificates a server may listen on a loopback address only"
        raise ConfigError(f"--listen: {rule}, got {options.listen}; make them with fedsim certs")
    return None


def _loop(options: Options, files: ServerFiles | None, say: Say) -> running.Loop:
    """The rounds with clients that come over the network."""

    def loop(
        folder: Path, federation: Federation, engine: Engine, state: ServerState, take: Callable[..., None]
    ) -> None:
        rules = _rules(options, federation)
        facts = contents.RunFacts(_word(folder), settings.encode(_settings(folder)))
        with (
            superlink(options.listen, files, stock=options.stock, say=say, log=folder / "superlink.log") as link,
            link.grid() as grid,
        ):
            sizes = federation.data.partition.sizes().tolist()
            post = Post(grid, link.check)
            members = Members(post, facts, federation.data.num_clients, link.nodes, sizes, say)
            say(f"listening on {link.address}" + ("" if files else ", without TLS"))
            serving.serve(federation, state, members, rules, take)
            serving.end(members, END_STOCK_S if options.stock else END_S)

    return loop


def _check(options: Options, config: Config) -> None:
    """Refuse what cannot be before a folder is made."""
    pruned.check_apart(config)
    clients, cohort = config.data.clients, config.train.clients_per_round
    highest = {"--clients": clients, "--min-clients": clients if cohort == "all" else cohort}
    problems = []
    for name, value, lowest in (
        ("--wait", options.wait_s, 0),
        ("--round-timeout", options.round_timeout_s, 0),
        ("--max-norm-ratio", options.max_norm_ratio, 1),
        ("--clients", options.clients, 1),
        ("--min-clients", options.min_clients, 1),
    ):
        most = highest.get(name)
        if value is not None and not (value >= lowest and (most is None or value <= most)):
            rule = f"between {lowest} and {most}" if most is not None else f">= {lowest}"
            problems.append(f"{name}: must be {rule}, got {value:g}")
    if problems:
        raise ConfigError(problems)


def _rules(options: Options, federation: Federation) -> serving.Rules:
    cohort = federation.clients_per_round
    return serving.Rules(
        clients=options.clients or federation.data.num_clients,
        min_clients=options.min_clients or -(-cohort // 2),
        wait_s=options.wait_s,
        round_timeout_s=options.round_timeout_s,
        max_norm_ratio=options.max_norm_ratio,
    )


def _settings(folder: Path) -> settings.Settings:
    return settings.shared(config_files.check(runs.open_run(folder).config()))


def _word(folder: Path) -> str:
    """A word that no other run has; clients keep their states under it, and a resumed run must find them."""
    path = folder / "checkpoint" / "run"
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    word = secrets.token_hex(16)
    with runs.writing(folder):
        runs.write_bytes(path, word.encode())
    return word
