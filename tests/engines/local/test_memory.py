import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.engines.local.memory import ALIGNMENT, Shared, packed, read, size_of, unpacked, write
from fedsim.records import Broadcast

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (1, 4, 1, 1), (2, 0, 3, 3), (5, 2, 3, 2, 2)]
LAYOUTS = ["plain", "channels last", "transposed", "cut", "expanded"]


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], layout: str, seed: int) -> Tensor:
    """Both signs, and what floats can hold beside numbers."""
    values = (torch.arange(int(np.prod(shape))) * 7919 + seed) % 251 - 125
    tensor = values.reshape(shape).to(dtype)
    if dtype.is_floating_point and tensor.numel() > 2:
        tensor.view(-1)[0], tensor.view(-1)[1], tensor.view(-1)[2] = float("nan"), float("-inf"), -0.0
    if layout == "channels last" and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "cut" and tensor.ndim >= 1:
        return torch.cat([tensor, tensor])[: shape[0]]
    if layout == "expanded" and tensor.ndim >= 1 and shape[0]:
        return tensor[:1].expand(shape)
    return tensor


tensors = st.builds(
    tensor_of, st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.sampled_from(LAYOUTS), st.integers(0, 999)
)
records = st.dictionaries(st.text(max_size=5), tensors, max_size=6)


def same(one: Tensor, other: Tensor) -> bool:
    """Dtype, shape and every bit, NaN and the sign of zero as well."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)


@given(record=records, copy=st.booleans())
def test_what_is_written_is_read_bit_for_bit(record, copy):
    shared = Shared(size_of(record))
    found = read(write(record, shared), shared, copy=copy)
    assert found.keys() == record.keys()
    assert all(same(found[name], tensor) for name, tensor in record.items())


@given(record=records, room=st.integers(0, 300), copy=st.booleans())
def test_what_does_not_fit_comes_another_way(record, room, copy):
    shared = Shared(room)
    found = read(write(record, shared), shared, copy=copy)
    assert all(same(found[name], tensor) for name, tensor in record.items())


@given(record=records, copy=st.booleans())
def test_a_record_packed_into_one_array_comes_back_aligned_or_not(record, copy):
    structure, numbers = packed(record)
    shifted = np.empty(len(numbers) + 1, dtype=np.uint8)[1:]
    shifted[:] = numbers
    shifted.flags.writeable = False
    for sent in (numbers, shifted):
        found = unpacked((structure, sent), copy=copy)
        assert all(same(found[name], tensor) for name, tensor in record.items())


@given(st.lists(st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]), max_size=5), st.integers(0, 9))
def test_arrays_travel_as_tensors_do(dtypes, n):
    record = [np.arange(2 * n).reshape(2, n)[:, ::-1].astype(dtype) for dtype in dtypes]
    record += [array.T for array in record] + [np.array(["text"]), np.float64(3.5)]
    shared = Shared(size_of(record))
    for one, other in zip(read(write(record, shared), shared, copy=True), record, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)


@pytest.mark.parametrize("ndim", [3, 4, 5])
def test_channels_last_stays_and_all_else_comes_back_contiguous(ndim):
    last = torch.arange(240.0).reshape(2, 3, 4, 10).to(memory_format=torch.channels_last)
    record = {"last": last, "other": torch.arange(720.0).reshape((*(2, 3, 4, 5, 6)[:ndim], -1)).transpose(0, 1)}
    shared = Shared(size_of(record))
    found = read(write(record, shared), shared, copy=False)
    assert found["last"].is_contiguous(memory_format=torch.channels_last) and not found["last"].is_contiguous()
    assert found["last"].stride() == last.stride() and found["other"].is_contiguous()


def test_all_lies_at_multiples_of_the_alignment_and_structure_is_small():
    record = {name: torch.ones(n) for name, n in (("a", 1), ("b", 17), ("c", 100_000))}
    shared = Shared(size_of(record))
    data = write(record, shared)
    found = read(data, shared, copy=False)
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.values())
    assert len(data) < 1000 and shared.size < 400_000 + 4 * ALIGNMENT


def test_without_a_copy_tensors_are_the_memory_and_with_one_they_are_not():
    shared = Shared(1000)
    data = write({"a": torch.full((5,), 2.0)}, shared)
    seen, copied = read(data, shared, copy=False), read(data, shared, copy=True)
    write({"a": torch.full((5,), -3.0)}, shared)
    assert seen["a"].tolist() == [-3.0] * 5 and copied["a"].tolist() == [2.0] * 5


def test_two_who_map_the_same_memory_see_the_same():
    """As a worker does, by the descriptor that it inherits."""
    shared = Shared(1000)
    data = write([torch.arange(9)], shared)
    other = Shared(shared.size, os.dup(shared.fd))
    assert torch.equal(read(data, other, copy=False)[0], torch.arange(9))
    other.bytes()[:8] = (77).to_bytes(8, "little")
    assert int(read(data, shared, copy=True)[0][0]) == 77


def test_the_descriptor_is_closed_with_its_memory():
    shared = Shared(10)
    fd = shared.fd
    os.fstat(fd)
    del shared
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_without_memfd_is_a_file_without_a_name(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = Shared(100)
    assert torch.equal(read(write([torch.ones(3)], shared), shared, copy=True)[0], torch.ones(3))
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Nested:
    broadcast: Broadcast
    model: nn.Module
    more: tuple[dict[int, dict[str, Tensor]], str]


def test_records_keep_their_form_and_parameters_stay_parameters():
    model = nn.Linear(3, 2)
    one = Nested(Broadcast({"w": torch.ones(2)}, {}, {"e": torch.zeros(1)}, 4), model, ({3: {"s": torch.ones(1)}}, "x"))
    shared = Shared(size_of(one))
    found = read(write(one, shared), shared, copy=False)
    assert isinstance(found, Nested) and found.broadcast.round == 4 and found.more[1] == "x"
    assert torch.equal(found.more[0][3]["s"], torch.ones(1)) and found.broadcast.buffers == {}
    assert isinstance(found.model.weight, nn.Parameter) and found.model.weight.requires_grad
    assert torch.equal(found.model.weight, model.weight)
