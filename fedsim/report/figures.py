"""The charts, as matplotlib figures that know nothing of run folders, pages or each other.

Figures are made without pyplot, so no global state is touched. One inch is 72 CSS pixels; a chart is ``WIDTH`` wide,
which leaves its text readable when a phone shrinks it. Colours are those of palette.py.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from fedsim.report.palette import GRID, INK, MUTED, SERIES

Floats = npt.NDArray[np.float64]

WIDTH, HEIGHT = 460, 270  # CSS pixels
MAX_ROWS = 400  # a heat map with more clients than this shows means of neighbours
MAX_NAMED_CLASSES = 20
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "text.color": INK,
    "text.parse_math": False,  # a class may be named "$"
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelpad": 11,  # room for the larger text that style.css gives to phones
    "axes.linewidth": 0.8,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "patch.linewidth": 0,
}


STYLED = style.context(["default", _STYLE])  # a decorator: the same look whatever the user's matplotlibrc says


@dataclass(frozen=True)
class Series:
    """One line of a chart. ``number`` picks its colour and dashes; x ascends and has no gaps.

    deviation: half the height of a band around the line, for each x; empty for no band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    number: int = 0
    deviation: Sequence[float] = ()


# ---------------------------------------------------------------- curves


@STYLED
def curves(series: Sequence[Series], *, x: str, y: str, percent: bool = False, target: float | None = None) -> Figure:
    """Lines over a common axis, with their bands; ``target`` adds a dotted level line."""
    fig, (axes,) = blank()
    few = max(len(s.x) for s in series) <= 30 and len(series) <= 2
    for s in series:
        axes.plot(
            s.x,
            s.y,
            color=SERIES[colour(s.number)],
            linestyle=_DASHES[dash(s.number)],
            marker="o" if few else "",
            markersize=4,
        )
        if s.deviation:
            low, high = np.subtract(s.y, s.deviation), np.add(s.y, s.deviation)
            axes.fill_between(s.x, low, high, color=SERIES[colour(s.number)], alpha=0.16)
    if target is not None:
        axes.axhline(target, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.2)
    labelled(axes, x=x, y=y, percent_y=percent)
    return fig


def colour(number: int) -> int:
    """Which palette colour series ``number`` has; they repeat after the last, with other dashes."""
    return number % len(SERIES)


def dash(number: int) -> int:
    """Line style of series ``number``: 0 solid, 1 dashed, 2 dotted."""
    return number // len(SERIES) % len(_DASHES)


@STYLED
def bands(rounds: Sequence[int], quantiles: Floats) -> Figure:
    """Client accuracy by round: least to greatest, 10 % to 90 %, and the median.

    Args:
        rounds: ascending.
        quantiles: (5, rounds): minimum, 10 %, median, 90 %, maximum, each in [0, 1].
    """
    fig, (axes,) = blank()
    low, p10, median, p90, high = quantiles
    axes.fill_between(rounds, low, high, color=SERIES[0], alpha=0.16)
    axes.fill_between(rounds, p10, p90, color=SERIES[0], alpha=0.30)
    axes.plot(rounds, median, color=SERIES[0], marker="o" if len(rounds) <= 30 else "", markersize=4)
    labelled(axes, x="round", y="accuracy of a client", percent_y=True)
    return fig


@STYLED
def histogram(values: Sequence[float], *, x: str, percent: bool = False, span: tuple[float, float]) -> Figure:
    """How many clients lie where, in 20 bins over ``span``."""
    fig, (axes,) = blank()
    _bars(axes, values, span)
    labelled(axes, x=x, y="clients", percent_x=percent)
    return fig


def _bars(axes: Axes, values: Sequence[float], span: tuple[float, float]) -> None:
    axes.hist(np.asarray(values, float), bins=20, range=span, color=SERIES[0], rwidth=0.9)
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))


# ---------------------------------------------------------------- the split


@STYLED
def split_heatmap(split: Mapping[str, Any]) -> Figure:
    """Label counts as a map of clients by classes, with the size of each client beside it.

    Beyond ``MAX_ROWS`` clients a row is the mean over a group of neighbouring clients; the axis says so.

    Args:
        split: the content of split.json, with ``counts`` (clients, classes) and optionally ``class_names``.

    Raises:
        ValueError: it has no counts.
    """
    if not split.get("counts"):
        raise ValueError("split must have label counts, got none")
    counts = np.asarray(split["counts"], float)  # (clients, classes)
    clients, classes = counts.shape
    rows, group = _grouped(counts)  # (rows, classes)
    edges = np.minimum(np.arange(len(rows) + 1) * group, clients) - 0.5
    fig, (heat, bars) = blank(1, 2, height=_split_height(clients), width_ratios=[4, 1], sharey=True)
    image = heat.imshow(
        np.ma.masked_equal(rows, 0),
        aspect="auto",
        interpolation="none",
        cmap=one_hue(),
        vmin=0,
        vmax=max(float(rows.max()), 1.0),
        extent=(-0.5, classes - 0.5, clients - 0.5, -0.5),
    )
    heat.grid(visible=False)
    heat.yaxis.set_major_locator(ticker.MaxNLocator(10, integer=True))
    _class_ticks(heat, classes, split.get("class_names") or [])
    heat.set_ylabel("client" if group == 1 else f"client (a row is the mean of {group})")
    bars.stairs(rows.sum(axis=1), edges, orientation="horizontal", fill=True, color=SERIES[0], alpha=0.6)
    bars.grid(visible=False, axis="y")
    bars.set_xlim(left=0)
    bars.xaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
    bars.set_xlabel("examples")
    bar = fig.colorbar(image, ax=[heat, bars], orientation="horizontal", location="top", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("examples of a class that a client holds")
    bar.locator = ticker.MaxNLocator(5, integer=True)
    return fig


def _split_height(clients: int) -> float:
    return min(max(90 + 16 * clients, 320), 520)


def _grouped(counts: Floats) -> tuple[Floats, int]:
    """Means over groups of neighbouring rows, so that at most ``MAX_ROWS`` are left, and the group size."""
    group = math.ceil(len(counts) / MAX_ROWS)
    starts = np.arange(0, len(counts), group)
    sizes = np.diff(np.append(starts, len(counts)))
    return np.add.reduceat(counts, starts, axis=0) / sizes[:, None], group


def one_hue() -> LinearSegmentedColormap:
    """From faint to full; what is absent stays background, so the map reads on white and on black."""
    rgb = to_rgb(SERIES[0])
    return LinearSegmentedColormap.from_list("heat", [(*rgb, 0.12), (*rgb, 1.0)])


def _class_ticks(axes: Axes, classes: int, names: Sequence[Any]) -> None:
    labels = [_short(str(name)) for name in names]
    if len(labels) != classes or classes > MAX_NAMED_CLASSES:
        axes.xaxis.set_major_locator(ticker.MaxNLocator(10, integer=True))
    else:
        upright = sum(map(len, labels)) <= 36
        axes.set_xticks(range(classes), labels, rotation=0 if upright else 90)
    axes.set_xlabel("class")


def _short(name: str, limit: int = 14) -> str:
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 1] + "…"


@STYLED
def split_skew(effective_classes: Sequence[float], distance: Sequence[float], num_classes: int) -> Figure:
    """Two histograms over clients: effective number of classes, and distance of the label mix from that of all."""
    fig, (first, second) = blank(2, height=_split_height(len(distance)))
    _bars(first, effective_classes, (1, max(num_classes, 2)))
    _bars(second, distance, (0, 2 if max(distance, default=0) > 1 else 1))
    labelled(first, x=f"effective classes (of {num_classes})", y="clients")
    labelled(second, x="earth mover's distance to the label mix of all", y="clients")
    return fig


# ---------------------------------------------------------------- shared


def blank(rows: int = 1, columns: int = 1, *, height: float = HEIGHT, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure with empty axes, by rows."""
    fig = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
    return fig, list(fig.subplots(rows, columns, squeeze=False, **grid).flat)


def labelled(axes: Axes, *, x: str, y: str, percent_x: bool = False, percent_y: bool = False) -> None:
    """Name the axes; ticks of rounds are whole numbers, those of fractions per cent."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "round":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    for axis, percent in ((axes.xaxis, percent_x), (axes.yaxis, percent_y)):
        if percent:
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def save_png(fig: Figure, path: Path) -> None:
    """Write a figure as PNG on white, two pixels per CSS pixel. The folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(fig)
    with mpl.rc_context({"savefig.facecolor": "white"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        fig.savefig(path, format="png", dpi=144, facecolor="white", metadata={"Software": None})
