"""The chart colours, by the name of the CSS variable that stands for each on a page.

The values are those of the light theme: a figure saved as PNG shows them as they are, and in a page svg.py replaces
each by its variable, so that style.css decides. Series colours keep 3:1 contrast to the background in either theme
and differ in lightness as well as hue (after Okabe and Ito 2008), which colour-blind readers need.
"""

INK, MUTED, GRID = "#1d2430", "#5b6573", "#dde2e9"
SERIES = ("#0072b2", "#d55e00", "#00875f", "#a83279", "#8a6d00", "#4a4f57")

PALETTE = {"ink": INK, "muted": MUTED, "grid": GRID, **{f"series-{i}": c for i, c in enumerate(SERIES)}}
