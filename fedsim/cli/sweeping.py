"""The command that runs every combination of several values."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedsim.cli.arguments import CHANGES
from fedsim.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fedsim.records import RoundRecord

CONFIG = typer.Argument(None, metavar="CONFIG", hidden=True)
JOBS = typer.Option(
    1, show_default=False, help="Runs at a time, each in a process of its own and with one torch thread.  [default: 1]"
)
RESUME = typer.Option(None, metavar="FOLDER", help="Go on with the sweep in this folder; no CONFIG then.")


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(sweep)


def sweep(
    config: Path | None = CONFIG, changes: list[str] = CHANGES, jobs: int = JOBS, resume: Path | None = RESUME
) -> None:
    """Run every combination of several values.

    CONFIG is a YAML file. KEY.PATH=VALUE replaces a value in it for all runs; a VALUE that is a list is an axis: with
    train.local_epochs=[1,5] seed=[1,2,3] there are six runs. A key that takes a list itself is swept by a list of
    lists: model.channels=[[16],[16,32]]. Each run has its folder in that of the sweep; at the end there is a table.

    Runs that differ only in seed are one line of the table: mean ± deviation. With --jobs 2 or more, a run of the local
    engine whose engine.workers is auto starts no workers of its own (engine.workers=1); numbers are the same for any
    --jobs. --resume FOLDER leaves finished runs alone, resumes those that were interrupted or failed, and starts the
    rest. A run that fails does not stop the others; exit code 4 then.
    """
    from fedsim import api
    from fedsim.config.read import parse_overrides

    if config is not None and resume is None:
        overrides = parse_overrides(changes or [])
        _shown(lambda **hooks: api.sweep(config, overrides, jobs=jobs, **hooks), jobs)
    elif resume is not None and config is None:
        _shown(lambda **hooks: api.resume_sweep(resume, jobs=jobs, **hooks), jobs)
    else:
        raise ConfigError("CONFIG: give either a config or --resume FOLDER, and no changes with the latter")


def _shown(start: Any, jobs: int) -> None:
    from fedsim.cli import display

    console = display.console()
    shows = _Bars(console, jobs) if console.is_terminal else _Lines(console, jobs)
    try:
        with shows:
            done = start(
                on_start=shows.start,
                on_begin=shows.begin,
                on_round=shows.round,
                on_end=shows.end,
                progress=shows.loading,
            )
    except KeyboardInterrupt as error:
        if shows.folder is not None:
            again = f"fedsim sweep --resume {shlex.quote(str(shows.folder))}" + (f" --jobs {jobs}" if jobs > 1 else "")
            error.add_note(f"finished runs and whole rounds are saved; go on with: {again}")
        raise
    _finish(console, done)


class _Lines:
    """Plain lines, one a run, for logs."""

    def __init__(self, console: Any, jobs: int) -> None:
        self.console, self.jobs = console, jobs
        self.folder: Path | None = None
        self.ended = self.total = 0
        self.loaded: set[str] = set()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say what there is to do."""
        self.folder, self.total = folder, len(rows)
        self.ended = sum(row["status"] == "finished" for row in rows)
        before = f", {self.ended} of them finished before" if self.ended else ""
        at_a_time = f", {self.jobs} at a time" if self.jobs > 1 else ""
        self.line(f"{self.total} runs in {folder}{before}{at_a_time}")

    def begin(self, name: str, done: int, rounds: int) -> None:
        """A run begins or goes on."""

    def round(self, record: "RoundRecord") -> None:
        """A round of it has finished."""

    def end(self, row: Mapping[str, Any]) -> None:
        """Say what a run has come to."""
        from fedsim.report.numbers import duration, number, percent

        self.ended += 1
        told = f"{self.ended}/{self.total}  {row['run']}  {row['status']}"
        if row["error"]:
            self.line(f"{told}: {row['error']}")
        else:
            self.line(
                f"{told}  accuracy {percent(row['accuracy'])}  loss {number(row['loss'])}  {duration(row['seconds'])}"
            )

    def loading(self, name: str, done: int, total: int | None) -> None:
        """Say once that a file is being fetched."""
        if name not in self.loaded:
            self.loaded.add(name)
            self.line(f"fetching {name}")

    def line(self, text: str) -> None:
        """Print without wrapping or colours. Whoever closes the pipe stops the sweep as Ctrl-C does."""
        try:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
        except BrokenPipeError as error:
            raise KeyboardInterrupt from error


class _Bars(_Lines):
    """The same lines, with a bar of runs and one of the rounds of the run under way below them, for a terminal."""

    def __init__(self, console: Any, jobs: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        super().__init__(console, jobs)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), console=console
        )
        self.runs = self.bars.add_task("runs", total=None)
        self.rounds = self.bars.add_task("rounds", total=None, visible=False)

    def __enter__(self) -> "_Bars":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start the bar of runs."""
        super().start(folder, rows)
        self.bars.update(self.runs, completed=self.ended, total=self.total)

    def begin(self, name: str, done: int, rounds: int) -> None:
        """Start the bar of rounds anew."""
        self.bars.update(self.rounds, description=f"rounds of {name}", completed=done, total=rounds)
        self.bars.update(self.rounds, visible=True, refresh=True)

    def round(self, record: "RoundRecord") -> None:
        """Move the bar of rounds."""
        self.bars.update(self.rounds, completed=record.round)

    def end(self, row: Mapping[str, Any]) -> None:
        """Move the bar of runs."""
        super().end(row)
        self.bars.update(self.rounds, visible=False)
        self.bars.update(self.runs, completed=self.ended)


def _finish(console: Any, done: Any) -> None:
    console.print()
    console.print(_fitting(console, done.table()))
    console.print()
    for note in done.notes():
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    for name, path in (("sweep", done.folder), ("summary", done.folder / "summary.md")):
        console.print(f"  {name:<8}  {path}", soft_wrap=True, highlight=False, markup=False)
    statuses = [row["status"] for row in done.rows()]
    if failed := sum(status != "finished" for status in statuses):
        raise RunError(f"{failed} of {len(statuses)} runs failed, see above")


def _fitting(console: Any, lines: list[dict[str, str]]) -> Any:
    """The table with as many columns, from the left, as the terminal is wide; summary.md has all."""
    from rich.table import Table
    from rich.text import Text

    for count in range(len(lines[0]), 1, -1):
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in list(lines[0])[:count]:
            table.add_column(title, overflow="fold")
        for line in lines:
            table.add_row(*map(Text, list(line.values())[:count]))
        if console.measure(table).maximum < console.width:
            break
    return table
