import re

from matplotlib.figure import Figure

from fedsim.report import figures, svg
from fedsim.report.palette import PALETTE

SPLIT = {"counts": [[3, 0], [1, 4]], "class_names": ["<b>&</b>", "$x_$"]}


def test_an_inlined_chart_is_one_svg_element_without_anything_that_needs_the_network():
    text = svg.inline(figures.split_heatmap(SPLIT), ident="a", label="counts")
    assert text.startswith("<svg ")
    assert text.endswith("</svg>")
    assert "http" not in text
    assert "<style" not in text
    assert "<metadata" not in text


def test_the_same_data_give_the_same_bytes():
    first, second = (svg.inline(figures.split_heatmap(SPLIT), ident="a", label="x") for _ in range(2))
    assert first == second


def test_ids_carry_the_given_prefix_and_every_reference_meets_one():
    text = svg.inline(figures.split_heatmap(SPLIT), ident="heat", label="x")
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert ids
    assert all(i.startswith("heat-") for i in ids)
    references = re.findall(r'href="#([^"]*)"', text) + re.findall(r"url\(#([^)]*)\)", text)
    assert references
    assert set(references) <= set(ids)


def test_palette_colours_become_css_variables():
    text = svg.inline(figures.split_heatmap(SPLIT), ident="a", label="x")
    assert "var(--muted)" in text
    assert "var(--series-0)" in text
    assert not any(colour in text for colour in PALETTE.values())


def test_the_label_is_there_for_readers_who_cannot_see_the_chart_and_is_escaped():
    text = svg.inline(Figure(), ident="a", label='5" <b>')
    assert 'role="img" aria-label="5&quot; &lt;b&gt;"' in text


def test_hostile_class_names_are_text_and_no_formulas():
    text = svg.inline(figures.split_heatmap(SPLIT), ident="a", label="x")
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in text
    assert "$x_$" in text
