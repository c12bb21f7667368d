import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from fedsim.report import figures
from fedsim.report.figures import Series


def _image(figure):
    """The heat map's data, absent cells as 0."""
    return np.ma.filled(figure.axes[0].images[0].get_array(), 0.0)


def test_the_heat_map_shows_the_counts_as_they_are_and_sums_them_beside():
    counts = [[3, 0, 5], [1, 4, 0]]
    figure = figures.split_heatmap({"counts": counts})
    assert _image(figure).tolist() == counts
    assert figure.axes[1].patches[0].get_data().values.tolist() == [8, 5]


def test_classes_that_a_client_lacks_stay_background():
    masked = figures.split_heatmap({"counts": [[3, 0], [0, 4]]}).axes[0].images[0].get_array()
    assert np.ma.getmaskarray(masked).tolist() == [[False, True], [True, False]]


def test_beyond_the_row_limit_a_row_is_the_mean_of_neighbours_and_the_last_group_may_be_smaller():
    counts = np.random.default_rng(3).integers(0, 50, (figures.MAX_ROWS * 2 + 8, 3))
    shown = _image(figures.split_heatmap({"counts": counts.tolist()}))
    expected = [counts[start : start + 3].mean(axis=0) for start in range(0, len(counts), 3)]
    np.testing.assert_allclose(shown, expected)
    assert len(counts) % 3 != 0


def test_ten_thousand_clients_fit_into_a_small_png_on_white(tmp_path: Path):
    counts = np.random.default_rng(5).integers(0, 9, (10_000, 62))
    path = tmp_path / "new folder" / "split.png"
    figures.save_png(figures.split_heatmap({"counts": counts.tolist()}), path)
    pixels = matplotlib.image.imread(io.BytesIO(path.read_bytes()), format="png")
    assert pixels.shape[1] == 2 * figures.WIDTH
    assert pixels[0, 0].tolist() == [1, 1, 1, 1]
    assert path.stat().st_size < 1_000_000


def test_one_client_with_one_class_can_be_drawn(tmp_path: Path):
    figures.save_png(figures.split_heatmap({"counts": [[0]], "class_names": ["猫"]}), tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_class_names_are_used_only_where_there_is_one_for_each_class():
    named = figures.split_heatmap({"counts": [[1, 2]], "class_names": ["cat", "a name that goes on and on"]})
    assert [label.get_text() for label in named.axes[0].get_xticklabels()] == ["cat", "a name that g…"]
    fewer = figures.split_heatmap({"counts": [[1, 2]], "class_names": ["cat"]})
    assert "cat" not in [label.get_text() for label in fewer.axes[0].get_xticklabels()]


@pytest.mark.parametrize("split", [{}, {"counts": None}, {"counts": []}])
def test_a_split_without_counts_is_refused(split):
    with pytest.raises(ValueError, match="must have label counts"):
        figures.split_heatmap(split)


def test_curves_hold_the_points_they_were_given_and_the_target_level():
    figure = figures.curves([Series("a", [0, 2], [0.5, 0.75], number=1)], x="round", y="accuracy", target=0.6)
    line, target = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0.5], [2, 0.75]]
    assert target.get_ydata() == [0.6, 0.6]


def test_a_band_reaches_one_deviation_above_and_below_its_line():
    with_band, without = Series("a", [0, 2], [0.5, 0.75], deviation=[0.0, 0.125]), Series("b", [0, 2], [0, 1])
    (band,) = figures.curves([with_band, without], x="round", y="accuracy").axes[0].collections
    assert {(x, y) for x, y in band.get_paths()[0].vertices.tolist()} == {(0, 0.5), (2, 0.625), (2, 0.875)}


def test_no_two_of_the_first_eighteen_series_look_alike():
    looks = {(figures.colour(i), figures.dash(i)) for i in range(18)}
    assert len(looks) == 18


def test_a_histogram_counts_every_value_once_ends_included():
    figure = figures.histogram([0.0, 0.51, 0.52, 1.0], x="accuracy", span=(0.0, 1.0))
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == 4
    assert (heights[0], heights[10], heights[-1]) == (1, 2, 1)


def test_a_users_own_matplotlib_settings_change_nothing():
    import matplotlib as mpl

    plain = figures.histogram([0.5], x="accuracy", span=(0.0, 1.0))
    with mpl.rc_context({"font.size": 31, "axes.facecolor": "red"}):
        other = figures.histogram([0.5], x="accuracy", span=(0.0, 1.0))
    for figure in (plain, other):
        assert figure.axes[0].xaxis.label.get_size() == 12
        assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)
