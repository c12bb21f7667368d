"""Commands that check: whether a run can be repeated, what this machine does with a config."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from fedsim.cli.arguments import CHANGES, CONFIG, RUN

if TYPE_CHECKING:
    from fedsim.api import Bench

DIFFERS = 1  # exit code of a run that does not repeat


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(verify)
    app.command()(bench)


def verify(
    folder: Path = RUN,
    rounds: str = typer.Option("3", metavar="K|all", help="How many of its first rounds.", show_default=False),
    changes: list[str] = CHANGES,
) -> None:
    """Run the first rounds of a run again and compare.

    RUN is a run folder; nothing is written into it. Three rounds are run unless --rounds says; with all, the final
    tensors are compared as well. KEY.PATH=VALUE may name another engine (engine.name=reference) or another place of the
    data (data.root, data.dataset.path). Exit code 1 means that it differs by more than rounding.
    """
    from fedsim import api
    from fedsim.cli import display
    from fedsim.config.read import parse_overrides

    overrides = parse_overrides(changes or [])
    with display.for_console(display.console()) as shown:
        done = api.verify(
            folder,
            _count(rounds),
            overrides,
            on_start=lambda engine, count: shown.begin(f"again, with engine {engine}", [], count),
            on_round=shown.round,
            progress=shown.loading,
        )
    for line in done.told():
        typer.echo(line)
    if not done.equal:
        raise typer.Exit(DIFFERS)


def _count(text: str) -> int | Literal["all"]:
    from fedsim.errors import ConfigError

    if text == "all":
        return "all"
    if not text.isdecimal():
        raise ConfigError(f"--rounds: must be a whole number >= 1, or all, got {text}")
    return int(text)


def bench(
    config: Path = CONFIG,
    changes: list[str] = CHANGES,
    as_json: bool = typer.Option(False, "--json", help="Print JSON, for scripts."),
) -> None:
    """Measure what this machine does with a config.

    CONFIG and KEY.PATH=VALUE are those of fedsim run. Shown are the speed of every way to train a client, which one a
    run would take and why, how much of the machine's peak that is, and how long the whole run would take. Nothing is
    written.
    """
    from fedsim import api
    from fedsim.cli import display
    from fedsim.config.read import parse_overrides

    overrides = parse_overrides(changes or [])
    if as_json:
        typer.echo(json.dumps(asdict(api.bench(config, overrides)), indent=2))
        return
    console = display.console()
    with display.for_console(console) as shown:
        found = api.bench(config, overrides, progress=shown.loading)
    console.print(_table(found))


def _table(found: "Bench") -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*_of_training(found), *_of_run(found)]:
        table.add_row(name, Text(value))
    return table


def _of_training(found: "Bench") -> list[tuple[str, str]]:
    from fedsim.data.locations import cache_folder
    from fedsim.report.numbers import number, percent

    paths, does = found.paths, found.arithmetic
    rows = [("machine", f"{found.cpu}, {found.cores} cores, torch {found.torch}")]
    if found.engine != "local":
        rows.append(("engine", f"{found.engine} is not measured; all that follows is of local"))
    rows += [(plan, f"{number(round(speed))} examples/s in one process") for plan, speed in paths.speeds.items()]
    rows += [(plan, "not tried, fewer clients at once were slow already") for plan in paths.left_out]
    rows += [(f"not {path}", why) for path, why in paths.refused.items()]
    rows.append(("chosen", f"{paths.chosen}: {paths.why}"))
    if paths.remembered is not None:
        other = f"{paths.remembered}, which runs take; to have it measured anew, remove {cache_folder('plans')}"
        rows.append(("remembered", "the same" if paths.remembered == paths.chosen else other))
    share = "nothing that is counted" if does.share is None else percent(does.share, 1)
    peak = f"{does.peak / 1e9:.1f} GFLOP/s of a matrix product, at {does.per_example / 1e6:.3g} MFLOP an example"
    return [*rows, ("of peak", f"{share} of {peak}")]


def _of_run(found: "Bench") -> list[tuple[str, str]]:
    from fedsim.report.numbers import duration, number

    run = found.estimate
    times = f"{duration(run.training_s)} training on {number(round(run.trained))} examples"
    tested = f"{duration(run.evaluation_s)} scoring {number(run.tested)} at {number(round(run.test_speed))} examples/s"
    started = f", {duration(run.start_s)} starting workers" * (found.workers > 1)
    return [
        ("workers", f"{found.workers}: {found.workers_why}"),
        ("whole run", f"about {duration(run.total_s)}: {times}, {tested}{started}"),
    ]
