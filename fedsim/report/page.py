"""What the two pages share: the template environment, numbers as text, and charts with their legend."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from fedsim.report import figures, svg
from fedsim.report.figures import Series
from fedsim.report.numbers import ABSENT, byte_unit, number, percent

_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Key:
    """One line of a legend. ``kind`` is a class of style.css: line, dash (a target), inner or outer (bands)."""

    label: str
    number: int = 0
    kind: str = "line"

    @property
    def colour(self) -> int:
        """Palette colour."""
        return figures.colour(self.number)

    @property
    def dash(self) -> int:
        """Line style."""
        return figures.dash(self.number)


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart of a page, or the sentence that stands where it cannot be drawn."""

    title: str
    image: Markup | None = None
    note: str = ""
    legend: tuple[Key, ...] = ()


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text, one cell per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def table(title: str, columns: Mapping[str, Sequence[str]]) -> Table:
    """The columns side by side, without those in which no cell has a value."""
    present = {name: cells for name, cells in columns.items() if any(cell != ABSENT for cell in cells)}
    return Table(title, tuple(present), tuple(zip(*present.values(), strict=True)))


def column(values: Iterable[Any] | None, shown: Callable[[Any], str]) -> list[str]:
    """Values as the cells of a column; a dash for None."""
    return [ABSENT if v is None else shown(v) for v in values or ()]


def render(template: str, **values: Any) -> bytes:
    """The page as UTF-8. Every value is escaped; only the stylesheet and the charts go in as they are."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stylesheet = Markup((_HERE / "style.css").read_text())
    return environment.get_template(template).render(stylesheet=stylesheet, **values).encode()


def curve_chart(
    title: str, series: Sequence[Series], *, x: str, y: str, fraction: bool = False, target: float | None = None
) -> Chart:
    """Curves with their legend; a sentence if no series has two points.

    ``x`` is "round" or "bytes"; bytes are shown in the largest unit that fits.
    """
    series = [s for s in series if len(s.x) >= 2]
    if not series:
        return Chart(title, note=f"Fewer than two rounds have a value for {y}, so there is no curve to draw.")
    longest = max(max(s.x) for s in series)
    if x == "bytes" and longest == 0:
        return Chart(title, note="Nothing was sent, so there is no traffic to draw against.")
    divisor, unit = byte_unit(longest) if x == "bytes" else (1, "")
    scaled = [dataclasses.replace(s, x=[value / divisor for value in s.x]) for s in series]
    label = f"traffic, both directions ({unit})" if x == "bytes" else x
    figure = figures.curves(scaled, x=label, y=y, percent=fraction, target=target)
    shown = percent if fraction else number
    told = "; ".join(f"{s.label} from {shown(s.y[0])} to {shown(s.y[-1])}" for s in series[:12])
    told += "; bands of one standard deviation" if any(s.deviation for s in series) else ""
    legend = list(dict.fromkeys(Key(s.label, s.number) for s in series)) if len(series) > 1 else []
    legend += (
        [Key(f"target {percent(target, None) if fraction else number(target)}", kind="dash")]
        if target is not None
        else []
    )
    return chart(title, figure, told, legend)


def chart(title: str, figure: Figure, told: str, legend: Sequence[Key] = ()) -> Chart:
    """A drawn figure as part of a page; ``told`` says in words what it shows."""
    ident = "".join(c if c.isalnum() else "-" for c in title.lower())
    return Chart(title, svg.inline(figure, ident=ident, label=f"{title}: {told}"), legend=tuple(legend))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested mapping under its dotted key; items of a list count from 0.

    >>> leaves({"data": {"clients": 20}, "model": {"regularizers": [{"name": "dropout"}]}})
    {'data.clients': 20, 'model.regularizers.0.name': 'dropout'}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inner, Mapping) and inner:
            found |= leaves({str(k): v for k, v in inner.items()}, f"{path}.")
        else:
            found[path] = value
    return found
