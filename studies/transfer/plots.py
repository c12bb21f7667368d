"""The plots of the page: a panel for each data set, means over seeds with their sample deviation; and of the costs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

Row = dict[str, Any]
Pick = Callable[[Row], bool]

MARKERS = "osD^v"

plt.rcParams.update({"svg.fonttype": "none", "font.size": 9})


def draw(rows: Sequence[Row], folder: Path) -> None:
    """All plots, as SVG."""

    def of(experiment: str) -> list[Row]:
        return [row for row in rows if row["experiment"] == experiment]

    _panels(of("overlap"), "overlap", "common people that train", folder / "transfer-overlap.svg")
    _panels(of("labelled"), "labelled", "of 200 common people, with label", folder / "transfer-labelled.svg")
    if any(row["overlap"] > 50 for row in of("costs")):
        _costs(of("costs"), folder / "transfer-costs.svg")


def _panels(rows: Sequence[Row], by: str, label: str, file: Path) -> None:
    """Accuracy of every arm against ``by``."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = _grid(-(-len(names) // 2), 2 if len(names) > 1 else 1)
    for name, axis in zip(names, axes, strict=False):
        here = [row for row in rows if row["data"] == name]
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in here)):
            groups: dict[int, list[float]] = {}
            for row in here:
                if row["arm"] == arm:
                    groups.setdefault(row[by], []).append(100 * row["accuracy"])
            means, spread = [*map(fmean, groups.values())], [stdev(y) if len(y) > 1 else 0.0 for y in groups.values()]
            beside = [x * 1.025**number for x in groups]  # so that no bar hides another
            axis.errorbar(beside, means, spread, marker=MARKERS[number], markersize=3.5, capsize=2.5, label=arm)
        axis.set(xlabel=label, title=name, ylabel="accuracy, %")
        _ticked(axis, sorted({row[by] for row in here}))
    _save(figure, axes[0], file)


def _costs(rows: Sequence[Row], file: Path) -> None:
    """Seconds and megabytes of an iteration against the overlap and the hidden values."""
    figure, axes = _grid(2, 2)
    linear = [row for row in rows if row["trains"] == "linear" and row["triples"] == "helper"]
    kinds: dict[str, Pick] = {
        "plain": lambda row: row["protocol"] == "plain",
        "secret-sharing": lambda row: row["protocol"] == "secret-sharing",
        "paillier, 2048 bits": lambda row: row["protocol"] == "paillier" and row["key_bits"] == 2048,
        "paillier, 3072 bits": lambda row: row["protocol"] == "paillier" and row["key_bits"] == 3072,
    }
    for column, (by, other, value, label) in enumerate(
        (("overlap", "hidden", 16, "common people"), ("hidden", "overlap", 100, "hidden values"))
    ):
        for number, (name, unit) in enumerate((("seconds", "seconds"), ("bytes", "kB, both ways"))):
            axis = axes[2 * number + column]
            for (kind, is_kind), marker in zip(kinds.items(), MARKERS, strict=False):
                here = sorted((row for row in linear if is_kind(row) and row[other] == value), key=lambda row: row[by])
                ys = [row["seconds"] if name == "seconds" else (row["up"] + row["down"]) / 1e3 for row in here]
                axis.plot([row[by] for row in here], ys, marker=marker, markersize=3.5, label=kind)
            axis.set(xlabel=f"{label} ({other}: {value})", ylabel=f"{unit}, of an iteration", yscale="log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if name == "bytes" else (1,)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            _ticked(axis, sorted({row[by] for row in linear if row[other] == value}))
    _save(figure, axes[0], file)


def _ticked(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _grid(lines: int, columns: int) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.0 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, list(axes.flat)


def _save(figure: Any, first: Any, file: Path) -> None:
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small")
    plt.rcParams["svg.hashsalt"] = file.stem  # else every drawing has other names inside
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
