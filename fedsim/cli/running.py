"""Commands that train: run, resume, baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedsim.cli.arguments import CHANGES, CONFIG

if TYPE_CHECKING:
    from fedsim.api import Run
    from fedsim.federation import Federation


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(run)
    app.command()(resume)
    app.command()(baseline)


def run(config: Path = CONFIG, changes: list[str] = CHANGES) -> None:
    """Run a federation and write its run folder with a report."""
    from fedsim import api
    from fedsim.config.read import parse_overrides

    overrides = parse_overrides(changes or [])
    _shown(lambda **hooks: api.run(config, overrides, **hooks))


def resume(
    folder: Path = typer.Argument(metavar="RUN", help="Run folder of an unfinished run."),
    rounds: int | None = typer.Option(None, help="New total number of rounds."),
) -> None:
    """Go on with a run after its last whole round, as if it had never stopped."""
    from fedsim import api

    _shown(lambda **hooks: api.resume(folder, rounds=rounds, **hooks))


def _shown(start: Any) -> None:
    """Run with a display; report and result table at the end, or how to go on."""
    from rich.console import Console

    from fedsim.cli import display

    console = Console()
    begun: list[Path] = []

    def on_start(run: "Run", federation: "Federation") -> None:
        begun.append(run.folder)
        shown.begin(_title(run), len(run.rounds), federation.rounds)

    try:
        with display.for_console(console) as shown:
            done = start(on_start=on_start, on_round=shown.round, progress=shown.loading)
    except BaseException as error:
        if begun:
            said = "interrupted" if isinstance(error, KeyboardInterrupt) else "the last whole round is saved"
            typer.echo(f"{said}; go on with: fedsim resume {begun[0]}", err=True)
        raise
    _finish(console, done)


def _title(run: "Run") -> str:
    config = run.config
    data, model = config["data"], config["model"]
    names = [part["name"] for part in (data["dataset"], data["split"], model, config["strategy"], config["engine"])]
    return "{}: {}, {} split, {}, {}, {} engine".format(config["name"], *names)


def _finish(console: Any, done: "Run") -> None:
    from fedsim.cli.display import result_table

    page = _report(done)
    console.print(result_table(done.summary))
    for name, path in (("run", done.folder), ("report", page)):
        console.print(f"  {name:<8}  {path}", soft_wrap=True, highlight=False, markup=False)


def baseline(config: Path = CONFIG, changes: list[str] = CHANGES) -> None:
    """Run the two baselines of a federation from the same file: centralised, and each client alone."""
    from rich.console import Console

    from fedsim import api
    from fedsim.cli import display
    from fedsim.config.read import parse_overrides

    console = Console()
    with display.for_console(console) as shown:
        done = api.baseline(
            config,
            parse_overrides(changes or []),
            on_start=lambda run, federation: shown.begin(_title(run), 0, federation.rounds),
            on_round=shown.round,
            on_client=lambda done, clients: shown.step("clients alone", done, clients),
            progress=shown.loading,
        )
    console.print(f"{'':14}{'all held-out':>14}{'own held-out, mean over clients':>34}", highlight=False)
    for name, run in (("centralised", done.centralised), ("alone", done.alone)):
        last = run.rounds[-1]
        own = f"{display.percent(last.client_accuracy_mean)} ± {display.percent(last.client_accuracy_std)}"
        line = f"  {name:<12}{display.percent(last.accuracy):>14}{own:>34}  {run.folder}"
        console.print(line, highlight=False, soft_wrap=True)
        _report(run)


def _report(run: "Run") -> Path:
    from fedsim.report import report

    return report.write(run.folder)
