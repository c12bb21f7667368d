import pytest

from fedsim.report import page
from fedsim.report.figures import Series


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_700, "1000 kB"), (5.4e12, "5.40 TB")],
)
def test_bytes_are_shown_in_decimal_units(count, text):
    assert page.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.00 s"), (9.994, "9.99 s"), (59.4, "59.4 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_shown_with_two_units(seconds, text):
    assert page.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (-3.0, "-3"), (1234.5, "1,234"), (1_000_000, "1,000,000"), (2.5, "2.5")]
)
def test_numbers_have_four_digits_or_are_whole(value, text):
    assert page.number(value) == text


def test_what_is_absent_is_a_dash_everywhere():
    assert {f(None) for f in (page.percent, page.number, page.size, page.duration)} == {page.ABSENT}


def test_leaves_keep_empty_containers_and_none():
    tree = {"a": {}, "b": [], "c": None, "d": [1, [2]], "e": {1: "x"}}
    assert page.leaves(tree) == {"a": {}, "b": [], "c": None, "d.0": 1, "d.1.0": 2, "e.1": "x"}


def test_a_chart_of_single_points_is_a_sentence():
    chart = page.curve_chart("Loss", [Series("a", [1], [0.5]), Series("b", [], [])], x="round", y="loss")
    assert chart.image is None
    assert "no curve" in chart.note


def test_a_run_that_sent_nothing_has_no_curve_over_traffic():
    chart = page.curve_chart("Loss", [Series("a", [0, 0], [0.5, 0.4])], x="bytes", y="loss")
    assert chart.image is None
    assert "Nothing was sent" in chart.note


def test_series_of_one_label_share_a_line_of_the_legend():
    series = [Series("a", [0, 1], [0, 1]), Series("a", [0, 1], [0, 2]), Series("b", [0, 1], [0, 3], number=1)]
    chart = page.curve_chart("Loss", series, x="round", y="loss")
    assert [key.label for key in chart.legend] == ["a", "b"]


def test_the_chart_tells_in_words_what_it_shows():
    chart = page.curve_chart("Accuracy", [Series("accuracy", [0, 1], [0.1, 0.5])], x="round", y="a", fraction=True)
    assert 'aria-label="Accuracy: accuracy from 10.00 % to 50.00 %"' in chart.image
