"""Rounds to target against numpy's interpolation, totals against sums by hand."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsim.records import RoundRecord
from fedsim.summary import Metrics, bytes_to_target, rounds_to_target, summarize

accuracies = st.lists(st.integers(0, 1000).map(lambda i: i / 1000), min_size=2, max_size=12)
gaps = st.lists(st.integers(1, 5), min_size=12, max_size=12)


def points(accuracy, gap):
    return [Metrics(int(r), None, a) for r, a in zip(np.cumsum([0, *gap]), accuracy, strict=False)]


@given(accuracies, gaps, st.floats(0.001, 1))
@settings(deadline=None, max_examples=200)
def test_on_a_rising_curve_it_is_linear_interpolation(accuracy, gap, target):
    accuracy = sorted(set(accuracy))
    assume(accuracy[0] < target <= accuracy[-1])
    curve = points(accuracy, gap)
    expected = np.interp(target, accuracy, [point.round for point in curve])
    assert rounds_to_target(curve, target) == pytest.approx(expected, abs=1e-9)


@given(accuracies, gaps, st.floats(0.001, 1))
@settings(deadline=None, max_examples=200)
def test_any_curve_counts_as_the_best_so_far(accuracy, gap, target):
    """The running maximum, by numpy, gives the same answer as the curve itself."""
    best = points(np.maximum.accumulate(accuracy).tolist(), gap)
    assert rounds_to_target(points(accuracy, gap), target) == rounds_to_target(best, target)


@given(accuracies, gaps, st.floats(0.001, 1))
@settings(deadline=None, max_examples=100)
def test_it_is_reached_between_the_last_round_below_and_the_first_at_or_above(accuracy, gap, target):
    curve = points(accuracy, gap)
    reached = [i for i, value in enumerate(accuracy) if value >= target]
    found = rounds_to_target(curve, target)
    if not reached:
        assert found is None
    elif reached[0] == 0:
        assert found == curve[0].round
    else:
        assert curve[reached[0] - 1].round < found <= curve[reached[0]].round + 1e-9


def test_rounds_without_evaluation_are_passed_over():
    curve = [Metrics(0, None, 0.2), Metrics(1, None, None), Metrics(2, None, 0.6)]
    assert rounds_to_target(curve, 0.4) == pytest.approx(1.0)
    assert rounds_to_target([], 0.4) is None


def record(round, accuracy, **more):
    loss = None if accuracy is None else 1 - accuracy
    fields = {"train_loss": 1.0, "clients": 3, "seconds": 0.5, "bytes_up": 10 * round, "bytes_down": 7}
    return RoundRecord(round, loss, accuracy, **{**fields, **more})


ROUNDS = [
    record(1, 0.2),
    record(2, 0.7, skipped=(4, 9), clients=1, failed={3: "gone"}),
    record(3, None),
    record(4, 0.6),
]


def test_final_is_the_last_evaluation_and_best_the_highest_accuracy():
    result = summarize(ROUNDS, Metrics(0, 2.3, 0.1), planned=9, target=None)
    assert result["final"] == {"round": 4, "loss": 0.4, "accuracy": 0.6}
    assert (result["accuracy"], result["loss"]) == (0.6, 0.4)
    assert result["best"] == {"round": 2, "loss": pytest.approx(0.3), "accuracy": 0.7}
    assert result["initial"] == {"round": 0, "loss": 2.3, "accuracy": 0.1}
    assert (result["rounds"], result["rounds_done"]) == (9, 4)
    assert result["totals"] == {
        "bytes_up": 100,
        "bytes_down": 28,
        "seconds": 2.0,
        "client_updates": 10,
        "skipped_updates": 2,
        "failed_updates": 1,
    }
    assert "rounds_to_target" not in result


def test_the_target_counts_from_the_untrained_model():
    result = summarize(ROUNDS, Metrics(0, 2.3, 0.1), planned=4, target=0.15)
    assert result["target_accuracy"] == 0.15 and result["rounds_to_target"] == pytest.approx(0.5)
    assert summarize(ROUNDS, None, planned=4, target=0.15)["rounds_to_target"] == 1.0
    assert summarize(ROUNDS, None, planned=4, target=0.9)["rounds_to_target"] is None


@given(accuracies, gaps, st.lists(st.integers(0, 99), min_size=61, max_size=61), st.floats(0.001, 1))
@settings(deadline=None, max_examples=200)
def test_bytes_to_target_are_where_accuracy_by_traffic_crosses_it(accuracy, gap, sizes, target):
    """On the running maximum against what was sent, by numpy, with rounds between evaluations that cost as they do."""
    curve = points(accuracy, gap)
    made = [record(r, None, bytes_up=sizes[r], bytes_down=3 + r % 5) for r in range(1, curve[-1].round + 1)]
    sent = np.concatenate([[0], np.cumsum([r.bytes_up + r.bytes_down for r in made])])
    best = np.maximum.accumulate(accuracy)
    found = bytes_to_target(made, curve, target)
    if target > best[-1]:
        assert found is None
        return
    first = int(np.argmax(best >= target))
    at = [sent[curve[i].round] for i in (max(first - 1, 0), first)]
    expected = at[1] if first == 0 else np.interp(target, best[first - 1 : first + 1], at)
    assert found == pytest.approx(expected, abs=1e-6)


def test_bytes_to_target_are_in_the_summary():
    result = summarize(ROUNDS, Metrics(0, 2.3, 0.1), planned=4, target=0.45)
    assert result["bytes_to_target"] == pytest.approx(17 + 0.5 * 27)
    assert summarize(ROUNDS, None, planned=4, target=0.9)["bytes_to_target"] is None


def test_the_sparsity_is_the_last_one_that_a_round_tells():
    first = record(1, 0.2, sparsity=0.125, remaining={"a": 0.75})
    pruned = [first, record(2, 0.3, sparsity=0.25, remaining={"a": 0.5}), record(3, None)]
    result = summarize(pruned, None, planned=3, target=None)
    assert (result["sparsity"], result["remaining"]) == (0.25, {"a": 0.5})
    assert not {"sparsity", "remaining"} & summarize(ROUNDS, None, planned=4, target=None).keys()


def test_a_run_without_rounds_has_a_summary_too():
    result = summarize([], None, planned=5, target=0.5)
    assert (result["final"], result["best"], result["accuracy"], result["rounds_done"]) == (None, None, None, 0)
    assert result["totals"]["bytes_up"] == 0 and result["rounds_to_target"] is None


def test_of_equal_accuracies_the_first_is_best():
    assert summarize([record(1, 0.5), record(2, 0.5)], None, planned=2, target=None)["best"]["round"] == 1
