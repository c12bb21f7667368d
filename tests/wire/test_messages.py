"""Messages survive the trip exactly, their length is known beforehand, and a stranger's bytes are refused cheaply."""

import json
import struct
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng, wire
from fedsim.records import Broadcast, ClientUpdate

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def tensors(draw):
    shape, dtype = draw(st.lists(st.integers(0, 3), max_size=3)), draw(st.sampled_from(DTYPES))
    return rng.normal(draw(st.integers(0, 9)), *shape, dtype=torch.float64).mul(100).to(dtype)


NAMES = st.text(min_size=1, max_size=6) | st.sampled_from(["a/b", "conv.0.weight", "/", "params", "ä ö", '"\\'])
DICTS = st.dictionaries(NAMES, tensors(), max_size=4)
METRICS = st.dictionaries(NAMES, st.floats(), max_size=5)
COUNTS = st.integers(0, 2**63 - 1)


def alike(a, b):
    return list(a) == list(b) and p.same_bits(a, b)


@given(DICTS, DICTS, DICTS, COUNTS)
@settings(deadline=None, max_examples=60)
def test_a_broadcast_survives_the_trip(params, buffers, extra, round):
    back = wire.decode_broadcast(wire.encode_broadcast(Broadcast(params, buffers, extra, round)))
    assert alike(back.params, params) and alike(back.buffers, buffers) and alike(back.extra, extra)
    assert back.round == round


@given(DICTS, DICTS, COUNTS, COUNTS, METRICS)
@settings(deadline=None, max_examples=60)
def test_an_update_survives_the_trip_without_the_clients_state(update, buffers, client, num_examples, metrics):
    sent = ClientUpdate(client, update, buffers, num_examples, metrics, {"secret": torch.ones(3)})
    back = wire.decode_update(wire.encode_update(sent))
    assert alike(back.update, update) and alike(back.buffers, buffers) and back.state == {}
    assert (back.client, back.num_examples) == (client, num_examples)
    assert repr(back.metrics) == repr(metrics)  # in order, exact, NaN included


def test_the_order_of_parameters_survives():
    names = ["z", "a", "m/x", "B"]
    sent = Broadcast({name: torch.ones(2) for name in names}, {}, {}, 1)
    assert list(wire.decode_broadcast(wire.encode_broadcast(sent)).params) == names


def test_tensors_that_share_memory_are_sent_as_if_they_did_not():
    base = torch.arange(6.0)
    sent = Broadcast({"w": base, "part": base[2:4]}, {"t": base.reshape(2, 3).T}, {"w": base}, 1)
    back = wire.decode_broadcast(wire.encode_broadcast(sent))
    assert torch.equal(back.extra["w"], base) and back.params["part"].tolist() == [2.0, 3.0]
    assert torch.equal(back.buffers["t"], base.reshape(2, 3).T)


def test_the_bytes_are_the_tensors_and_a_small_header():
    sent = Broadcast({"w": torch.zeros(1000, 100)}, {}, {}, 1)
    assert 400_000 < len(wire.encode_broadcast(sent)) < 400_000 + 500


# ---------------------------------------------------------------- lengths


@given(DICTS, DICTS, COUNTS, COUNTS, METRICS)
@settings(deadline=None, max_examples=100)
def test_the_length_of_an_update_is_known_without_encoding_it(update, buffers, client, num_examples, metrics):
    sent = ClientUpdate(client, update, buffers, num_examples, metrics, {"secret": torch.ones(3)})
    assert wire.update_bytes(update, buffers, tuple(metrics)) == len(wire.encode_update(sent))


@given(DICTS, DICTS, DICTS, COUNTS)
@settings(deadline=None, max_examples=100)
def test_the_length_of_a_broadcast_is_known_without_encoding_it(params, buffers, extra, round):
    sent = Broadcast(params, buffers, extra, round)
    assert wire.broadcast_bytes(sent) == len(wire.encode_broadcast(sent))


def test_all_updates_of_one_structure_have_one_length():
    """Whatever their numbers: ids, counts and metrics of one digit or of many, or no number at all."""

    def length(client, num_examples, loss, weight):
        metrics = {"train_loss": loss, "accuracy": -loss}
        return len(
            wire.encode_update(ClientUpdate(client, {"w": torch.full((3,), weight)}, {}, num_examples, metrics, {}))
        )

    numbers = [
        (0, 1, 0.0, 0.0),
        (2**62, 2**40, 1 / 3, -1e30),
        (7, 12, float("nan"), 1.0),
        (7, 12, 5e-324, float("inf")),
    ]
    lengths = {length(*some) for some in numbers}
    assert lengths == {wire.update_bytes({"w": torch.ones(3)}, {}, ["train_loss", "accuracy"])}


STRUCTURES = [
    (Broadcast({"w": torch.ones(2, 3)}, {}, {}, 1), Broadcast({"w": torch.ones(2, 3)}, {"w": torch.ones(2, 3)}, {}, 1)),
    (Broadcast({"w": torch.ones(40)}, {}, {}, 1), Broadcast({"w": torch.ones(40).double()}, {}, {}, 1)),
    (Broadcast({"w": torch.ones(40)}, {}, {}, 1), Broadcast({"w": torch.ones(41)}, {}, {}, 1)),
    (Broadcast({"w": torch.ones(40)}, {}, {}, 1), Broadcast({"a much longer name": torch.ones(40)}, {}, {}, 1)),
    (Broadcast({"w": torch.ones(40)}, {}, {}, 1), Broadcast({}, {"much longer than params": torch.ones(40)}, {}, 1)),
]


@pytest.mark.parametrize(("one", "other"), STRUCTURES)
def test_lengths_of_different_structures_are_told_apart(one, other):
    """Lengths are remembered by structure; asked again in another order they are the same."""
    expected = [len(wire.encode_broadcast(b)) for b in (one, other, one)]
    assert expected[0] != expected[1]
    assert [wire.broadcast_bytes(b) for b in (one, other, one)] == expected
    ups = [len(wire.encode_update(ClientUpdate(1, b.params, b.buffers, 1, {"loss": 2.0}, {}))) for b in (one, other)]
    assert [wire.update_bytes(b.params, b.buffers, ("loss",)) for b in (one, other)] == ups
    more = len(wire.encode_update(ClientUpdate(1, one.params, one.buffers, 1, {"loss": 2.0, "another": 3.0}, {})))
    assert wire.update_bytes(one.params, one.buffers, ("loss", "another")) == more > ups[0]


def test_a_length_needs_no_numbers_only_names_shapes_and_dtypes():
    """Views into stacks, transposed or expanded, count as what they would be sent as."""
    stack = torch.arange(24.0).reshape(4, 3, 2)
    expected = len(wire.encode_update(ClientUpdate(3, {"w": torch.zeros(3, 2)}, {"t": torch.ones(2, 3)}, 9, {}, {})))
    assert wire.update_bytes({"w": stack[1]}, {"t": stack[2].T}, ()) == expected
    assert wire.update_bytes({"w": torch.ones(1).expand(3, 2)}, {"t": torch.empty(2, 3, device="meta")}, []) == expected


# ---------------------------------------------------------------- strangers

GOOD = {
    wire.decode_broadcast: wire.encode_broadcast(Broadcast({"w": torch.ones(2, 3)}, {"n": torch.tensor(1)}, {}, 3)),
    wire.decode_update: wire.encode_update(ClientUpdate(1, {"w": torch.ones(2)}, {}, 5, {"train_loss": 0.5}, {})),
}
DECODERS = list(GOOD)
W = {"params/w": torch.ones(2)}


def blob(header, body=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def saved(tensors, order=None, metrics="[]"):
    """A message of these tensors, which are all listed unless ``order`` says otherwise."""
    return safetensors.torch.save(tensors, metadata={"order": order or json.dumps(list(tensors)), "metrics": metrics})


def refused(decode, data):
    with pytest.raises(ValueError, match="not a fedsim message"):
        decode(data)


@pytest.mark.parametrize("decode", DECODERS)
@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_random_bytes_are_refused(decode, data):
    refused(decode, data)


@pytest.mark.parametrize("decode", DECODERS)
def test_a_message_cut_off_anywhere_is_refused(decode):
    for end in range(len(GOOD[decode])):
        refused(decode, GOOD[decode][:end])


@pytest.mark.parametrize("decode", DECODERS)
@given(st.data())
@settings(deadline=None, max_examples=200)
def test_a_damaged_message_is_refused_or_still_of_the_right_types(decode, data):
    damaged = bytearray(GOOD[decode])
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decode(bytes(damaged))
    except ValueError as error:
        assert "not a fedsim message" in str(error)
    else:
        assert isinstance(back, Broadcast | ClientUpdate)
        assert all(isinstance(value, float) for value in getattr(back, "metrics", {}).values())


@pytest.mark.parametrize("decode", DECODERS)
def test_a_message_of_the_other_kind_is_refused(decode):
    refused(decode, next(message for other, message in GOOD.items() if other is not decode))


ROUND = {"numbers/round": torch.tensor(1)}
GIVEN = '["params/w", "numbers/round"]'


def test_what_is_refused_below_is_refused_for_its_own_fault():
    assert wire.decode_broadcast(saved({**W, **ROUND}, GIVEN)).round == 1
    assert wire.decode_update(update_of()).metrics == {"a": 0.5, "b": -2.0}


@pytest.mark.parametrize(
    "data",
    [
        saved(W),
        saved({**W, "numbers/client": torch.tensor(1)}),
        saved({**W, "round": torch.tensor(1)}),
        saved({**W, "numbers/round": torch.tensor(1.0)}),
        saved({**W, "numbers/round": torch.tensor(1, dtype=torch.int32)}),
        saved({**W, "numbers/round": torch.tensor(True)}),
        saved({**W, "numbers/round": torch.tensor([1])}),
        saved({**W, "numbers/round": torch.zeros(0, dtype=torch.int64)}),
        saved({**W, **ROUND}, "5"),
        saved({**W, **ROUND}, "[[]]"),
        saved({**W, **ROUND}, "[]"),
        saved({**W, **ROUND}, "null"),
        saved({**W, **ROUND}, '["params/w"]'),
        saved({**W, **ROUND}, '["numbers/round"]'),
        saved({**W, **ROUND}, '["params/w", "numbers/round", "params/w"]'),
        saved({**W, **ROUND}, '["params/w", "numbers/round", "params/v"]'),
        saved({**W, **ROUND, "other/w": torch.ones(1)}),
        saved({**W, **ROUND, "update/w": torch.ones(1)}),
        saved({**W, **ROUND}, "[" * 100_000),
        saved({**W, **ROUND}, '["params/w"'),
        saved({**W, **ROUND}, GIVEN, "["),
        saved({**W, **ROUND}, GIVEN, "5"),
        safetensors.torch.save({**W, **ROUND}),
        safetensors.torch.save({**W, **ROUND}, metadata={"order": GIVEN}),
        safetensors.torch.save({**W, **ROUND}, metadata={"metrics": "[]"}),
        blob({}),
        blob({"__metadata__": {"order": "[]"}}),
        blob({"params/w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        blob({"params/w": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}),
        blob({"params/w": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_a_well_formed_file_that_is_no_broadcast_is_refused(data):
    refused(wire.decode_broadcast, data)


VALUES = torch.tensor([0.5, -2.0], dtype=torch.float64)


def update_of(names='["a", "b"]', **numbers):
    """A message with other numbers, or without those that are None."""
    numbers = {"client": torch.tensor(1), "num_examples": torch.tensor(2), "metrics": VALUES, **numbers}
    own = {f"numbers/{name}": value for name, value in numbers.items() if value is not None}
    return saved({"update/w": torch.ones(1), **own}, metrics=names)


@pytest.mark.parametrize("missing", ["client", "num_examples", "metrics"])
def test_an_update_without_one_of_its_numbers_is_refused(missing):
    refused(wire.decode_update, update_of(**{missing: None}))


@pytest.mark.parametrize("name", ["client", "num_examples"])
@pytest.mark.parametrize(
    "number",
    [torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor([1]), torch.tensor([]), torch.tensor(False)],
)
def test_a_client_or_a_count_that_is_not_one_whole_number_is_refused(name, number):
    refused(wire.decode_update, update_of(**{name: number}))


@pytest.mark.parametrize(
    "metrics",
    [VALUES.float(), VALUES.long(), VALUES[:1], VALUES[:0], VALUES.repeat(2), VALUES[None], VALUES[:, None], VALUES[0]],
)
def test_metrics_that_are_not_one_float64_for_each_name_are_refused(metrics):
    refused(wire.decode_update, update_of(metrics=metrics))


@pytest.mark.parametrize(
    "names",
    [
        *('["a"]', '["a", "b", "c"]', "[]", '["a", "a"]', '["a", 1]', "[null, null]", '[["a"], ["b"]]', "[{}, {}]"),
        *('"ab"', '{"a": 1, "b": 2}', "2", "null", "true", "", '["a", "b"', "[" * 100_000),
    ],
)
def test_names_of_metrics_that_are_not_as_many_different_texts_are_refused(names):
    refused(wire.decode_update, update_of(names))


@pytest.mark.parametrize(
    "data",
    [
        blob({"params/w": {"dtype": "F32", "shape": [2**33], "data_offsets": [0, 2**35]}}),
        blob({"params/w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 4]}}, b"1234"),
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2**62) + b"{}",
    ],
)
def test_a_small_message_that_declares_much_does_not_allocate_it(data):
    tracemalloc.start()
    try:
        refused(wire.decode_broadcast, data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
