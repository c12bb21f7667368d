from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim.engines.flower import messages as m
from fedsim.records import Broadcast, ClientUpdate, Params

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.float16, torch.bool])
names = st.text(min_size=1, max_size=8)
KEYS = st.one_of(st.sampled_from([0, 2**63 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))


@st.composite
def tensors(draw: st.DrawFn) -> Params:
    made: Params = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        values = torch.linspace(-3.0, 5.0, int(np.prod(shape := draw(shapes)))).reshape(shape)
        made[name] = (values.t() if values.ndim == 2 else values).to(draw(dtypes))
    return made


def over_the_wire(content: RecordDict) -> RecordDict:
    """What another machine would get."""
    return recorddict_from_proto(type(proto := recorddict_to_proto(content)).FromString(proto.SerializeToString()))


@settings(deadline=None, max_examples=50)
@given(st.builds(Broadcast, tensors(), tensors(), tensors(), st.integers(0, 10**9)), st.integers(0, 10**6), KEYS)
def test_a_broadcast_survives_the_trip(sent: Broadcast, client: int, key: int) -> None:
    got, got_client, got_key = m.read_train(over_the_wire(m.train_content(m.pack_broadcast(sent), client, key)))
    assert (got.round, got_client, got_key) == (sent.round, client, key)
    for before, after in ((sent.params, got.params), (sent.buffers, got.buffers), (sent.extra, got.extra)):
        assert list(before) == list(after)
        assert p.same_bits(before, after)


metrics = st.dictionaries(names, st.floats(), max_size=3).map(lambda others: {**others, "train_loss": 0.5})


@settings(deadline=None, max_examples=50)
@given(tensors(), tensors(), metrics, st.integers(1, 10**12), st.integers(0, 10**6))
def test_an_update_survives_the_trip(
    params: Params, buffers: Params, metrics: dict[str, float], examples: int, client: int
) -> None:
    sent = ClientUpdate(client, params, buffers, examples, metrics, {"kept": torch.ones(2)})
    got = m.read_update(over_the_wire(m.update_content(sent)), Broadcast(params, buffers, {}, 1), client)
    assert (got.client, got.num_examples, got.state) == (client, examples, {})
    assert p.same_bits(got.update, params)
    assert p.same_bits(got.buffers, buffers)
    np.testing.assert_array_equal([*got.metrics.values()], [*metrics.values()])  # NaN equals NaN
    assert list(got.metrics) == list(metrics)


@settings(deadline=None, max_examples=50)
@given(tensors())
def test_a_state_survives_and_is_a_copy(state: Params) -> None:
    content = m.state_content(state)
    before = [(name, tensor.dtype, tensor.shape, tensor.tolist()) for name, tensor in state.items()]
    for tensor in state.values():
        tensor.zero_()
    got = m.read_state(content)
    assert [(name, tensor.dtype, tensor.shape, tensor.tolist()) for name, tensor in got.items()] == before
    assert bool(content) == bool(state)


scalars = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary())
arrays = st.builds(Array, st.text(), st.tuples(st.integers(0, 2**31 - 1)), st.text(), st.binary(max_size=300))
records = st.one_of(
    st.dictionaries(st.text(), arrays, max_size=3).map(ArrayRecord),
    st.dictionaries(st.text(), scalars, max_size=3).map(ConfigRecord),
    st.dictionaries(st.text(), st.floats(), max_size=3).map(MetricRecord),
)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.text(), records, max_size=3).map(RecordDict))
def test_bytes_counted_are_bytes_serialised(content: RecordDict) -> None:
    assert m.content_bytes(content) == len(recorddict_to_proto(content).SerializeToString())


@pytest.mark.parametrize("length", [*range(120, 132), *range(16_370, 16_390), 2_097_100, 2_097_152])
def test_bytes_counted_are_right_where_a_length_takes_another_byte(length: int) -> None:
    content = RecordDict({"r": ArrayRecord({"a": Array("uint8", (length,), "x", bytes(length))})})
    assert m.content_bytes(content) == len(recorddict_to_proto(content).SerializeToString())


def test_the_tensors_are_one_array_that_numpy_code_refuses() -> None:
    content = m.update_content(ClientUpdate(0, {"a": torch.ones(3), "b": torch.ones(2)}, {}, 1, {}, {}))
    (record,) = content.array_records.values()
    (array,) = record.values()
    assert (array.dtype, array.shape) == ("uint8", (len(array.data),))
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        array.numpy()


GLOBAL = Broadcast({"w": torch.zeros(2)}, {"n": torch.zeros((), dtype=torch.int64)}, {}, 4)
GOOD: dict[str, Any] = {
    "client": 3,
    "update": {"w": torch.ones(2)},
    "buffers": GLOBAL.buffers,
    "num_examples": 5,
    "metrics": {"train_loss": 1.0},
    "state": {},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client": 4}, "the update is of client 4"),
        ({"num_examples": 0}, "num_examples must be >= 1, got 0"),
        ({"metrics": {}}, "metrics have no train_loss"),
        ({"update": {"v": torch.ones(2)}}, "parameter names differ"),
        ({"update": {"w": torch.ones(2, 1)}}, "w: shapes differ"),
        ({"update": {"w": torch.ones(2).double()}}, "w: dtypes differ"),
        ({"buffers": {}}, "parameter names differ"),
    ],
)
def test_an_update_that_answers_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    assert m.read_update(m.update_content(ClientUpdate(**GOOD)), GLOBAL, 3).num_examples == 5
    with pytest.raises(ValueError, match=message):
        m.read_update(m.update_content(ClientUpdate(**{**GOOD, **change})), GLOBAL, 3)


TICKET = {"w": torch.tensor([[True, False, True]])}
WIDE = Broadcast({"w": torch.zeros(1, 3), "b": torch.zeros(1)}, {}, {}, 1)


def with_ticket(kept: Params, w: list[float]) -> RecordDict:
    update = {"w": torch.tensor([w]), "b": torch.ones(1)}
    return over_the_wire(m.update_content(ClientUpdate(3, update, {}, 5, {"train_loss": 0.5}, {}, 0, kept)))


def test_masks_of_its_own_come_with_an_update_where_clients_have_some() -> None:
    found = m.read_update(with_ticket(TICKET, [1.0, 0.0, -2.0]), WIDE, 3, tickets=True)
    assert p.same_bits(found.kept, TICKET) and found.update["w"].tolist() == [[1.0, 0.0, -2.0]]
    without = m.read_update(with_ticket({}, [1.0, 0.5, -2.0]), replace(WIDE, probe=True), 3, tickets=True)
    assert without.kept == {}  # a gradient that was asked for is dense


@pytest.mark.parametrize(
    ("kept", "w", "tickets", "rule"),
    [
        (TICKET, [1.0, 0.0, 2.0], False, "the update must have no masks of its own, got w"),
        ({}, [1.0, 0.0, 2.0], True, "the update must have masks of its own for w, got none"),
        ({"b": torch.ones(1, dtype=torch.bool)}, [1.0, 0.0, 2.0], True, "must have masks of its own for w, got b"),
        ({**TICKET, "b": torch.ones(1, dtype=torch.bool)}, [1.0, 0.0, 2.0], True, "for w, got w, b"),
    ],
)
def test_masks_that_nobody_asked_for_or_that_are_not_those_of_all_clients_are_refused(
    kept: Params, w: list[float], tickets: bool, rule: str
) -> None:
    with pytest.raises(ValueError, match=rf"{rule}$"):
        m.read_update(with_ticket(kept, w), WIDE, 3, tickets=tickets)


def test_a_mask_of_another_shape_is_refused() -> None:
    update = {"w": torch.tensor([[1.0], [0.0], [2.0]]), "b": torch.ones(1)}
    tall = {"w": torch.tensor([[True], [False], [True]])}
    content = m.update_content(ClientUpdate(3, update, {}, 5, {"train_loss": 0.5}, {}, 0, tall))
    with pytest.raises(ValueError, match=r"w: its mask must have the shape \[1, 3\], got \[3, 1\]$"):
        m.read_update(content, WIDE, 3, tickets=True)


def blob(data: bytes, stype: str = m.STYPE) -> RecordDict:
    return RecordDict({"fedsim.tensors": ArrayRecord({"blob": Array("uint8", (len(data),), stype, data)})})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        blob(b""),
        blob(b"\x80\x04."),
        blob(bytes(100)),
        blob(m.update_content(ClientUpdate(**GOOD))["fedsim.tensors"]["blob"].data, "numpy.ndarray"),
        RecordDict({"fedsim.tensors": ArrayRecord({"other": Array(np.ones(2))})}),
        RecordDict({"fedsim.tensors": ConfigRecord({"blob": 1})}),
        m.train_content(m.pack_broadcast(GLOBAL), 3, 1),
    ],
)
def test_what_is_not_an_update_is_refused(content: RecordDict) -> None:
    with pytest.raises(ValueError, match=r"the message has no array|not a fedsim message"):
        m.read_update(content, GLOBAL, 3)


@pytest.mark.parametrize("order", [None, {}, {"client": 1}, {"client": 1, "key": "2"}])
def test_what_is_no_order_to_train_is_refused(order: dict[str, Any] | None) -> None:
    content = m.train_content(m.pack_broadcast(GLOBAL), 1, 2)
    del content["fedsim.order"]
    if order is not None:
        content["fedsim.order"] = ConfigRecord(order)
    with pytest.raises(ValueError, match=r"no config record fedsim.order|client and key must be integers"):
        m.read_train(content)
