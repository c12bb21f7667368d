"""The plot: one panel for each workload, one bar for each contestant."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from peers import PEERS

NAMES = {
    "fedsim": "fedsim",
    "bare": "bare torch loop",
    "pfl": "pfl-research",
    "fedjax": "FedJAX",
    "flower": "Flower (Ray)",
}
OURS, FLOOR, OTHERS = "#0b6e99", "#8a8f98", "#c3c8d0"


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Samples per second, the longest bar the fastest; a line from the slowest to the fastest repeat."""
    figure = Figure(figsize=(10, 0.9 + 1.6 * ((len(summary) + 1) // 2)), layout="constrained")
    for place, (workload, found) in enumerate(summary.items(), start=1):
        _panel(figure.add_subplot((len(summary) + 1) // 2, 2, place), workload, found["samples_per_second"])
    figure.suptitle("Samples trained per second (higher is better)", fontsize=11)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, workload: str, speeds: Mapping[str, Mapping[str, float]]) -> None:
    names = [peer for peer in PEERS if peer in speeds]
    middles = [speeds[peer]["middle"] for peer in names]
    colours = [OURS if peer == "fedsim" else FLOOR if peer == "bare" else OTHERS for peer in names]
    axes.barh(range(len(names)), middles, color=colours)
    for row, peer in enumerate(names):
        axes.plot([speeds[peer]["low"], speeds[peer]["high"]], [row, row], color="#30343a", linewidth=1)
        axes.text(speeds[peer]["high"], row, f"  {speeds[peer]['middle']:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [NAMES[peer] for peer in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_title(workload, fontsize=9, loc="left")
    axes.set_xlim(0, 1.2 * max(spread["high"] for spread in speeds.values()))
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
