"""The streaming mean against numpy's average, in stacks of any length and in parts folded apart."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.strategies.aggregators import weighted_mean

ADD, MERGE, START, FINISH = (getattr(weighted_mean(), name) for name in ("add", "merge", "start", "finish"))
WEIGHTS, ENDS = st.lists(st.floats(0.01, 500), min_size=1, max_size=7), st.lists(st.integers(0, 7), max_size=4)


def updates(count, dtype=torch.float64, key=0):
    return [
        {"w": rng.normal(rng.fold(key, i), 3, 2, dtype=dtype), "b": rng.normal(rng.fold(key, i, "b"), 2, dtype=dtype)}
        for i in range(count)
    ]


def accumulated(updates, weights, ends=()):
    """The accumulator of updates added in stacks, cut at each of ``ends``."""
    acc, bounds = START(), sorted({0, len(updates), *(min(end, len(updates)) for end in ends)})
    for start, end in itertools.pairwise(bounds):
        acc = ADD(acc, p.stack(updates[start:end]), weights[start:end])
    return acc


def folded(updates, weights, ends=()):
    return FINISH(accumulated(updates, weights, ends))


def average(updates, weights):
    return {name: np.average([update[name].numpy() for update in updates], 0, weights) for name in updates[0]}


def assert_close(mean, expected):
    assert list(mean) == list(expected)
    assert all(np.abs(mean[name].numpy() - expected[name]).max() < 1e-12 for name in expected)


@given(WEIGHTS, ENDS, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_it_is_numpys_average(weights, ends, key):
    many = updates(len(weights), key=key)
    assert_close(folded(many, weights, ends), average(many, weights))


@given(WEIGHTS, ENDS, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_a_stack_is_added_lane_after_lane(weights, ends, key):
    """So the length of stacks changes no bit, in float32 either."""
    many = updates(len(weights), torch.float32, key)
    assert p.same_bits(folded(many, weights, ends), folded(many, weights, range(len(weights))))


@given(WEIGHTS, WEIGHTS, WEIGHTS, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_parts_folded_apart_and_merged_are_numpys_average(first, second, third, key):
    weights = first + second + third
    many, one, two = updates(len(weights), key=key), len(first), len(first) + len(second)
    parts = [accumulated(many[a:b], weights[a:b]) for a, b in ((0, one), (one, two), (two, None))]
    acc = START()
    for part in parts:
        acc = MERGE(acc, part)
    assert_close(FINISH(acc), average(many, weights))


def test_a_merged_accumulator_takes_more():
    many, weights = updates(5), [3.0, 0.5, 1.0, 2.0, 7.0]
    acc = MERGE(accumulated(many[:2], weights[:2]), accumulated(many[2:3], weights[2:3]))
    acc = ADD(acc, p.stack(many[3:]), weights[3:])
    assert_close(FINISH(acc), average(many, weights))


def test_what_is_merged_comes_after():
    """2^24 + 1 is 2^24 in float32: the order of a sum shows."""
    big, one = 2.0**24, torch.ones(1)

    def merged(*values):
        acc = START()
        for value in values:
            acc = MERGE(acc, ADD(START(), {"w": one[None] * value}, [1.0]))
        return float(FINISH(acc)["w"])

    assert merged(big, 1.0, -big) == 0.0
    assert merged(big, -big, 1.0) == pytest.approx(1 / 3)


def test_merging_with_nothing_changes_nothing():
    many, weights = updates(3), [2.0, 1.0, 0.5]
    alone = folded(many, weights)
    assert p.same_bits(FINISH(MERGE(START(), accumulated(many, weights))), alone)
    assert p.same_bits(FINISH(MERGE(accumulated(many, weights), START())), alone)
    assert FINISH(MERGE(START(), START())) is None


@pytest.mark.parametrize("count", [0, 3])
def test_an_accumulator_can_be_pickled_on_its_way_to_another_process(count):
    many, weights = updates(5), [2.0, 1.0, 0.5, 3.0, 0.25]
    there = pickle.loads(pickle.dumps(accumulated(many[:count], weights[:count])))
    acc = ADD(MERGE(START(), there), p.stack(many[count:]), weights[count:])
    assert p.same_bits(FINISH(acc), folded(many, weights))
    back = pickle.loads(pickle.dumps(weighted_mean()))
    assert back == weighted_mean()


def test_it_keeps_the_dtype_and_the_order_of_names():
    weights = [1.0, 2.0, 7.0]
    merged = MERGE(*(accumulated(updates(3, torch.float32, key), weights) for key in (0, 1)))
    for mean in (folded(updates(3, torch.float32), weights), FINISH(merged)):
        assert list(mean) == ["w", "b"] and {t.dtype for t in mean.values()} == {torch.float32}


def test_updates_are_not_changed_and_not_kept():
    stack, weights = p.stack(updates(3)), [2.0, 1.0, 1.0]
    acc = ADD(START(), stack, weights)
    assert p.same_bits(stack, p.stack(updates(3)))
    for tensor in stack.values():
        tensor.zero_()
    assert p.same_bits(FINISH(acc), folded(updates(3), weights))
    one = p.stack(updates(1))
    acc = ADD(START(), one, [1.0])
    one["w"].zero_()
    assert p.same_bits(FINISH(acc), updates(1)[0])


def test_of_nothing_it_is_none_and_of_empty_dicts_empty():
    assert FINISH(START()) is None and FINISH(ADD(START(), {}, [])) is None
    assert FINISH(ADD(ADD(START(), {}, [1.0, 2.0]), {}, [3.0])) == {}


def test_a_stack_of_nobody_changes_nothing():
    nobody = {name: tensor[:0] for name, tensor in p.stack(updates(1)).items()}
    assert FINISH(ADD(START(), nobody, [])) is None
    acc = ADD(ADD(START(), p.stack(updates(2)), [1.0, 2.0]), nobody, [])
    assert p.same_bits(FINISH(acc), folded(updates(2), [1.0, 2.0]))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("lane", [0, 2])
def test_it_refuses_weights(weight, lane):
    weights = [1.0, 2.0, 3.0]
    weights[lane] = weight
    with pytest.raises(ValueError, match=f"weight must be > 0, got {weight}"):
        folded(updates(3), weights)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_it_refuses_another_number_of_weights_than_updates(weights):
    for acc in (START(), accumulated(updates(1), [1.0])):
        with pytest.raises(ValueError, match=f"w: needs one update for each of {len(weights)} weights, got 2"):
            ADD(acc, p.stack(updates(2)), weights)


OTHERS = {
    r"w: shapes differ: \(3, 2\) and \(2, 3\)": {"w": torch.zeros(2, 3).double(), "b": torch.zeros(2).double()},
    "b: dtypes differ: torch.float64 and torch.float32": {"w": torch.zeros(3, 2).double(), "b": torch.zeros(2)},
    r"parameter names differ: \['b'\]": {"w": torch.zeros(3, 2).double()},
    r"parameter names differ: \['b', 'w'\]": {},
}


@pytest.mark.parametrize(("rule", "other"), OTHERS.items(), ids=OTHERS)
def test_it_refuses_updates_that_differ(rule, other):
    for start, later in ((updates(1)[0], other), (other, updates(1)[0])):
        either = rf"{rule}|{' and '.join(rule.rpartition(': ')[2].split(' and ')[::-1])}"
        with pytest.raises(ValueError, match=either):
            ADD(accumulated([start], [1.0]), p.stack([later]), [1.0])
        with pytest.raises(ValueError, match=either):
            MERGE(accumulated([start], [1.0]), accumulated([later], [1.0]))


def test_it_is_linear():
    assert weighted_mean().linear
