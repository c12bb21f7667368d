"""The page of ``fedsim compare``: runs side by side as tables, and overlaid curves."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fedsim import runs
from fedsim.report.figures import Series
from fedsim.report.groups import Comparison
from fedsim.report.page import Chart, Table, curve_chart, render
from fedsim.report.results import curve, mean_curve
from fedsim.report.tables import group_rows, notes, rows


def write(comparison: Comparison, path: Path) -> Path:
    """Write the comparison as one self-contained page; returns ``path``."""
    runs.write_bytes(path, page(comparison))
    return path


def page(comparison: Comparison) -> bytes:
    """The page; the same comparison gives the same bytes."""
    n = len(comparison.runs)
    return render(
        "compare.html",
        title=f"{n} run{'s' * (n > 1)} compared",
        runs=_table("Runs", rows(comparison)),
        groups=_table("Over seeds", group_rows(comparison)) if comparison.grouped else None,
        words=("run", "group", "status", "seeds", *comparison.differing),
        notes=notes(comparison),
        banded=any(len(group.finished) > 1 for group in comparison.groups),
        differing=comparison.differing,
        charts=[
            _overlay(comparison, "Accuracy by round", "accuracy", "round"),
            _overlay(comparison, "Accuracy by traffic", "accuracy", "bytes"),
            _overlay(comparison, "Loss by round", "loss", "round"),
            _overlay(comparison, "Loss by traffic", "loss", "bytes"),
        ],
    )


def _table(title: str, lines: Sequence[dict[str, str]]) -> Table:
    return Table(title, tuple(lines[0]), tuple(tuple(line.values()) for line in lines))


def _overlay(comparison: Comparison, title: str, field: str, against: str) -> Chart:
    """One line or band per group; what sent nothing has no place on an axis of traffic."""
    series = [s for number in range(len(comparison.groups)) for s in _series(comparison, number, field, against)]
    drawn = [s for s in series if against == "round" or any(s.x)] or series
    left_out = dict.fromkeys(s.label for s in series if s not in drawn and s.x)
    targets = {run.results.target for run in comparison.runs}
    target = targets.pop() if field == "accuracy" and len(targets) == 1 else None
    made = curve_chart(title, drawn, x=against, y=field, fraction=field == "accuracy", target=target)
    if made.image and left_out:
        return dataclasses.replace(made, note=f"Sent nothing and are left out: {', '.join(left_out)}.")
    return made


def _series(comparison: Comparison, number: int, field: str, against: str) -> list[Series]:
    """The mean of a group's finished runs; where there are not two, each run as it is."""
    group = comparison.groups[number]
    if (n := len(group.finished)) > 1:
        x, mean, deviation = mean_curve(group.finished, field, against)
        return [Series(f"{group.label} (n = {n})", x, mean, number, deviation)]
    own = [run.results for run in comparison.runs if run.group == number]
    return [Series(group.label, *curve(found, field, against), number) for found in own]
