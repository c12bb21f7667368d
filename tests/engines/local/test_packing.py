"""Records as structure and one array: whatever goes in comes out, aligned, and copied only if asked."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsim import rng
from fedsim.engines.local.memory import ALIGNMENT, packed, unpacked
from fedsim.records import Broadcast

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5)


@given(shapes=SHAPES, dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16, torch.bool]))
def test_tensors_of_any_shape_and_dtype_come_back(shapes, dtype):
    sent = {str(i): (3 * rng.normal(i, *shape)).to(dtype) for i, shape in enumerate(shapes)}
    for copy in (True, False):
        found = unpacked(packed(sent), copy=copy)
        assert found.keys() == sent.keys()
        for name, tensor in sent.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_what_is_no_plain_tensor_comes_back_too():
    last = rng.normal(1, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    record = (Broadcast({"w": last}, {}, {}, 7), nn.Linear(2, 3), np.arange(5)[::2], "words", {3: None}, torch.zeros(0))
    broadcast, linear, array, words, nothing, empty = unpacked(packed(record), copy=False)
    assert torch.equal(broadcast.params["w"], last) and broadcast.round == 7
    assert broadcast.params["w"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(linear.weight, record[1].weight) and linear.weight.requires_grad
    assert array.tolist() == [0, 2, 4] and (words, nothing, len(empty)) == ("words", {3: None}, 0)


def test_a_lane_takes_its_own_numbers_only():
    """Torch's own pickle of a slice holds all it is a slice of."""
    whole = rng.normal(1, 50, 1000)
    structure, numbers = packed({"a": whole[7], "b": whole[:, 3]})
    assert numbers.nbytes <= 4 * 1050 + ALIGNMENT and len(structure) < 1000
    found = unpacked((structure, numbers), copy=True)
    assert torch.equal(found["a"], whole[7]) and torch.equal(found["b"], whole[:, 3])


@pytest.mark.parametrize("offset", [0, 8, 64])
@pytest.mark.parametrize("copy", [True, False])
def test_numbers_that_arrive_anywhere_read_only_lie_aligned(offset, copy):
    structure, numbers = packed({"a": torch.arange(3.0), "b": torch.arange(40.0)})
    room = torch.zeros(len(numbers) + 128, dtype=torch.uint8).numpy()
    there = room[offset : offset + len(numbers)]
    there[:] = numbers
    there.flags.writeable = False
    found = unpacked((structure, there), copy=copy)
    assert found["b"].tolist() == list(range(40))
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.values())
    inside = there.ctypes.data <= found["b"].data_ptr() < there.ctypes.data + len(there)
    assert inside == (not copy and offset % ALIGNMENT == 0)


def test_structure_is_a_pickle_without_numbers():
    structure, numbers = packed({"a": torch.full((1000,), 1.5)})
    assert len(structure) < 300 and numbers.nbytes == 4000
    assert numbers.view(np.float32).tolist() == [1.5] * 1000
    assert len(pickle.dumps((structure, numbers), protocol=5, buffer_callback=lambda buffer: False)) < 1000
