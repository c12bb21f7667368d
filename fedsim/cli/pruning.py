"""The command that prunes a finished run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import typer

from fedsim.cli.arguments import RUN
from fedsim.errors import ConfigError

if TYPE_CHECKING:
    from fedsim.api.pruning import Pruned, State


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(prune)


def prune(
    folder: Path = RUN,
    options: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", hidden=True),
    criterion: str | None = typer.Option(None, help="magnitude, l1-filter, ...: fedsim list pruning.  [needed]"),
    sparsity: float | None = typer.Option(None, help="Share that goes, above 0 and below 1."),
    finetune: int = typer.Option(0, help="Rounds to go on from the weights that are left.", show_default=False),
    scratch: str | None = typer.Option(None, help="e or b: train the small model from new weights."),
) -> None:
    """Prune the model of a run, and perhaps go on with it.

    RUN is the folder of a run that was not pruned. KEY=VALUE are other keys of the method: scope=filter. Without
    --finetune or --scratch the pruned model is written to RUN/pruned. With --finetune N a new run goes on for N rounds;
    with --scratch the model that is left is trained anew, for as many rounds as RUN has (e), or as many as cost as many
    multiply-accumulates (b).
    """
    from fedsim.api.pruning import prune as pruned
    from fedsim.cli.running import shown
    from fedsim.config.read import parse_overrides

    if criterion is None:
        raise ConfigError("--criterion: needed, a method such as magnitude or l1-filter")
    if scratch is not None and scratch not in ("e", "b"):
        raise ConfigError(f"--scratch: must be e or b, got {scratch}")
    arm = cast("Literal['e', 'b'] | None", scratch)
    found: list[Pruned] = []
    given = parse_overrides(options or [])

    def start(**hooks: Any) -> Any:
        done = pruned(folder, criterion, sparsity, finetune=finetune, scratch=arm, options=given, **hooks)
        found.append(done)
        return done.run

    if finetune or scratch:
        shown(start)
    else:
        start()
    _show(found[0])


def _show(done: "Pruned") -> None:
    from fedsim.cli import display

    console = display.console()
    console.print(_table(done))
    for file in done.files:
        typer.echo(file)


def _table(done: "Pruned") -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for title in ("before", f"after {done.criterion}"):
        table.add_column(title, justify="right")
    before, after, later = _rows(done.before), _rows(done.after), _trained(done)
    if later:
        table.add_column("in the end", justify="right")
    for name in before:
        table.add_row(name, before[name], after[name], *([later.get(name, after[name])] if later else []))
    return table


def _trained(done: "Pruned") -> dict[str, str]:
    """What another training has changed, if there was one."""
    if done.run is None:
        return {}
    end = done.run.summary
    return {"accuracy": f"{100 * end['accuracy']:.2f} %", "loss": f"{end['loss']:.4f}"}


def _rows(state: "State") -> dict[str, str]:
    from fedsim.report.numbers import number, size

    numbers = state.numbers
    return {
        "accuracy": f"{100 * state.accuracy:.2f} %",
        "loss": f"{state.loss:.4f}",
        "parameters": number(numbers.parameters),
        "non-zeros": number(numbers.nonzeros),
        "MACs": number(numbers.macs),
        "effective MACs": number(numbers.effective_macs),
        "bytes, dense": size(numbers.bytes["dense"]),
        "bytes, shortest": size(min(numbers.bytes.values())),
    }
