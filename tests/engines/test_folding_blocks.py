"""How a cohort is cut into blocks: by its clients and their numbers of examples, and by nothing else."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.engines.folding import blocks


def offsets_of(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def by_picking(sizes, cohort):
    """The order of a cohort: pick the largest that is left, the lowest id among equals."""
    left, order = set(cohort), []
    while left:
        largest = max(sizes[k] for k in left)
        order.append(min(k for k in left if sizes[k] == largest))
        left.remove(order[-1])
    return order


@given(st.lists(st.integers(1, 5), min_size=1, max_size=90), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_blocks_hold_every_client_of_the_cohort_once_the_largest_first(sizes, shuffler):
    cohort = shuffler.sample(range(len(sizes)), shuffler.randint(0, len(sizes)))
    cut_up = blocks(offsets_of(sizes), cohort)
    assert [k for block in cut_up for k in block] == by_picking(sizes, cohort)
    lengths = [len(block) for block in cut_up]
    assert all(length == math.ceil(len(cohort) / 16) for length in lengths[:-1])
    assert all(1 <= length <= math.ceil(len(cohort) / 16) for length in lengths)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_blocks_do_not_depend_on_the_order_of_the_cohort(sizes, shuffler):
    cohort = list(range(0, len(sizes), 2))
    expected = blocks(offsets_of(sizes), cohort)
    shuffler.shuffle(cohort)
    assert blocks(offsets_of(sizes), tuple(cohort)) == expected


def test_blocks_by_hand():
    assert blocks(offsets_of([3, 9, 3, 7, 5]), [0, 2, 3, 1]) == [(1,), (3,), (0,), (2,)]
    assert blocks(offsets_of([2] * 17 + [8]), range(18))[:2] == [(17, 0), (1, 2)]
    assert blocks(offsets_of([4]), []) == []


@pytest.mark.parametrize(
    ("clients", "lengths"),
    [
        (1, [1]),
        (16, [1] * 16),
        (17, [2] * 8 + [1]),
        (1000, [63] * 15 + [55]),
        (1024, [64] * 16),
        (1025, [64] * 16 + [1]),
        (5000, [64] * 78 + [8]),
    ],
)
def test_there_are_about_sixteen_blocks_and_none_of_more_than_64(clients, lengths):
    cut_up = blocks(offsets_of(np.arange(clients) % 7 + 1), random.Random(1).sample(range(clients), clients))
    assert [len(block) for block in cut_up] == lengths
