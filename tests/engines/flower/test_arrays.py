"""A lazy array cannot be told from Flower's own, which encodes at once: that is what each of these compares it with."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import flwr
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedsim.engines.flower import arrays
from fedsim.engines.flower.arrays import LazyArray, encoded_length, lazy_arrays
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.messages import content_bytes
from fedsim.engines.flower.process import task_identity

STOCK = {name: Array.__dict__[name] for name in ("__init__", "from_numpy_ndarray")}
STOCK_RECORD = ArrayRecord.__dict__["from_array_dict"]


@pytest.fixture
def lazy() -> Iterator[None]:
    with lazy_arrays() as done:
        assert done
        yield


dtypes = st.sampled_from(["f4", "f8", "f2", "i8", "u1", "?", "c8", ">f4", ">i2"]).map(np.dtype)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
views = st.sampled_from(["as it is", "transposed", "every other", "reversed"])


def seen_as(values: Any, view: str) -> Any:
    if values.ndim == 0:
        return values
    views = {"transposed": values.T, "every other": values[::2], "reversed": values[::-1]}
    return views.get(view, values)


@settings(deadline=None, max_examples=150)
@given(dtypes.flatmap(lambda d: shapes.flatmap(lambda s: hnp.arrays(d, s))), views)
def test_an_array_has_flowers_bytes_and_gives_flowers_numbers(values: Any, view: str) -> None:
    values = seen_as(values, view)
    stock = Array(values)
    with lazy_arrays():
        made = Array(values)
    assert type(made) is LazyArray
    assert encoded_length(made) == len(stock.data)
    got, expected = made.numpy(), stock.numpy()
    np.testing.assert_array_equal(got, expected)
    assert (got.dtype, got.flags.fnc, got.flags.forc) == (expected.dtype, expected.flags.fnc, expected.flags.forc)
    assert got.flags.writeable
    assert (made.dtype, made.shape, made.stype, made.data) == (stock.dtype, stock.shape, stock.stype, stock.data)
    assert made == stock
    assert stock == made
    assert repr(made) == repr(stock)
    assert made.object_id == stock.object_id


@pytest.mark.usefixtures("lazy")
@pytest.mark.parametrize(
    "make",
    [
        Array,
        lambda t: Array(torch_tensor=t),
        lambda t: Array(t.numpy()),
        lambda t: Array(ndarray=t.numpy()),
        Array.from_torch_tensor,
        lambda t: ArrayRecord([t.numpy()])["0"],
        lambda t: ArrayRecord({"w": t})["w"],
        lambda t: ArrayRecord({"w": Array(t)})["w"],
        lambda t: ArrayRecord(array_dict={"w": Array(t)}, keep_input=False)["w"],
        lambda t: copy.copy(Array(t)),
    ],
)
def test_every_way_of_making_one_keeps_a_copy(make: Any) -> None:
    tensor = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    made = make(tensor)
    assert type(made) is LazyArray
    assert "data" not in vars(made)
    tensor.zero_()
    first = made.numpy()
    first += 100
    torch.from_numpy(made.numpy()).add_(7)
    assert made.numpy().tolist() == [[1.0, -2.0], [0.5, 4.0]]
    assert encoded_length(made) == len(made.data)


@pytest.mark.usefixtures("lazy")
def test_a_record_made_of_arrays_has_arrays_of_its_own() -> None:
    made = Array(np.ones(2))
    record = ArrayRecord({"w": made})
    made.data = Array(np.zeros(3)).data
    assert record["w"].numpy().tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("lazy")
def test_setting_data_or_stype_does_what_it_does_to_flowers_own() -> None:
    made, other = Array(np.ones(2)), Array(np.zeros(3))
    before = made.object_id
    made.data = other.data
    assert made.numpy().tolist() == [0.0, 0.0, 0.0]
    assert made.object_id != before
    other.stype = "mine"
    with pytest.raises(TypeError, match="mine"):
        other.numpy()


@pytest.mark.usefixtures("lazy")
def test_what_numpy_cannot_hold_as_numbers_is_encoded_as_ever() -> None:
    text = np.array(["a", "bc"])
    assert type(Array(text)) is Array
    assert Array(text).numpy().tolist() == ["a", "bc"]
    with pytest.raises(ValueError, match="Object arrays"):
        Array(np.array([{}], dtype=object))
    with pytest.raises(TypeError, match="Invalid arguments"):
        Array("float32", [2], "numpy.ndarray", b"")  # type: ignore[call-overload]


class Own(Array):
    pass


@pytest.mark.usefixtures("lazy")
def test_somebodys_own_class_of_array_stays_what_it_is() -> None:
    assert type(Own(np.ones(2))) is Own
    assert Own(np.ones(2)).numpy().tolist() == [1.0, 1.0]


def test_arrays_outlive_the_context_and_another_process() -> None:
    with lazy_arrays():
        made = Array(np.array([1.0, -1.0]))
    assert made.numpy().tolist() == [1.0, -1.0]
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is Array
    assert again == made


def test_flowers_methods_are_put_back() -> None:
    with pytest.raises(KeyError), lazy_arrays(), lazy_arrays():
        assert Array.__init__ is not STOCK["__init__"]
        raise KeyError
    assert {name: Array.__dict__[name] for name in STOCK} == STOCK
    assert ArrayRecord.__dict__["from_array_dict"] is STOCK_RECORD
    assert type(Array(np.ones(1))) is Array


@pytest.mark.parametrize("broken", ["version", "result"])
def test_another_flower_is_left_alone_with_a_warning(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    if broken == "version":
        monkeypatch.setattr(flwr, "__version__", "1.42.0")
    else:
        monkeypatch.setattr(arrays, "_encoded", lambda values: b"something else")
    with pytest.warns(UserWarning, match="arrays are encoded as Flower"), lazy_arrays() as done:
        assert not done
        assert type(Array(np.ones(1))) is Array
    assert Array.__dict__["__init__"] is STOCK["__init__"]


@pytest.mark.usefixtures("lazy")
def test_bytes_of_a_content_are_counted_without_encoding_it() -> None:
    record = ArrayRecord({"w": torch.randn(300, 7), "empty": torch.zeros(0, 4), "scalar": torch.tensor(3)})
    counted = content_bytes(RecordDict({"arrays": record}))
    assert all("data" not in vars(array) for array in record.values())
    assert counted == recorddict_to_proto(RecordDict({"arrays": record})).ByteSize()


@pytest.mark.usefixtures("lazy")
def test_clients_that_write_into_what_they_get_do_not_meet() -> None:
    app, seen = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()  # type: ignore[union-attr]
        seen.append(state["w"].tolist())
        state["w"].mul_(context.node_id)
        content = RecordDict({"arrays": ArrayRecord(state)})
        state["w"].zero_()  # after it was put into the reply
        message.content["arrays"]["w"] = Array(np.full(2, 9.0))  # type: ignore[index, assignment]
        return Message(content, reply_to=message)

    content = RecordDict({"arrays": ArrayRecord({"w": torch.tensor([1.0, -3.0])})})
    with task_identity():
        replies = InProcessGrid(app, 2).send_and_receive([Message(content, node, "train") for node in (2, 3)])
    assert seen == [[1.0, -3.0]] * 2
    assert [r.content["arrays"]["w"].numpy().tolist() for r in replies] == [[2.0, -6.0], [3.0, -9.0]]
    assert content["arrays"]["w"].numpy().tolist() == [1.0, -3.0]
