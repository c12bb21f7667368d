"""Commands that look: report, compare, split, list, schema."""

from pathlib import Path
from typing import Any

import typer

from fedsim.cli.arguments import CHANGES, CONFIG, RUN


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command()(report)
    app.command()(compare)
    app.command()(split)
    app.command("list")(list_components)
    app.command()(schema)


def report(folder: Path = RUN) -> None:
    """Write the report of a run: one HTML file.

    RUN is a run folder; the file is RUN/report.html.
    """
    from fedsim.report.report import write

    typer.echo(write(folder))


def compare(
    folders: list[Path] = typer.Argument(metavar="RUN...", hidden=True),
    page: Path = typer.Option(Path("comparison.html"), help="Where the page goes.", show_default=False),
) -> None:
    """Put runs side by side: a table, and curves on a page.

    RUN... are run folders. Runs that differ in nothing but the seed are averaged. The page goes to comparison.html
    unless --page says.
    """
    from fedsim.cli import display
    from fedsim.report import groups, tables
    from fedsim.report.compare import write
    from fedsim.runs import open_run

    _check_target("--page", page)
    compared = groups.compare([open_run(folder) for folder in folders])
    console = display.console()
    console.print(_fitting(console, tables.rows(compared)))
    if compared.grouped:
        console.print()
        console.print(_fitting(console, tables.group_rows(compared)))
    for note in tables.notes(compared):
        typer.echo(note)
    typer.echo(write(compared, page))


def _fitting(console: Any, rows: list[dict[str, str]]) -> Any:
    """A row per run where that fits, otherwise a column per run, otherwise several tables below each other."""
    from rich.console import Group

    across = [{"": title, **{f"{k}": row[title] for k, row in enumerate(rows, 1)}} for title in rows[0]]
    for whole in (rows, across):
        if _fits(console, whole):
            return _table(whole)
    name, *titles = rows[0]
    parts = []
    while titles:
        counts = range(len(titles), 0, -1)
        some = next((k for k in counts if _fits(console, _only(rows, [name, *titles[:k]]))), 1)
        parts += [_table(_only(rows, [name, *titles[:some]])), ""]
        titles = titles[some:]
    return Group(*parts[:-1])


def _only(rows: list[dict[str, str]], titles: list[str]) -> list[dict[str, str]]:
    return [{title: row[title] for title in titles} for row in rows]


def _fits(console: Any, rows: list[dict[str, str]]) -> bool:
    return bool(console.measure(_table(rows)).maximum < console.width)


def _table(rows: list[dict[str, str]], gap: int = 2) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, gap, 0, 0), header_style="bold")
    for title in rows[0]:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table


def split(
    config: Path = CONFIG,
    changes: list[str] = CHANGES,
    picture: Path = typer.Option(Path("split.png"), help="Where the heat map goes.", show_default=False),
    save: Path | None = typer.Option(None, help="Also save the split, for `split: {name: file, path: ...}`."),
) -> None:
    """Show who would hold what, as a table and as a heat map.

    CONFIG and KEY.PATH=VALUE are those of fedsim run. Shown are label counts, effective classes and the distance of
    each client's labels to those of all (earth mover's). The heat map goes to split.png unless --picture says.
    """
    from fedsim import api
    from fedsim.cli import display
    from fedsim.config.read import parse_overrides
    from fedsim.report import figures

    _check_target("--picture", picture)
    _check_target("--save", save)
    shown = api.split(config, parse_overrides(changes or []))
    console = display.console()
    tables = (_table(_split_rows(shown.facts, names), gap=1) for names in _class_columns(shown.facts))
    console.print(next(table for table in tables if console.measure(table).maximum < console.width))
    for name, value in shown.facts["summary"].items():
        console.print(f"{name:<24} {value:.4g}", highlight=False)
    figures.save_png(figures.split_heatmap(shown.facts), picture)
    typer.echo(picture)
    if save is not None:
        shown.save(save)
        typer.echo(save)


def _check_target(option: str, path: Path | None) -> None:
    """A file that cannot be written is better known before the work."""
    from fedsim.errors import ConfigError

    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ConfigError(f"{option}: must be a file in a folder that exists, got {path}")


MAX_ROWS = 40  # clients in the table of a split; the rest is in the heat map


def _class_columns(facts: dict[str, Any]) -> list[list[str]]:
    """Titles for the columns of label counts, from the most telling to none at all."""
    numbers = [str(c) for c in range(facts["num_classes"])]
    return [list(facts["class_names"] or numbers), numbers, []]


def _split_rows(facts: dict[str, Any], classes: list[str]) -> list[dict[str, str]]:
    counts = facts["counts"]
    if counts is None:
        return [{"clients": str(facts["num_clients"]), "examples": str(facts["num_examples"])}]
    rows = [
        {
            "client": str(k),
            "examples": str(facts["sizes"][k]),
            "test": str(facts["test_sizes"][k]),
            **{name: str(count or "") for name, count in zip(classes, counts[k], strict=False)},
            "effective classes": f"{facts['effective_classes'][k]:.2f}",
            "EMD": f"{facts['earth_movers_distance'][k]:.2f}",
        }
        for k in range(min(len(counts), MAX_ROWS))
    ]
    if len(counts) > MAX_ROWS:
        rows.append(dict.fromkeys(rows[0], "...") | {"client": f"+{len(counts) - MAX_ROWS}"})
    return rows


def list_components(kind: str = typer.Argument("all", metavar="[KIND]", hidden=True)) -> None:
    """List what a config can name: components and their keys.

    KIND is one of keys, datasets, splits, models, regularizers, optimizers, schedules, pruning, transforms, strategies,
    engines; without it all are listed. After each key stand its type, its range and its default.
    """
    from fedsim.config import catalogue
    from fedsim.config.tables import KINDS
    from fedsim.errors import ConfigError

    if kind not in ("all", "keys", *KINDS):
        raise ConfigError(f"KIND: must be one of keys, {', '.join(KINDS)}, got {kind!r}")
    if kind in ("all", "keys"):
        typer.echo("keys  (of a config)")
        for entry in catalogue.sections():
            typer.echo(f"  {entry.name:<16} {entry.summary}")
            _echo_keys(entry.keys)
        typer.echo("")
    if kind == "keys":
        return
    for name in KINDS if kind == "all" else [kind]:
        typer.echo(f"{name}  ({KINDS[name].path})")
        for entry in catalogue.entries(name):
            typer.echo(f"  {entry.name:<16} {entry.summary}")
            _echo_keys(entry.keys)
        if common := catalogue.common_keys(name):
            typer.echo("  and every one of them takes")
            _echo_keys(common)
        typer.echo("")


def _echo_keys(keys: tuple[tuple[str, str, str], ...]) -> None:
    for key, allowed, default in keys:
        typer.echo(f"      {key}: {allowed}  ({default})")


def schema() -> None:
    """Print the JSON Schema of a config file, for editors."""
    import json

    from fedsim.config import catalogue

    typer.echo(json.dumps(catalogue.json_schema(), indent=2))
