"""What a run shows while it goes on: live bars on a terminal, plain lines elsewhere; a table at the end."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeRemainingColumn as EtaColumn
from rich.table import Table

from fedsim.records import RoundRecord
from fedsim.report.numbers import ABSENT, number, percent, size


class _Console(Console):
    """A console that does not end the program when nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that is being handled  # noqa: PLE0704


def console() -> Console:
    """Standard output. What is no terminal is as wide as a table needs."""
    made = _Console()
    if not made.is_terminal:
        made.width = 1000
    return made


def _sent(rounds: Sequence[RoundRecord]) -> int:
    return sum(record.bytes_up + record.bytes_down for record in rounds)


def _sparsity(record: RoundRecord) -> str:
    return "" if record.sparsity is None else f"sparsity {percent(record.sparsity, 1)}  "


class Display(Protocol):
    """Shows a run. Used as a context."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *_: object) -> None: ...

    def loading(self, name: str, done: int, total: int | None) -> None:
        """Data is being fetched."""

    def step(self, name: str, done: int, total: int) -> None:
        """Some other work has come so far."""

    def begin(self, title: str, done: Sequence[RoundRecord], total: int) -> None:
        """Rounds start; those ``done`` of ``total`` are there already."""

    def round(self, record: RoundRecord) -> None:
        """A round has finished."""


class Lines:
    """Plain lines, one a round, for logs."""

    def __init__(self, console: Console) -> None:
        self.console, self.total, self.sent = console, 0, 0
        self.loaded: set[str] = set()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def loading(self, name: str, done: int, total: int | None) -> None:
        """Say once that a file is being fetched."""
        if name not in self.loaded:
            self.loaded.add(name)
            self.line(f"fetching {name} ({size(total) if total else 'size unknown'})")

    def step(self, name: str, done: int, total: int) -> None:
        """Say how far it has come."""
        self.line(f"{name} {done}/{total}")

    def begin(self, title: str, done: Sequence[RoundRecord], total: int) -> None:
        """Say what runs."""
        self.total, self.sent = total, _sent(done)
        self.line(title)

    def round(self, record: RoundRecord) -> None:
        """Say how the round went."""
        self.sent += _sent([record])
        loss = ABSENT if record.loss is None else f"{record.loss:.4f}"
        self.line(
            f"round {record.round}/{self.total}  accuracy {percent(record.accuracy)}  loss {loss}  "
            f"{_sparsity(record)}clients {record.clients}  sent {size(self.sent)}  {record.seconds:.2f} s"
        )

    def line(self, text: str) -> None:
        """Print without wrapping or colours. Whoever closes the pipe stops the run as Ctrl-C does."""
        try:
            self.console.print(text, soft_wrap=True, highlight=False, markup=False)
        except BrokenPipeError as error:
            raise KeyboardInterrupt from error


class Live:
    """Bars that move, for people at a terminal."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            EtaColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self.sent = 0
        self.rounds: TaskID | None = None
        self.others: dict[str, TaskID] = {}
        self.shown = ""

    def __enter__(self) -> "Live":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def loading(self, name: str, done: int, total: int | None) -> None:
        """Move the file's bar."""
        self._move(f"fetching {name}", done, total, size(done))

    def step(self, name: str, done: int, total: int) -> None:
        """Move its bar."""
        self._move(name, done, total, "")

    def _move(self, name: str, done: int, total: int | None, facts: str) -> None:
        if name not in self.others:
            self.others[name] = self.bars.add_task(name, total=total, facts="")
        self.bars.update(self.others[name], completed=done, facts=facts)

    def begin(self, title: str, done: Sequence[RoundRecord], total: int) -> None:
        """Start the bar of rounds."""
        self.sent = _sent(done)
        self.bars.console.print(title, highlight=False, markup=False)
        self.rounds = self.bars.add_task("rounds", total=total, completed=len(done), facts="")

    def round(self, record: RoundRecord) -> None:
        """Move the bar of rounds; the last known accuracy stays."""
        self.sent += _sent([record])
        if record.accuracy is not None:
            self.shown = f"accuracy {percent(record.accuracy)}"
        if self.rounds is not None:
            time = "in" if record.round == self.bars.tasks[self.rounds].total else "eta"
            facts = f"{self.shown}  {_sparsity(record)}{record.clients} clients  {size(self.sent)}  {time}"
            self.bars.update(self.rounds, completed=record.round, facts=facts)


def for_console(console: Console) -> Display:
    """Live bars on a terminal, plain lines elsewhere."""
    return Live(console) if console.is_terminal else Lines(console)


def _pruned(sparsity: float, summary: dict[str, Any]) -> str:
    """How many of the weights that can be pruned are gone."""
    sizes = {name: math.prod(weight["shape"]) for name, weight in summary["model"].get("weights", {}).items()}
    if not sizes:
        return f"{percent(sparsity)} of weights"
    remaining = summary["remaining"]
    gone = sum((1 - remaining[name]) * count for name, count in sizes.items() if name in remaining)
    return f"{number(round(gone))} of {number(sum(sizes[name] for name in remaining))} weights ({percent(sparsity)})"


def result_table(summary: dict[str, Any]) -> Table:
    """The final table of a run."""
    final, best, totals = summary.get("final") or {}, summary.get("best") or {}, summary["totals"]
    table = Table(show_header=False, box=None, padding=(0, 2))
    rows = [
        ("status", summary["status"]),
        ("rounds", f"{summary['rounds_done']} of {summary['rounds']}"),
        ("accuracy", f"{percent(final.get('accuracy'))} final, {percent(best.get('accuracy'))} best"),
        ("loss", ABSENT if final.get("loss") is None else f"{final['loss']:.4f}"),
    ]
    if "target_accuracy" in summary:
        reached = summary["rounds_to_target"]
        after = "not reached" if reached is None else f"after {reached:.2f} rounds, interpolated"
        rows.append((f"{percent(summary['target_accuracy'])} accuracy", after))
    if (sparsity := summary.get("sparsity")) is not None:
        rows.append(("pruned", _pruned(sparsity, summary)))
    rows += [
        ("sent", f"{size(totals['bytes_up'])} up, {size(totals['bytes_down'])} down"),
        ("time", f"{totals['seconds']:.1f} s"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    return table
