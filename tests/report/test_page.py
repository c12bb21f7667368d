from fedsim.report import page
from fedsim.report.figures import Series


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
