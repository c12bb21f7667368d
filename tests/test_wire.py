"""Messages survive the trip exactly, and bytes from a stranger are refused in one way and cheaply."""

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


def alike(a, b):
    return list(a) == list(b) and p.same_bits(a, b)


@given(DICTS, DICTS, DICTS, st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_a_broadcast_survives_the_trip(params, buffers, extra, round):
    back = wire.decode_broadcast(wire.encode_broadcast(Broadcast(params, buffers, extra, round)))
    assert alike(back.params, params) and alike(back.buffers, buffers) and alike(back.extra, extra)
    assert back.round == round


@given(DICTS, DICTS, st.integers(0, 2**40), st.integers(1, 2**40), st.dictionaries(NAMES, st.floats()))
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


def saved(facts, order, tensors=W):
    return safetensors.torch.save(tensors, metadata={"facts": facts, "order": order})


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


@pytest.mark.parametrize("decode", DECODERS)
def test_a_message_of_the_other_kind_is_refused(decode):
    refused(decode, next(message for other, message in GOOD.items() if other is not decode))


ORDER = '["params/w"]'


@pytest.mark.parametrize(
    "data",
    [
        saved("[]", ORDER),
        saved("{}", ORDER),
        saved('{"round": null}', ORDER),
        saved('{"round": 1e999}', ORDER),
        saved('{"round": "x"}', ORDER),
        saved('{"round": ' + "9" * 5000 + "}", ORDER),
        saved('{"round": 1}', "5"),
        saved('{"round": 1}', "[[]]"),
        saved('{"round": 1}', "[]"),
        saved('{"round": 1}', '["params/w", "params/w"]'),
        saved('{"round": 1}', '["params/w", "params/v"]'),
        saved('{"round": 1}', '["other/w"]', {"other/w": torch.ones(1)}),
        saved("[" * 100_000, ORDER),
        saved('{"round": 1', ORDER),
        blob({}),
        blob({"__metadata__": {"facts": "{}"}}),
        blob({"params/w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}),
        blob({"params/w": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}),
        blob({"params/w": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_a_well_formed_file_that_is_no_broadcast_is_refused(data):
    refused(wire.decode_broadcast, data)


@pytest.mark.parametrize(
    "facts",
    [
        '{"client": 1, "num_examples": 2, "metrics": []}',
        '{"client": 1, "num_examples": 2, "metrics": {"a": null}}',
        '{"client": 1, "num_examples": 2, "metrics": {"a": "x"}}',
        '{"client": 1, "metrics": {}}',
        '{"client": [], "num_examples": 2, "metrics": {}}',
    ],
)
def test_an_update_with_wrong_facts_is_refused(facts):
    refused(wire.decode_update, saved(facts, '["update/w"]', {"update/w": torch.ones(1)}))


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
