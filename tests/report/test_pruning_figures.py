import numpy as np
import pytest

from fedsim.report import pruning_figures as figures


def test_steps_stand_on_each_other_one_a_round():
    figure = figures.steps([3, 4, 5], [[1, 2, 1], [4, 0, 2]], y="sent")
    filled = [patch for patch in figure.axes[0].patches if patch.get_fill()]
    assert [patch.get_data().values.tolist() for patch in filled] == [[1, 2, 1], [5, 2, 3]]
    assert np.asarray(filled[1].get_data().baseline).tolist() == [1, 2, 1]
    assert filled[0].get_data().edges.tolist() == [2.5, 3.5, 4.5, 5.5]
    assert figure.axes[0].get_ylim()[0] == 0


def test_steps_of_nothing_can_be_drawn():
    assert figures.steps([1], [[0.0]], y="sparsity", percent=True).axes[0].get_ylim() == (0, 1)


def test_the_map_shows_each_layer_as_a_row_on_a_scale_from_0_to_1():
    sparsity = np.array([[0, 0.5, 0.75], [0, 0, 0.25]])
    axes = figures.layers([1, 2, 3], ["conv", "head"], sparsity).axes[0]
    image = axes.images[0]
    np.testing.assert_array_equal(np.asarray(image.get_array()), sparsity)
    assert image.get_clim() == (0, 1)
    assert image.get_extent() == [0.5, 3.5, 1.5, -0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv", "head"]


@pytest.mark.parametrize("count", [1, 3, 20, 60, 200])
def test_names_of_layers_have_room(count):
    figure = figures.layers([1, 2], [f"block.{i}.with.a.very.long.name{i}" for i in range(count)], np.zeros((count, 2)))
    axes, (_, height) = figure.axes[0], figure.get_size_inches() * 72
    figure.draw_without_rendering()
    named = axes.get_yticks()
    pitch = axes.get_window_extent().height / count * (named[1] - named[0] if len(named) > 1 else 1)
    assert pitch >= 11
    assert height <= 520
    assert all(len(label.get_text()) <= figures.NAME for label in axes.get_yticklabels())
    assert axes.get_yticklabels()[-1].get_text().endswith(f"name{int(named[-1])}")


def test_fewer_weights_are_to_the_right_on_a_logarithmic_axis():
    left, accuracy = [1.0, 0.8, 0.5, 0.1], [0.9, 0.95, 0.93, 0.4]
    axes = figures.by_remaining(left, accuracy, target=0.6).axes[0]
    line, target = axes.lines
    assert line.get_xydata().tolist() == [list(pair) for pair in zip(left, accuracy, strict=True)]
    assert (line.get_linestyle(), target.get_ydata()) == ("-", [0.6, 0.6])
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low > high
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100 %", "50 %", "10 %"]


def test_points_that_go_back_are_not_joined():
    assert figures.by_remaining([1, 0.5, 0.7], [0.1, 0.2, 0.3]).axes[0].lines[0].get_linestyle() == "None"


@pytest.mark.parametrize("values", [np.linspace(1, 0.001, 500), 0.8 ** np.arange(25), [1.0, 0.999], [0.3]])
def test_ticks_are_few_apart_and_among_the_values(values):
    ticks = [tick.tolist() for tick in figures.by_remaining(list(values), list(values)).axes[0].get_xticks()]
    assert set(ticks) <= {float(v) for v in values}
    assert len(ticks) <= figures.MAX_TICKS + 1
    gaps = -np.diff(np.log(ticks))
    assert len(ticks) == 1 or gaps.min() >= np.log(values[0] / values[-1]) / figures.MAX_TICKS - 1e-12
