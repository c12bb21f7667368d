"""Commands that look: report, compare, split, list, schema."""

from pathlib import Path
from typing import Any

import typer

from fedsim.cli.arguments import CHANGES, CONFIG

LISTED = ("datasets", "splits", "models", "optimizers", "strategies", "engines")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(report)
    app.command()(compare)
    app.command()(split)
    app.command("list")(list_components)
    app.command()(schema)


def report(folder: Path = typer.Argument(metavar="RUN", help="Run folder.")) -> None:
    """Write RUN/report.html: one file with every number and plot of the run."""
    from fedsim.report.report import write

    typer.echo(write(folder))


def compare(
    folders: list[Path] = typer.Argument(metavar="RUN...", help="Run folders."),
    page: Path = typer.Option(Path("comparison.html"), help="Where the page with the overlaid curves goes."),
) -> None:
    """Put runs side by side: a table here, overlaid curves on a page. Runs that differ only in seed are averaged."""
    from rich.console import Console

    from fedsim.report import compare as comparing
    from fedsim.runs import open_run

    opened = [open_run(folder) for folder in folders]
    compared = comparing.compare(opened)
    console = Console()
    console.print(_table(comparing.rows(compared)))
    if len(compared.groups) < len(compared.runs):
        console.print(_table(comparing.group_rows(compared)))
    typer.echo(comparing.write(opened, page))


def _table(rows: list[dict[str, str]]) -> Any:
    from rich.table import Table

    table = Table(*rows[0], box=None, padding=(0, 2, 0, 0), header_style="bold")
    for row in rows:
        table.add_row(*row.values())
    return table


def split(
    config: Path = CONFIG,
    changes: list[str] = CHANGES,
    picture: Path = typer.Option(Path("split.png"), help="Where the heat map goes."),
    save: Path | None = typer.Option(None, help="Also save the split, for `split: {name: file, path: ...}`."),
) -> None:
    """Show who would hold what: label counts, effective classes, distance to the whole; a heat map as PNG."""
    from rich.console import Console

    from fedsim import api
    from fedsim.config.read import parse_overrides
    from fedsim.report import figures

    shown = api.split(config, parse_overrides(changes or []))
    console = Console()
    console.print(_table(_split_rows(shown.facts)))
    for name, value in shown.facts["summary"].items():
        console.print(f"{name:<24} {value:.4g}", highlight=False)
    figures.save_png(figures.split_heatmap(shown.facts), picture)
    typer.echo(picture)
    if save is not None:
        shown.save(save)
        typer.echo(save)


MAX_ROWS = 40  # clients in the table of a split; the rest is in the heat map


def _split_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    counts, names = facts["counts"], facts["class_names"] or [str(c) for c in range(facts["num_classes"])]
    if counts is None:
        return [{"clients": str(facts["num_clients"]), "examples": str(facts["num_examples"])}]
    chosen = range(min(len(counts), MAX_ROWS))
    many = facts["num_classes"] > 20
    rows = [
        {
            "client": str(k),
            "examples": str(facts["sizes"][k]),
            "test": str(facts["test_sizes"][k]),
            **({} if many else {name: str(count or "") for name, count in zip(names, counts[k], strict=True)}),
            "effective classes": f"{facts['effective_classes'][k]:.2f}",
            "EMD": f"{facts['earth_movers_distance'][k]:.2f}",
        }
        for k in chosen
    ]
    if len(counts) > MAX_ROWS:
        rows.append(dict.fromkeys(rows[0], "...") | {"client": f"+{len(counts) - MAX_ROWS}"})
    return rows


def list_components(
    kind: str = typer.Argument("all", metavar="[" + "|".join(LISTED) + "]", help="One kind only."),
) -> None:
    """List what a config can name: every component, its keys, their ranges and defaults."""
    from fedsim.config import catalogue
    from fedsim.config.tables import KINDS
    from fedsim.errors import ConfigError

    if kind != "all" and kind not in KINDS:
        raise ConfigError(f"list: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    for name in KINDS if kind == "all" else [kind]:
        typer.echo(f"{name}  ({KINDS[name].path})")
        for entry in catalogue.entries(name):
            typer.echo(f"  {entry.name:<16} {entry.summary}")
            for key, allowed, default in entry.keys:
                typer.echo(f"      {key}: {allowed}  ({default})")
        typer.echo("")


def schema() -> None:
    """Print the JSON Schema of a config file, for editors."""
    import json

    from fedsim.config import catalogue

    typer.echo(json.dumps(catalogue.json_schema(), indent=2))
