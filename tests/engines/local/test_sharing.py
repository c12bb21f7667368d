"""Ranges of examples cover all of them once, in whole batches, and their scores are those of one process."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.local.sharing import RANGES, Range, joined, ranges
from fedsim.records import Examples, Partition
from fedsim.training.evaluate import BATCH, score


def data(tests, owned):
    """Test examples and clients' own, of such numbers; the same object if ``owned`` is None."""
    test = Examples(rng.normal(1, tests, 3), rng.bits(2, tests) % 2)
    own = test if owned is None else Examples(rng.normal(3, owned, 3), rng.bits(4, owned) % 2)
    nobody = Partition(torch.zeros(1, dtype=torch.int64).numpy(), torch.zeros(0, dtype=torch.int64).numpy())
    return FederatedData(test, test, nobody, nobody, own, 2, ())


@given(n=st.integers(BATCH + 1, 40 * BATCH), processes=st.integers(1, 9))
def test_ranges_cover_every_example_once_in_whole_batches(n, processes):
    test = Examples(torch.zeros(n, 0), torch.zeros(n, dtype=torch.int64))
    made = data(0, None)
    found = ranges(FederatedData(made.train, test, made.partition, made.test_partition, test, 2, ()), test, processes)
    assert [i for one in found for i in range(one.start, min(one.end, n))] == list(range(n))
    assert all(one.start % BATCH == 0 and not one.own for one in found)
    assert len(found) <= RANGES * processes or found[0].end == BATCH


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("own", [False, True])
def test_scores_of_ranges_are_those_of_one_process_bit_for_bit(processes, own):
    made, model = data(3 * BATCH + 41, 2 * BATCH + 7), nn.Linear(3, 2)
    params, buffers = p.of(model)
    examples = made.client_test if own else made.test
    found = ranges(made, examples, processes)
    assert len(found) > 1 and all(one.own is own for one in found)
    whole = joined([score(model, params, buffers, one.of(made)) for one in found])
    expected = score(model, params, buffers, examples)
    for name in ("loss", "correct", "labels"):
        assert torch.equal(getattr(whole, name), getattr(expected, name))


def test_what_fits_one_batch_or_is_unknown_elsewhere_is_not_shared_out():
    small, large = data(BATCH, None), data(BATCH + 1, None)
    assert ranges(small, small.test, 4) == []
    assert ranges(large, large.test, 4) == [Range(0, BATCH, False), Range(BATCH, 2 * BATCH, False)]
    assert ranges(large, Examples(large.test.inputs, large.test.labels), 4) == []
