"""Sparse messages against a slow writer of the format; nothing is lost, and strangers' bytes are refused."""

import hashlib
import struct
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.wire import bits, sparse
from fedsim.wire.quantised import CODINGS
from fedsim.wire.support import FORMS

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHERS = [torch.int64, torch.uint8, torch.bool, torch.int32]
LOSSY = [name for name in CODINGS if name != "exact"]


@st.composite
def tensors(draw, dtypes=tuple(FLOATS + OTHERS)):
    """Any shape with any share of zeros, negative zeros among the others."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=3) | st.sampled_from([[33, 7], [1], [600]]))
    x = rng.normal(draw(st.integers(0, 99)), *shape, dtype=torch.float64)
    x[rng.bernoulli(draw(st.integers(0, 99)), 0.1, *shape)] = -0.0
    x[rng.bernoulli(draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0])), *shape)] = 0.0
    return (x * 10).to(dtype)


NAMES = st.text(max_size=4) | st.sampled_from(["conv.0.weight", "a/b"])
DICTS = st.dictionaries(NAMES, tensors(), max_size=4)
SOME_FORMS = st.lists(st.sampled_from(FORMS), min_size=1, max_size=4, unique=True)
EXAMPLE = {
    "w": torch.tensor([[0.0, 1.5, 0.0, 0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0]]),
    "b": torch.tensor([1.0, -2.0]),
    "n": torch.tensor(7),
}


def alike(a, b):
    return list(a) == list(b) and p.same_bits(a, b)


def non_zero(tensor):
    """Of each entry, whether it has a bit that is not zero."""
    return torch.tensor([v != 0 or np.signbit(v) for v in tensor.reshape(-1).tolist()], dtype=torch.bool).reshape(
        tensor.shape
    )


# ---------------------------------------------------------------- there and back


@given(DICTS, SOME_FORMS)
@settings(deadline=None, max_examples=300)
def test_tensors_survive_the_trip_and_the_length_is_known(sent, forms):
    data = sparse.encode(sent, forms=forms)
    assert alike(sparse.decode(data, p.zeros_like(sent)), sent)
    assert len(data) == sparse.length(sent, forms=forms)


@given(DICTS, st.data())
@settings(deadline=None, max_examples=200)
def test_with_known_masks_only_what_is_in_them_travels(sent, data):
    own = {name: data.draw(st.booleans()) for name in sent}
    known = {
        n: non_zero(t) | rng.bernoulli(data.draw(st.integers(0, 9)), 0.3, *t.shape) for n, t in sent.items() if own[n]
    }
    coded = sparse.encode(sent, known=known)
    assert alike(sparse.decode(coded, sent, known=known), sent)
    assert len(coded) == sparse.length(sent, known=known) <= sparse.length(sent)
    only = sparse.encode(sent, known=known, forms=("dense",))
    counts = {name: int(known[name].sum()) if name in known else t.numel() for name, t in sent.items()}
    assert len(only) == 8 + sum(1 + counts[name] * t.dtype.itemsize for name, t in sent.items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_bit_survives_in_every_form(form, dtype):
    """NaNs with what they carry, negative zeros, infinities and subnormals."""
    patterns = rng.bits(1, 1000)
    extreme = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4], dtype=dtype)
    sent = {"w": torch.cat([patterns.view(dtype), extreme, torch.zeros(400, dtype=dtype)])}
    assert bool(sent["w"].isnan().any())
    assert alike(sparse.decode(sparse.encode(sent, forms=[form]), sent), sent)


def test_a_negative_zero_is_a_value():
    sent = {"w": torch.tensor([0.0] * 99 + [-0.0])}
    assert sparse.sizes(sent["w"])["coo"] == 1 + 4 + 4
    assert alike(sparse.decode(sparse.encode(sent, forms=["coo"]), sent), sent)


def test_views_and_tensors_that_want_gradients_are_sent_as_what_they_show():
    base = torch.arange(24.0).reshape(4, 6).requires_grad_()
    sent = {"t": base.T, "e": torch.ones(1).expand(5), "s": base[1:3, ::2]}
    back = sparse.decode(sparse.encode(sent), sent)
    assert all(torch.equal(back[name], sent[name]) and back[name].is_contiguous() for name in sent)
    assert not any(tensor.requires_grad for tensor in back.values())


# ---------------------------------------------------------------- the format


def as_bits(flags):
    return sum(flag << i for i, flag in enumerate(flags)).to_bytes(-(-len(flags) // 8), "little")


def slow_rice(positions):
    """Of the smallest width that takes fewest bits."""
    gaps = [at - before - 1 for before, at in pairwise([-1, *positions])]
    width = min(range(7), key=lambda width: sum((gap >> width) + 1 + width for gap in gaps))
    low = [(gap >> bit) & 1 for gap in gaps for bit in range(width)]
    total = bits.count(sum(gap >> width for gap in gaps))
    return bytes([width]) + total + as_bits([b for gap in gaps for b in [0] * (gap >> width) + [1]]) + as_bits(low)


def slow_body(values, form):
    """One float32 vector, as the docstring of ``support`` tells."""
    n, at = len(values), [i for i, v in enumerate(values) if struct.pack("<f", v) != bytes(4)]
    kept = b"".join(struct.pack("<f", values[i]) for i in at)
    if form == "dense":
        return struct.pack(f"<{n}f", *values)
    if form == "bitmask":
        return as_bits([i in at for i in range(n)]) + kept
    if form == "coo":
        return bits.count(len(at)) + struct.pack(f"<{len(at)}I", *at) + kept
    coded = at if 2 * len(at) <= n else [i for i in range(n) if i not in at]
    return bits.count(len(at)) + slow_rice(coded) + kept


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.5, -2.0, -0.0]), max_size=40))
@settings(deadline=None, max_examples=80)
def test_a_vector_is_written_as_the_format_says(form, values):
    sent = {"w": torch.tensor(values)}
    body = slow_body(values, form)
    assert sparse.sizes(sent["w"])[form] == len(body)
    data = sparse.encode(sent, forms=[form])
    assert data[8] == FORMS.index(form) and data[9:] == body
    assert alike(sparse.decode(data, sent), sent)


def test_a_message_is_a_fingerprint_and_the_shortest_of_each_tensor():
    structure = [("w", (1, 10), "torch.float32"), ("b", (2,), "torch.float32"), ("n", (), "torch.int64")]
    expected = hashlib.blake2b(repr((structure, [], "exact")).encode(), digest_size=8).digest()
    expected += bytes([1, 0b100010, 0]) + struct.pack("<2f", 1.5, -0.0)  # bitmask, of two
    expected += bytes([0]) + struct.pack("<2f", 1, -2) + bytes([0]) + struct.pack("<q", 7)
    assert sparse.encode(EXAMPLE) == expected


@given(tensors(dtypes=tuple(FLOATS)), SOME_FORMS)
@settings(deadline=None, max_examples=200)
def test_the_shortest_form_is_taken_and_sizes_are_those_of_each(tensor, forms):
    sizes = sparse.sizes(tensor)
    assert list(sizes) == list(FORMS)
    assert all(sparse.length({"w": tensor}, forms=[form]) == 9 + size for form, size in sizes.items())
    assert len(sparse.encode({"w": tensor}, forms=forms)) == 9 + min(sizes[form] for form in forms)


@pytest.mark.parametrize(
    ("density", "form"), [(1.0, "dense"), (0.99, "gaps"), (0.6, "bitmask"), (0.1, "gaps"), (0.001, "gaps")]
)
def test_which_form_is_shortest_at_which_density(density, form):
    x = torch.where(rng.bernoulli(1, density, 20_000), rng.normal(2, 20_000), 0.0)
    sizes = sparse.sizes(x)
    assert min(sizes, key=sizes.get) == form


def test_integers_are_dense_and_exact_whatever_is_asked_for():
    sent = {"n": torch.tensor([0, 0, 0, -5, 2**60]), "f": torch.tensor([False, True])}
    data = sparse.encode(sent, forms=["coo"], coding=CODINGS["sign"])
    assert len(data) == 8 + 1 + 40 + 1 + 2
    assert alike(sparse.decode(data, sent, coding=CODINGS["sign"]), sent)
    assert sparse.sizes(sent["n"]) == {"dense": 40}


# ---------------------------------------------------------------- with value codings


@pytest.mark.parametrize("name", LOSSY)
@given(DICTS, SOME_FORMS, st.booleans(), st.integers(0, 2**62))
@settings(deadline=None, max_examples=40)
def test_any_support_goes_with_any_coding(name, sent, forms, masked, key):
    coding = CODINGS[name]
    known = {n: non_zero(t) for n, t in sent.items()} if masked else {}
    data = sparse.encode(sent, known=known, forms=forms, coding=coding, key=key)
    assert len(data) == sparse.length(sent, known=known, forms=forms, coding=coding)
    back = sparse.decode(data, sent, known=known, coding=coding)
    p.check_alike(back, sent)
    for tensor_name, tensor in sent.items():
        if not tensor.is_floating_point():
            assert alike({"": back[tensor_name]}, {"": tensor})
        elif len(forms) > 1 or coding.keeps_zero or masked:
            assert bool((back[tensor_name][~non_zero(tensor)] == 0).all())  # what is zero stays zero


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["uniform8", "uniform4", "fp16", "bf16"])
def test_what_is_decoded_does_not_depend_on_the_form_but_for_chance(name, form):
    x = torch.where(rng.bernoulli(1, 0.3, 50, 7), rng.normal(2, 50, 7), 0.0)
    values = x[x != 0]
    coding = CODINGS[name]
    expected = torch.zeros_like(x)
    expected[x != 0] = coding.decode(memoryview(coding.encode(values, None)), len(values), x.dtype)
    back = sparse.decode(sparse.encode({"w": x}, forms=[form], coding=coding), {"w": x}, coding=coding)
    assert torch.equal(back["w"], expected)


def test_sign_loses_zeros_only_where_no_other_form_is_allowed():
    coding, x = CODINGS["sign"], torch.tensor([0.0] + [2.0, -4.0] * 50)

    def sent(forms):
        return sparse.decode(sparse.encode({"w": x}, forms=forms, coding=coding), {"w": x}, coding=coding)["w"]

    assert sent(FORMS).tolist() == [0.0] + [3.0, -3.0] * 50
    assert sent(["dense"])[0] == pytest.approx(300 / 101)
    assert sparse.length({"w": x[1:]}, coding=coding) == 8 + 1 + 4 + 13  # no zeros: dense


def test_each_tensor_has_its_own_draws_and_a_stochastic_coding_needs_a_key():
    x = rng.normal(1, 300)
    sent, coding = {"a": x, "b": x}, CODINGS["qsgd4"]
    back = sparse.decode(sparse.encode(sent, coding=coding, key=5), sent, coding=coding)
    assert not torch.equal(back["a"], back["b"])
    values = coding.decode(memoryview(coding.encode(x, rng.fold(5, "b"))), 300, x.dtype)
    assert torch.equal(back["b"], values)
    with pytest.raises(ValueError, match="qsgd4 is stochastic and needs a key"):
        sparse.encode(sent, coding=coding)


# ---------------------------------------------------------------- wrong arguments


def test_wrong_arguments_are_named():
    known = torch.ones(1, 10, dtype=torch.bool)
    for wrong, why in [
        ({"v": known}, "known mask of v, which is no tensor"),
        ({"w": known[0]}, r"w: a known mask must be bool of shape \(1, 10\), got torch.bool of shape \(10,\)"),
        ({"w": known.float()}, "w: a known mask must be bool .* got torch.float32"),
        ({"w": ~known}, "w: 2 entries outside the known mask are not zero"),
    ]:
        with pytest.raises(ValueError, match=why):
            sparse.encode(EXAMPLE, known=wrong)
        with pytest.raises(ValueError, match=why):
            sparse.length(EXAMPLE, known=wrong)
    for forms in ([], ["dense", "zip"]):
        with pytest.raises(ValueError, match="forms must be some of dense, bitmask, gaps, coo"):
            sparse.encode(EXAMPLE, forms=forms)
    with pytest.raises(ValueError, match=r"torch\.complex128 cannot be sent"):
        sparse.encode({"z": torch.zeros(2, dtype=torch.complex128)}, known={"z": torch.zeros(2, dtype=torch.bool)})


# ---------------------------------------------------------------- strangers


def refused(data, like, why, **known):
    with pytest.raises(ValueError, match=f"not a fedsim message .*{why}"):
        sparse.decode(data, like, **known)


LIKE = {"w": torch.zeros(10)}
START = sparse.encode(LIKE)[:8]


def test_other_names_orders_shapes_dtypes_masks_and_codings_are_refused():
    data, masks = sparse.encode(EXAMPLE), {"w": non_zero(EXAMPLE["w"])}
    w, b, n = EXAMPLE.values()
    for like in [
        {"w": w, "b": b},
        {"w": w, "b": b, "m": n},
        {"b": b, "w": w, "n": n},
        {"w": w[0], "b": b, "n": n},
        {"w": w, "b": b.view(torch.int32), "n": n},
    ]:
        refused(data, like, "written for other names")
    refused(data, EXAMPLE, "written for other", known=masks)
    refused(data, EXAMPLE, "written for other", coding=CODINGS["fp16"])
    refused(sparse.encode(EXAMPLE, known=masks), EXAMPLE, "written for other")
    other = {"w": masks["w"].flip(1)}
    refused(sparse.encode(EXAMPLE, known=masks), EXAMPLE, "written for other", known=other)


@pytest.mark.parametrize("form", FORMS)
def test_a_message_cut_off_anywhere_or_with_more_is_refused(form):
    data = sparse.encode(EXAMPLE, forms=[form])
    assert alike(sparse.decode(data, EXAMPLE), EXAMPLE)
    for end in range(len(data)):
        refused(data[:end], EXAMPLE, "ends too early")
    refused(data + b"\0", EXAMPLE, "end.: 1 bytes too many")


VALUE = struct.pack("<f", 3.0)
HUGE = bits.count(2**62)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (bytes([4]), "no form has the number 4"),
        (bytes([255]) + VALUE * 10, "no form has the number 255"),
        (bytes([1, 0, 0b10]), "ends too early: 4 bytes wanted, 0 left"),
        (bytes([1, 0, 0b10]) + VALUE[:3], "ends too early"),
        (bytes([1, 0, 0b100]) + VALUE, "10 bits expected, got one beyond"),
        (bytes([1, 3, 0]) + VALUE, "ends too early: 8 bytes wanted, 4 left"),
        (bytes([2, 1, 2]) + bytes([0, 0b1, 0]), "ends too early"),
        (bytes([2]) + HUGE, "a count must be at most 10, got 4611686018427387904"),
        (bytes([2, 11]), "a count must be at most 10, got 11"),
        (bytes([2, 1, 0]) + HUGE, "a count must be at most 10, got"),
        (bytes([2, 1, 4, 0, 1, 0]) + VALUE, "gaps among 10 entries have no 4 low bits"),
        (bytes([2, 1, 0, 10, 0, 0b100]) + VALUE, "a position must be below 10, got 10"),
        (bytes([2, 1, 0, 9, 0b1, 0b10]) + VALUE, "1 gaps in 10 bits of quotients expected, got 2"),
        (bytes([3]) + HUGE, "a count must be at most 10"),
        (bytes([3, 11]) + bytes(44) + VALUE * 11, "a count must be at most 10"),
        (bytes([3, 10]) + bytes(39), "ends too early"),
        (bytes([3, 1]) + struct.pack("<I", 10) + VALUE, "positions must ascend and be below 10"),
        (bytes([3, 1]) + struct.pack("<i", -1) + VALUE, "positions must ascend and be below 10"),
        (bytes([3, 2]) + struct.pack("<II", 4, 4) + VALUE * 2, "positions must ascend"),
        (bytes([3, 2]) + struct.pack("<II", 5, 4) + VALUE * 2, "positions must ascend"),
        (bytes([3, 3]) + struct.pack("<III", 4, 99, 5) + VALUE * 3, "positions must ascend"),
        (bytes([3]) + b"\x80" * 20, "a count has no end"),
    ],
)
def test_a_body_that_is_none_is_refused_and_its_tensor_named(body, why):
    refused(START + body, LIKE, f"w.: {why}")


def test_a_bool_is_0_or_1_and_integers_have_one_form():
    like = {"f": torch.tensor([False, True])}
    data = bytearray(sparse.encode(like))
    data[-1] = 2
    refused(bytes(data), like, "a bool must be 0 or 1")
    data[-1], data[8] = 1, 1
    refused(bytes(data), like, "no form has the number 1")


FUZZED = {"w": torch.zeros(40, 3), "h": torch.zeros(9, dtype=torch.bfloat16), "n": torch.zeros(3, dtype=torch.int64)}
FUZZED |= {"f": torch.zeros(5, dtype=torch.bool), "s": torch.zeros(()), "e": torch.zeros(0, 2)}
FUZZ_KNOWN = {"w": rng.bernoulli(1, 0.7, 40, 3)}


def full(known):
    sent = {n: rng.normal(i, *t.shape).mul(5).to(t.dtype) for i, (n, t) in enumerate(FUZZED.items())}
    sent["w"] = torch.where(FUZZ_KNOWN["w"] & rng.bernoulli(2, 0.2, 40, 3), sent["w"], 0.0)
    return sent, (FUZZ_KNOWN if known else {})


def refused_or_alike(data, known, coding):
    try:
        back = sparse.decode(data, FUZZED, known=known, coding=coding)
    except ValueError as error:
        assert str(error).startswith("not a fedsim message (sparse, ")
    else:
        p.check_alike(back, FUZZED)
        assert list(back) == list(FUZZED) and int(back["f"].view(torch.uint8).max()) <= 1
        assert not known or bool((back["w"][~known["w"]] == 0).all())


@pytest.mark.parametrize("name", CODINGS)
@given(st.binary(max_size=400), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_random_bytes_are_refused_or_read_as_such_tensors(name, data, known, begun):
    sent, masks = full(known)
    start = sparse.encode(sent, known=masks, coding=CODINGS[name], key=1)[:8] if begun else b""
    refused_or_alike(start + data, masks, CODINGS[name])


@pytest.mark.parametrize("name", CODINGS)
@given(st.data(), SOME_FORMS, st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_damaged_message_is_refused_or_read_as_such_tensors(name, data, forms, known):
    sent, masks = full(known)
    damaged = bytearray(sparse.encode(sent, known=masks, forms=forms, coding=CODINGS[name], key=1))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
        damaged += b"\0" * (9 - len(damaged))
    refused_or_alike(bytes(damaged), masks, CODINGS[name])


@pytest.mark.parametrize(("count", "most"), [(2**62, 0.1), (1_000_001, 0.1), (1_000_000, 24), (500_000, 24)])
@pytest.mark.parametrize("form", range(4))
def test_a_small_message_that_declares_much_allocates_no_more_than_the_tensors_take(form, count, most):
    """A million entries: nothing for a count beyond them, and else at most 24 bytes for each."""
    like = {"w": torch.zeros(1_000_000)}
    start = sparse.encode(like)[:8]
    tracemalloc.start()
    try:
        refused(start + bytes([form]) + bits.count(count) + bytes(3), like, "")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000 * most
    finally:
        tracemalloc.stop()


def test_a_bitmask_of_more_than_its_values_is_refused_before_they_are_read():
    like = {"w": torch.zeros(1_000_000)}
    refused(sparse.encode(like)[:8] + bytes([1]) + b"\xff" * 125_000, like, "4000000 bytes wanted, 0 left")
