"""A matplotlib figure as SVG that is part of a page: it takes the page's font and its light or dark colours.

matplotlib writes SVG documents of their own. Here one becomes an element: no prologue, no metadata, ids that are
unique on the page, and palette colours replaced by the CSS variables of style.css.
"""

import html
import io
import re
import warnings
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from fedsim.report.palette import PALETTE

_PALETTE_COLOUR = re.compile("|".join(PALETTE.values()))
_VARIABLES = {colour: f"var(--{name})" for name, colour in PALETTE.items()}


def inline(fig: Figure, *, ident: str, label: str) -> Markup:
    """The figure as an ``<svg>`` element; the same figure gives the same bytes.

    Args:
        fig: made by :mod:`fedsim.report.figures`, one unit per CSS pixel.
        ident: unique on the page; goes before every id inside.
        label: what a reader who cannot see the chart is told.

    Returns:
        Safe to put into a page as it is.
    """
    text = _document(fig, salt=ident)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1@label@>", text, count=1)
    text = re.sub(r'\bid="', f'id="{ident}-', text)
    text = re.sub(r'xlink:href="#', f'href="#{ident}-', text).replace("xlink:href=", "href=")
    text = text.replace("url(#", f"url(#{ident}-")
    text = re.sub(r'style="[^"]*"', lambda match: _PALETTE_COLOUR.sub(lambda c: _VARIABLES[c[0]], match[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text).strip()
    return Markup(text.replace("@label@", f' role="img" aria-label="{html.escape(label)}"', 1))


def _document(fig: Figure, salt: str) -> str:
    buffer = io.StringIO()
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "image.composite_image": False}
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has the fonts, not we
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
