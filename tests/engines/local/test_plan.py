from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.engines.local.plan import LARGEST_CHUNK, PATHS, Plan, chunks, read, tasks

COHORTS = [(1, []), (4, []), (5, [2]), (16, [4]), (17, [4, 5]), (64, [4, 16]), (65, [4, 16, 17]), (256, [4, 16, 64])]


@pytest.mark.parametrize(("cohort", "expected"), [*COHORTS, (257, [4, 16, 64]), (10**6, [4, 16, 64])])
def test_chunks_grow_by_four_up_to_a_quarter_of_the_cohort(cohort, expected):
    assert chunks(cohort) == expected


@given(st.integers(1, 10**5))
def test_there_are_four_tasks_or_more_whatever_the_chunk(cohort):
    assert all(1 < size <= LARGEST_CHUNK and 4 * (size - 1) < cohort for size in chunks(cohort))


@given(clients=st.integers(1, 200), length=st.integers(1, 64), chunk=st.integers(1, 64))
def test_tasks_are_as_few_and_as_even_as_can_be(clients, length, chunk):
    blocks = [tuple(range(start, min(start + length, clients))) for start in range(0, clients, length)]
    found = tasks(blocks, chunk)
    assert [block for task in found for block in task] == blocks  # all, in order
    fits = 1
    while (fits + 1) * len(blocks[0]) <= chunk:
        fits += 1
    counts = [len(task) for task in found]
    assert max(counts) <= fits and max(counts) - min(counts) <= 1
    assert (len(found) - 1) * fits < len(blocks)  # one task fewer could not hold them


def test_nobody_makes_no_task():
    assert tasks([], 4) == []


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("chunk", [1, 17, 64])
@pytest.mark.parametrize("path", PATHS)
def test_a_plan_that_was_written_down_is_read_again(path, chunk, compiled):
    plan = Plan(path, chunk, compiled)
    assert read({**asdict(plan), "speeds": {}, "chosen": "measured"}) == plan


NOT_PLANS = [None, [], "fused", {}, {"path": "fused"}, {"chunk": 4}]
WRONG = [
    {"chunk": 0},
    {"chunk": 65},
    {"chunk": -4},
    {"chunk": 4.0},
    {"chunk": "4"},
    {"chunk": True},
    {"path": "warp"},
    {"path": None},
    {"path": ["fused"]},
]


@pytest.mark.parametrize("found", [*NOT_PLANS, *({"path": "fused", "chunk": 4, **change} for change in WRONG)])
def test_what_is_no_plan_is_none(found):
    assert read(found) is None


def test_a_run_of_before_there_was_compiling_was_not_compiled():
    assert read({"path": "fused", "chunk": 4}) == Plan("fused", 4, compiled=False)
