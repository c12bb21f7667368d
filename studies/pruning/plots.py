"""The plots of the page: a panel for each data set and split, means over seeds with their sample deviation."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
Point = Callable[[Row], float]

plt.rcParams.update({"svg.fonttype": "none", "font.size": 9})


def draw(rows: Sequence[Row], folder: Path) -> None:
    """All plots, as SVG."""

    def of(experiment: str) -> list[Row]:
        return [row for row in rows if row["experiment"] == experiment]

    tickets = [row for row in of("tickets") if row["arm"] != "one-shot"]
    _panels(
        tickets,
        lambda r: 100 * r["remaining"],
        "level",
        "remaining weights, %",
        folder / "pruning-tickets.svg",
        log=True,
    )
    _panels(of("targeted"), lambda r: 100 * r["sparsity"], "sparsity", "pruned, %", folder / "pruning-targeted.svg")
    _panels(of("gates"), lambda r: r["macs"] / 1e6, "density", "million MACs", folder / "pruning-gates.svg")
    _curves(of("sent"), folder / "pruning-sent.svg")


def _panels(rows: Sequence[Row], x: Point, by: str, label: str, file: Path, *, log: bool = False) -> None:
    """Accuracy of every arm against ``x``, points with one value of ``by`` together."""
    figure, axes = _grid(rows)
    for place, axis in axes.items():
        here = [row for row in rows if (row["data"], row["split"]) == place]
        for arm in dict.fromkeys(row["arm"] for row in here):
            groups: dict[Any, list[Row]] = {}
            for row in here:
                if row["arm"] == arm:
                    groups.setdefault(row[by], []).append(row)
            xs = [fmean(map(x, group)) for group in groups.values()]
            ys = [[100 * (row["accuracy"] or 0.1) for row in group] for group in groups.values()]
            spread = [stdev(y) if len(y) > 1 else 0.0 for y in ys]
            axis.errorbar(xs, [*map(fmean, ys)], spread, marker="o", markersize=3, capsize=2, label=arm)
        axis.set(xlabel=label, title=", ".join(place))
        if log:
            axis.set_xscale("log")
            axis.invert_xaxis()
            axis.set_xticks([100, 50, 30, 20, 15], labels=["100", "50", "30", "20", "15"])
            axis.set_xticks([], minor=True)
    _save(figure, axes, file)


def _curves(rows: Sequence[Row], file: Path) -> None:
    """Accuracy of every arm against megabytes sent up so far, of the first seed."""
    figure, axes = _grid(rows)
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for place, axis in axes.items():
        here = [row for row in rows if (row["data"], row["split"]) == place]
        first = min(row["seed"] for row in here)
        for number, row in enumerate(row for row in here if row["seed"] == first):
            xs, ys = zip(*((up / 1e6, 100 * (a if a is not None else math.nan)) for up, a in row["curve"]), strict=True)
            axis.plot(xs, ys, label=row["arm"], color=colors[number % len(colors)], linewidth=1)
        axis.set(xlabel="MB sent up by all clients", title=", ".join(place), xscale="log")
    _save(figure, axes, file)


def _grid(rows: Sequence[Row]) -> tuple[Any, dict[tuple[str, str], Any]]:
    places = list(dict.fromkeys((row["data"], row["split"]) for row in rows))
    columns = min(len(places), 2)
    lines = -(-len(places) // max(columns, 1))
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.0 * lines), layout="constrained", squeeze=False
    )
    for axis in axes[:, 0]:
        axis.set_ylabel("accuracy, %")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    return figure, dict(zip(places, axes.flat, strict=False))


def _save(figure: Any, axes: dict[tuple[str, str], Any], file: Path) -> None:
    handles, labels = next(iter(axes.values())).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), fontsize="small")
    plt.rcParams["svg.hashsalt"] = file.stem  # else every drawing has other names inside
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
