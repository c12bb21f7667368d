"""The command that shows what a model is made of."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedsim.cli.arguments import CHANGES

if TYPE_CHECKING:
    from fedsim.api.inspecting import Inspection, Numbers

SOURCE = typer.Argument(metavar="RUN|CONFIG", hidden=True)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(inspect)


def inspect(
    source: Path = SOURCE,
    changes: list[str] = CHANGES,
    as_json: bool = typer.Option(False, "--json", help="Print JSON, for scripts."),
) -> None:
    """Show what a model is made of, layer by layer.

    RUN|CONFIG is a run folder, whose model as it is now is shown, or a config file, whose fresh model is; then
    KEY.PATH=VALUE may change it. Shown are parameters, and how many are not 0. Multiply-accumulates (MACs) are for one
    example; effective are those whose weight is not 0. The last columns are bytes of the parameters: all of them
    (dense), or those that are not 0 with a bit for each entry (bitmask), gaps between them, or their positions (coo).
    Nothing is trained or written.
    """
    from fedsim.api.inspecting import inspect as look
    from fedsim.cli import display
    from fedsim.config.read import parse_overrides

    overrides = parse_overrides(changes or [])
    if as_json:
        typer.echo(json.dumps(asdict(look(source, overrides)), indent=2))
        return
    console = display.console()
    with display.for_console(console) as shown:
        found = look(source, overrides, progress=shown.loading)
    typer.echo(_title(found))
    console.print(_table(found))


def _title(found: "Inspection") -> str:
    when = "before training" if found.round is None else f"after round {found.round}"
    return f"{found.name}: {found.model}, {when}, for an input {' x '.join(map(str, found.input_shape))}"


def _table(found: "Inspection") -> Any:
    from rich.table import Table
    from rich.text import Text

    columns = _columns(found.total)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("layer", "kind", "shape"):
        table.add_column(title, overflow="fold")
    for title in columns:
        table.add_column(title, justify="right", overflow="fold")
    for layer in found.layers:
        shape = " x ".join(map(str, layer.shape))
        table.add_row(*map(Text, [layer.path or "(model)", layer.kind, shape, *_columns(layer.numbers).values()]))
    table.add_row("total", "", "", *columns.values(), style="bold")
    return table


def _columns(numbers: "Numbers") -> dict[str, str]:
    from fedsim.report.numbers import number, size

    counts = {
        "parameters": numbers.parameters,
        "non-zeros": numbers.nonzeros,
        "MACs": numbers.macs,
        "effective": numbers.effective_macs,
    }
    in_forms = {form: size(count) for form, count in numbers.bytes.items()}
    return {**{title: number(count) for title, count in counts.items()}, **in_forms}
