"""The command that runs an existing Flower app."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fedsim.api.flower_folder import FlowerApp
    from fedsim.api.running import Run
    from fedsim.records import RoundRecord

APP = typer.Argument(metavar="PATH", hidden=True)
CONFIG = typer.Option([], "--run-config", metavar="PAIRS", help="Changes of the app's config: \"k=v k2='s'\".")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("flower-run")(flower_run)


def flower_run(
    path: Path = APP,
    clients: int | None = typer.Option(None, help="Nodes.  [default: the app's num-supernodes, else 10]"),
    run_config: list[str] = CONFIG,
    seed: int | None = typer.Option(None, help="Seeds Python's, NumPy's and torch's generators: the run repeats."),
    output: Path = typer.Option(Path("runs"), help="Folder of run folders."),
    threads: int = typer.Option(1, help="Of torch."),
) -> None:
    """Run an existing Flower app as it is, without Ray, and write its run folder with a report.

    PATH is the folder of the app, with the pyproject.toml that names its ServerApp and its ClientApp.
    """
    from fedsim.api.flower_running import flower_run as start
    from fedsim.cli import display

    console = display.console()
    shows = display.Lines(console)  # no bars: the app prints, too

    def on_start(run: "Run", app: "FlowerApp", nodes: int) -> None:
        said = (
            "as asked for" if clients else "as its pyproject.toml says" if app.clients else "it does not say how many"
        )
        shows.line(f"{app.name}: Flower app, {nodes} clients ({said}), in one process")

    def on_round(record: "RoundRecord") -> None:
        shows.line(_round(record))
        for client, why in record.failed.items():
            shows.line(f"  client {client} failed, {why}")

    done = start(
        path,
        clients=clients,
        run_config=run_config,
        seed=seed,
        output=output,
        threads=threads,
        on_start=on_start,
        on_round=on_round,
    )
    _finish(console, done)


def _round(record: "RoundRecord") -> str:
    from fedsim.report.numbers import percent, size

    known = {"loss": record.loss, "training loss": record.train_loss}
    told = [f"{name} {value:.4f}" for name, value in known.items() if value is not None]
    told += [f"accuracy {percent(record.accuracy)}"] if record.accuracy is not None else []
    sent = size(record.bytes_up + record.bytes_down)
    return "  ".join([f"round {record.round}", *told, f"clients {record.clients}  sent {sent}  {record.seconds:.2f} s"])


def _finish(console: Any, done: "Run") -> None:
    from fedsim.cli.display import result_table
    from fedsim.report import report

    page, summary = report.write(done.folder), done.summary
    console.print(result_table(summary))
    if summary["failed_messages"]:
        console.print(f"  {summary['failed_messages']} messages were answered with an error", highlight=False)
    for sentence in summary["not_seen"]:
        console.print(f"  not seen: {sentence}", soft_wrap=True, highlight=False, markup=False)
    for name, path in (("run", done.folder), ("report", page)):
        console.print(f"  {name:<8}  {path}", soft_wrap=True, highlight=False, markup=False)
