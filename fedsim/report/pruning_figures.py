"""The charts of a run that prunes; see figures.py for what they share."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from fedsim.report.figures import HEIGHT, STYLED, Floats, blank, labelled, one_hue
from fedsim.report.palette import MUTED, SERIES

FILL = 0.45  # opacity of an area; style.css has the same for its key
MAX_TICKS = 6
NAME = 18  # characters of a layer's name
ROW, SMALL_ROW = 18, 12  # CSS pixels that a name needs, and one in small type
ABOVE, LOWEST, HIGHEST = 110, HEIGHT, 520  # what else is in the figure, and its height at least and at most


@STYLED
def steps(rounds: Sequence[int], parts: Sequence[Sequence[float]], *, y: str, percent: bool = False) -> Figure:
    """One area for each part, on top of each other: a step a round."""
    fig, (axes,) = blank()
    edges, below = np.append(rounds, rounds[-1] + 1) - 0.5, np.zeros(len(rounds))
    for number, part in enumerate(parts):
        above = below + np.asarray(part, float)
        axes.stairs(above, edges, baseline=below, fill=True, color=SERIES[number], alpha=FILL)
        axes.stairs(above, edges, baseline=None, color=SERIES[number], linewidth=1.5)
        below = above
    axes.set_ylim(0, 1.05 * float(below.max()) or 1)
    axes.set_xlim(edges[0], edges[-1])
    labelled(axes, x="round", y=y, percent_y=percent)
    return fig


@STYLED
def layers(rounds: Sequence[int], names: Sequence[str], sparsity: Floats) -> Figure:
    """Sparsity as a map of layers by rounds, the first layer on top.

    Args:
        rounds: ascending, without gaps.
        names: of the layers.
        sparsity: (layers, rounds) in [0, 1].
    """
    count = len(names)
    height = min(max(ABOVE + ROW * count, LOWEST), HIGHEST)
    pitch = (height - ABOVE) / count
    fig, (axes,) = blank(height=height)
    image = axes.imshow(
        sparsity,
        aspect="auto",
        interpolation="none",
        cmap=one_hue(),
        vmin=0,
        vmax=1,
        extent=(rounds[0] - 0.5, rounds[-1] + 0.5, count - 0.5, -0.5),
    )
    axes.grid(visible=False)
    needed = ROW if pitch >= ROW else SMALL_ROW
    shown = range(0, count, math.ceil(needed / pitch))
    axes.set_yticks(shown, [_end_of(names[i]) for i in shown], fontsize=12 if needed == ROW else 10)
    labelled(axes, x="round", y="layer")
    bar = fig.colorbar(image, ax=axes, orientation="horizontal", location="top", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("sparsity of a layer")
    bar.locator, bar.formatter = ticker.MultipleLocator(0.25), ticker.PercentFormatter(1, symbol=" %")
    return fig


def _end_of(name: str) -> str:
    return name if len(name) <= NAME else "…" + name[1 - NAME :]


@STYLED
def by_remaining(remaining: Sequence[float], accuracy: Sequence[float], *, target: float | None = None) -> Figure:
    """Accuracy against the share of weights that remain, fewer to the right, on a logarithmic axis.

    Points are joined if there are fewer weights at each than at the one before.
    """
    fig, (axes,) = blank()
    joined = all(b < a for a, b in itertools.pairwise(remaining))
    few = len(remaining) <= 30
    axes.plot(
        remaining,
        accuracy,
        color=SERIES[0],
        linestyle="-" if joined else "",
        marker="o" if few or not joined else "",
        markersize=4,
    )
    if target is not None:
        axes.axhline(target, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
    axes.set_xscale("log")
    axes.invert_xaxis()
    shown = _apart(sorted(remaining, reverse=True))
    axes.set_xticks(shown, [f"{100 * value:.3g} %" for value in shown])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    labelled(axes, x="weights remaining (logarithmic)", y="accuracy", percent_y=True)
    return fig


def _apart(values: Sequence[float]) -> list[float]:
    """First and last, and those between that are far enough from all others taken; values > 0, descending."""
    gap = math.log(values[0] / values[-1]) / MAX_TICKS
    taken = [values[0]]
    for value in values[1:-1]:
        if math.log(taken[-1] / value) >= gap and math.log(value / values[-1]) >= gap:
            taken.append(value)
    return [*taken, *values[-1:]] if gap > 0 else taken
