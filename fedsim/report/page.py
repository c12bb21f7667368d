"""What the two pages share: the template environment, numbers as text, and charts with their legend."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from fedsim.report import figures, svg
from fedsim.report.figures import Series

_HERE = Path(__file__).parent
ABSENT = "–"  # noqa: RUF001  # a dash, as in a printed table


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
    divisor, unit = _byte_unit(longest) if x == "bytes" else (1, "")
    scaled = [dataclasses.replace(s, x=[value / divisor for value in s.x]) for s in series]
    label = f"traffic, both directions ({unit})" if x == "bytes" else x
    figure = figures.curves(scaled, x=label, y=y, percent=fraction, target=target)
    shown = percent if fraction else number
    told = "; ".join(f"{s.label} from {shown(s.y[0])} to {shown(s.y[-1])}" for s in series[:12])
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


# ---------------------------------------------------------------- numbers as text


def percent(fraction: float | None, digits: int | None = 2) -> str:
    """A fraction as per cent; ``digits`` None writes as few as needed.

    >>> percent(0.9142), percent(0.8, None), percent(None)
    ('91.42 %', '80 %', '–')
    """
    if fraction is None:
        return ABSENT
    return f"{100 * fraction:g} %" if digits is None else f"{100 * fraction:.{digits}f} %"


def number(value: float | None) -> str:
    """Four significant digits; whole numbers in full, with thousands set apart.

    >>> number(0.28765), number(12345), number(None)
    ('0.2877', '12,345', '–')
    """
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def _byte_unit(count: float) -> tuple[int, str]:
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return 1000**power, unit
    return 1, "B"


def size(count: float | None) -> str:
    """Bytes in decimal units.

    >>> size(999), size(24_700_000)
    ('999 B', '24.7 MB')
    """
    if count is None:
        return ABSENT
    divisor, unit = _byte_unit(count)
    scaled = count / divisor
    digits = 0 if divisor == 1 or scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


def duration(seconds: float | None) -> str:
    """Wall time with the two largest units.

    >>> duration(0.4), duration(75), duration(7260)
    ('0.40 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(i for i, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount} {unit}" for amount, unit in parts[first : first + 2])
