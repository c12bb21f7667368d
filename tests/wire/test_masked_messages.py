"""Messages with masks: only what remains travels, masks once, lengths are known, and lies about them cost nothing."""

import json
import tracemalloc
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng, wire
from fedsim.records import Broadcast, ClientUpdate, Masks
from fedsim.wire import masked

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@st.composite
def pruned(draw):
    """Parameters and masks of some of them: of no entries, of few, of all."""
    params, kept = {}, {}
    for i in range(draw(st.integers(0, 3))):
        shape, key = draw(st.lists(st.integers(0, 5), min_size=2, max_size=4)), draw(st.integers(0, 99))
        name = draw(st.sampled_from(["w", "a/b", "ä"])) + str(i)
        params[name] = rng.normal(key, *shape, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()):
            kept[name] = rng.uniform(key + 1, *shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 2.0]))
    return p.masked({**params, "bias": torch.ones(2)}, kept), kept


def alike(a, b):
    return list(a) == list(b) and p.same_bits(a, b)


@given(pruned(), st.integers(1, 2**62), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_broadcast_survives_the_trip_with_its_masks_or_to_a_client_that_knows_them(made, version, told, probe):
    params, kept = made
    sent = Broadcast(params, {"n": torch.tensor(3)}, {"c": torch.ones(2)}, 9, Masks(kept, version), probe=probe)
    data, asked = wire.encode_broadcast(sent, with_masks=told), []

    def known(round):
        asked.append(round)
        return Masks(kept, version)

    back = wire.decode_broadcast(data, known)
    assert alike(back.params, params) and alike(back.masks.kept, kept) and back.masks.version == version
    assert (back.round, back.probe, back.unaware) == (9, probe, ())
    assert asked == ([] if told and kept else [9])
    assert wire.broadcast_bytes(sent, with_masks=told) == len(data)


@given(pruned(), st.integers(1, 2**62), st.booleans())
@settings(deadline=None, max_examples=60)
def test_an_update_survives_the_trip_with_the_servers_masks_and_with_the_clients_own(made, version, own):
    params, kept = made
    masks = Masks(kept, version)
    sent = ClientUpdate(4, params, {"n": torch.tensor(3)}, 5, {"a": 0.5}, {}, version, kept if own else {})
    if own:
        masks = Masks({name: torch.zeros_like(mask) for name, mask in kept.items()}, version) if kept else masks
    data = wire.encode_update(sent, masks)
    back = wire.decode_update(data, masks)
    assert alike(back.update, params) and alike(back.kept, sent.kept) and back.mask_version == version
    assert wire.update_bytes(sent.update, sent.buffers, ("a",), masks=masks, kept=sent.kept) == len(data)
    assert wire.sent_up(sent, Broadcast(params, {}, {}, 1, masks)) == len(data)


def test_the_answer_to_a_probe_is_dense_and_counted():
    sent = ClientUpdate(4, {"w": torch.ones(3, 4)}, {}, 5, {"a": 0.5}, {})
    probe = Broadcast({"w": torch.ones(3, 4)}, {}, {}, 1, probe=True)
    assert wire.sent_up(sent, probe) == len(wire.encode_update(sent))


W = {"w": torch.tensor([[0.0, -2.5, 0.0], [1.5, 0.0, 3.0]])}
KEPT = {"w": W["w"] != 0}
SENT = Broadcast(W, {}, {}, 2, Masks(KEPT, 7), unaware=(1, 4, 8))
GONE = ClientUpdate(1, W, {}, 5, {"a": 0.5}, {}, 7)


@pytest.mark.parametrize("clients", [[], [2], [1], [1, 2, 4], [1, 4, 8, 9, 10]])
def test_only_those_who_do_not_know_them_are_sent_masks(clients):
    lengths = [len(wire.encode_broadcast(SENT, with_masks=k in (1, 4, 8))) for k in clients]
    assert wire.sent_down(SENT, clients) == sum(lengths)
    assert len(wire.encode_broadcast(SENT)) > len(wire.encode_broadcast(SENT, with_masks=False))


def test_what_is_pruned_is_not_in_the_message():
    big = torch.zeros(100, 1000)
    big[::10, ::10] = 1.0
    sent = Broadcast({"w": big}, {}, {}, 1, Masks({"w": big != 0}, 1))
    assert 4 * 1000 < len(wire.encode_broadcast(sent, with_masks=False)) < 4 * 1000 + 600
    assert 4 * 1000 + 12_500 < len(wire.encode_broadcast(sent)) < 4 * 1000 + 12_500 + 700


@pytest.mark.parametrize(
    ("known", "has"), [(None, "none"), (Masks(KEPT, 6), "version 6"), (Masks(KEPT, 8), "version 8")]
)
def test_a_client_with_other_masks_refuses_the_message_and_names_both_versions(known, has):
    message = f"needs masks of version 7, this client has {has}"
    with pytest.raises(ValueError, match=message):
        wire.decode_broadcast(wire.encode_broadcast(SENT, with_masks=False), lambda round: known)


@pytest.mark.parametrize(("masks", "version"), [(None, 0), (Masks(KEPT, 6), 6), (Masks(KEPT, 8), 8)])
def test_an_update_of_another_version_is_refused_and_both_are_named(masks, version):
    message = f"trained with version 7 of the masks, the server's is {version}"
    with pytest.raises(ValueError, match=message):
        wire.decode_update(wire.encode_update(GONE, Masks(KEPT, 7)), masks)


# ---------------------------------------------------------------- strangers


def told(bits=None, shapes=None, values=None):
    """A broadcast with other bits, shapes or values than its masks'."""
    tensors = {
        "params/w": torch.tensor([-2.5, 1.5, 3.0]) if values is None else values,
        "masks/w": torch.tensor([0b01010100], dtype=torch.uint8) if bits is None else bits,
        "numbers/round": torch.tensor(2),
        "numbers/mask_version": torch.tensor(7),
    }
    more = {"order": json.dumps(list(tensors)), "metrics": "[]", "shapes": shapes or '{"w": [2, 3]}'}
    return safetensors.torch.save(tensors, metadata=more)


def answered(shapes, bits=0):
    tensors = {
        "update/w": torch.zeros(0),
        "kept/w": torch.zeros(bits, dtype=torch.uint8),
        "numbers/client": torch.tensor(2),
        "numbers/num_examples": torch.tensor(2),
        "numbers/metrics": torch.zeros(0, dtype=torch.float64),
    }
    more = {"order": json.dumps(list(tensors)), "metrics": "[]", "shapes": shapes}
    return safetensors.torch.save(tensors, metadata=more)


def test_what_is_refused_below_is_refused_for_its_own_fault():
    assert alike(wire.decode_broadcast(told()).params, W)
    assert wire.decode_update(answered('{"w": [2, 0]}')).update["w"].shape == (2, 0)


LIES = [
    *('{"w": [3, 3]}', '{"w": [-2, -3]}', '{"w": [-6, -1]}', '{"w": [2.0, 3]}', '{"w": [true, 6]}'),
    *('{"w": ["2", 3]}', '{"w": [[2], 3]}', '{"w": [null]}', '{"w": 6}', '{"w": "ab"}', "[]", "6", "null", "{", "nan"),
    *('{"v": [2, 3]}', '{"w": [2, 3], "v": [1]}', "[" * 100_000, '{"w": [1e3]}', '{"w": [Infinity]}'),
    *('{"w": [4611686018427387904, 4]}', '{"w": [0, 4611686018427387904, 8]}', f'{{"w": [{2**70}]}}'),
    *(f'{{"w": [0, {2**70}]}}', f'{{"w": [{10**400}]}}', f'{{"w": [0, {10**400}]}}', '{"w": [1' + "0" * 5000 + "]}"),
    *('{"w": [' + ", ".join(["2"] * 70) + "]}", '{"w": [0, ' + ", ".join([str(2**62)] * 200) + "]}"),
    '{"w": [2, 3' + ", 1" * 64 + "]}",  # a product of millions of sides would take hours
]


@pytest.mark.parametrize("shapes", LIES)
def test_shapes_that_lie_are_refused_and_nothing_large_is_made(shapes):
    tracemalloc.start()
    try:
        for decode, data in [
            *((wire.decode_broadcast, d) for d in (told(shapes=shapes), told(torch.zeros(0).byte(), shapes))),
            *((wire.decode_update, answered(shapes, bits)) for bits in (0, 1)),
        ]:
            with pytest.raises(ValueError, match="not a fedsim message"):
                decode(data)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


OTHERS = [('{"w": [8000000]}', 1_000_000), ('{"w": [3, 2]}', 1), ('{"v": [2, 3]}', 1), ('{"w": [6]}', 1)]


@pytest.mark.parametrize(("shapes", "bits"), [*OTHERS, ('{"w": [2, 0]}', 0), ('{"w": [0, 3]}', 0)])
def test_masks_of_shapes_that_nobody_was_sent_are_refused_before_their_bits_are_read(shapes, bits, monkeypatch):
    like, read, data = {"w": torch.zeros(2, 3)}, [], answered(shapes, bits)
    assert wire.decode_update(answered('{"w": [2, 3]}', 1), like=like).kept["w"].shape == (2, 3)
    monkeypatch.setattr(masked, "from_bits", lambda packed, found: read.append(found))
    with pytest.raises(ValueError, match=r"must have the shape (\[2, 3\]|None), got \["):
        wire.decode_update(data.replace(b"kept/w", b"kept/v") if '"v"' in shapes else data, like=like)
    assert not read


@pytest.mark.parametrize(
    "data",
    [
        told(torch.zeros(2, dtype=torch.uint8)),
        told(torch.zeros(0, dtype=torch.uint8)),
        told(torch.zeros(1, 1, dtype=torch.uint8)),
        told(torch.zeros(1, dtype=torch.int8)),
        told(torch.tensor([True])),
        told(values=torch.ones(2)),
        told(values=torch.ones(4)),
        told(values=torch.ones(3, 1)),
        told(values=torch.tensor(1.0)),
        told(torch.tensor([0b01010000], dtype=torch.uint8)),
    ],
)
def test_bits_and_values_that_do_not_fit_are_refused(data):
    with pytest.raises(ValueError, match="not a fedsim message"):
        wire.decode_broadcast(data)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_damaged_messages_are_refused_or_still_of_the_right_types(data):
    masks = Masks(KEPT, 7)
    whole, decode = data.draw(
        st.sampled_from(
            [
                (wire.encode_broadcast(SENT), wire.decode_broadcast),
                (wire.encode_broadcast(SENT, with_masks=False), lambda d: wire.decode_broadcast(d, lambda r: masks)),
                (wire.encode_update(GONE, masks), lambda d: wire.decode_update(d, masks)),
                (wire.encode_update(replace(GONE, kept=KEPT), masks), lambda d: wire.decode_update(d, masks)),
            ]
        )
    )
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = decode(bytes(damaged))
    except ValueError as error:
        assert "not a fedsim message" in str(error)
    else:
        kept = back.kept if isinstance(back, ClientUpdate) else back.masks.kept if back.masks else {}
        assert all(mask.dtype == torch.bool for mask in kept.values())
