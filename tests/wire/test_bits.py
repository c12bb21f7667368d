"""Codes, counts and gaps against writers that set one bit after the other."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import rng
from fedsim.wire import bits


def as_bytes(zeros_and_ones):
    """The first bit is the lowest of the first byte."""
    size = -(-len(zeros_and_ones) // 8)
    return sum(bit << i for i, bit in enumerate(zeros_and_ones)).to_bytes(size, "little")


def slow_pack(codes, width):
    whole, rest = divmod(width, 8)
    planes = bytes((code >> 8 * plane) & 255 for plane in range(whole) for code in codes)
    return planes + as_bytes([(code >> 8 * whole + bit) & 1 for code in codes for bit in range(rest)])


@st.composite
def codes_and_widths(draw):
    width = draw(st.integers(0, 63))
    return draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), width


@given(codes_and_widths())
@settings(deadline=None, max_examples=300)
def test_codes_are_packed_without_gaps_and_read_again(drawn):
    codes, width = drawn
    packed = bits.pack(np.array(codes, np.uint64), width)
    assert packed == slow_pack(codes, width)
    assert len(packed) == bits.packed_size(len(codes), width) == math.ceil(len(codes) * width / 8)
    assert bits.unpack(memoryview(packed), len(codes), width).tolist() == codes


@pytest.mark.parametrize("width", range(1, 9))
def test_codes_of_a_byte_are_packed_as_wide_ones_are(width):
    codes = (rng.bits(1, 1003).numpy() & (2**width - 1)).astype(np.uint8)
    assert bits.pack(codes, width) == bits.pack(codes.astype(np.uint64), width)
    assert bits.unpack(memoryview(bits.pack(codes, width)), 1003, width).tolist() == codes.tolist()


@given(st.integers(0, 2**62))
def test_a_count_is_read_again_and_a_larger_one_than_allowed_is_not(number):
    reader = bits.Reader(bits.count(number))
    assert reader.count(number) == number
    reader.end()
    if number:
        with pytest.raises(ValueError, match=f"at most {number - 1}, got {number}"):
            bits.Reader(bits.count(number)).count(number - 1)


def test_counts_are_those_of_the_format():
    """The DWARF standard's examples of unsigned LEB128."""
    examples = {2: "02", 127: "7f", 128: "8001", 129: "8101", 130: "8201", 12857: "b964"}
    assert {number: bits.count(number).hex() for number in examples} == examples


def test_a_reader_goes_to_the_end_and_no_further():
    reader = bits.Reader(b"abc")
    assert bytes(reader.take(2)) == b"ab"
    with pytest.raises(ValueError, match="1 bytes too many"):
        reader.end()
    with pytest.raises(ValueError, match="ends too early: 2 bytes wanted, 1 left"):
        reader.take(2)
    assert bytes(reader.take(1)) == b"c"
    reader.end()
    with pytest.raises(ValueError, match="ends too early"):
        reader.count(5)
    assert bits.Reader(b"\x05").bits(3).tolist() == [1, 0, 1] and bits.Reader(b"").bits(0).tolist() == []
    with pytest.raises(ValueError, match="2 bits expected, got one beyond them"):
        bits.Reader(b"\x05").bits(2)
    for endless in (b"\xff" * 10, b"\x80" * 100):
        with pytest.raises(ValueError, match="no end"):
            bits.Reader(endless).count(2**80)


# ---------------------------------------------------------------- gaps


def slow_gaps(positions, width):
    """The code in the order of its definition, one position after the other."""
    gaps = [at - before - 1 for before, at in pairwise([-1, *positions])]
    unary = [bit for gap in gaps for bit in [0] * (gap >> width) + [1]]
    low = [gap & ((1 << width) - 1) for gap in gaps]
    quotients = sum(gap >> width for gap in gaps)
    return bytes([width]) + bits.count(quotients) + as_bytes(unary) + slow_pack(low, width)


@st.composite
def some_positions(draw):
    n = draw(st.integers(1, 400) | st.integers(1, 2**40))
    return sorted(draw(st.sets(st.integers(0, n - 1), max_size=30))), n


@given(some_positions())
@settings(deadline=None, max_examples=300)
def test_gaps_are_the_shortest_rice_code_and_are_read_again(drawn):
    positions, n = drawn
    gaps = bits.gaps_of(np.array(positions, np.int64))
    written = gaps.encode()
    assert written == slow_gaps(positions, gaps.width) and gaps.size == len(written)
    # a bit less or more of a code is no longer seen where bytes are rounded up: compare the bits
    lengths = [sum((gap >> width) + 1 + width for gap in gaps.gaps.tolist()) for width in range(48)]
    assert lengths[gaps.width] == min(lengths)
    reader = bits.Reader(written)
    assert bits.read_gaps(reader, len(positions), n).tolist() == positions
    reader.end()


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.02, 0.002])
def test_random_positions_cost_little_more_than_their_entropy(density):
    n = 400_000
    at = np.flatnonzero(rng.bernoulli(3, density, n).numpy())
    entropy = -n * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
    assert bits.gaps_of(at).size < 1.05 * entropy


def refused(data, m, n, why):
    with pytest.raises(ValueError, match=why):
        bits.read_gaps(bits.Reader(data), m, n)


def test_gaps_that_are_none_are_refused():
    assert bits.read_gaps(bits.Reader(slow_gaps([1, 5, 9], 2)), 3, 10).tolist() == [1, 5, 9]
    refused(slow_gaps([1, 5, 9], 2), 3, 9, "a position must be below 9, got 9")
    refused(slow_gaps([1, 5, 9], 2), 2, 10, "2 bits expected, got one beyond them")
    refused(slow_gaps([1, 5, 9], 0), 2, 10, "9 bits expected, got one beyond them")
    refused(slow_gaps([1, 5, 9], 0)[:-1], 3, 10, "ends too early")
    refused(slow_gaps([1, 5, 9], 2)[:-1], 3, 10, "ends too early")
    refused(bytes([4]) + slow_gaps([1, 5, 9], 2)[1:], 3, 10, "gaps among 10 entries have no 4 low bits")
    refused(bytes([0]) + bits.count(2**40), 3, 10, "at most 10, got 1099511627776")
    refused(bytes([0]) + bits.count(3) + as_bytes([1, 1, 1, 0, 0, 0]), 3, 10, "3 gaps in 6 bits")
    refused(bytes([0]) + bits.count(3) + as_bytes([1, 0, 0, 0, 0, 1]), 3, 10, "3 gaps in 6 bits of quotients expected")
    refused(bytes([0]) + bits.count(3) + as_bytes([1, 1, 1, 0, 0, 1]), 3, 10, "3 gaps in 6 bits .* got 4")
    refused(bytes([1]) + bits.count(0), 0, 0, "gaps among 0 entries have no 1 low bits")
    refused(bytes([255]) + bits.count(0), 3, 10, "no 255 low bits")
    assert bits.read_gaps(bits.Reader(slow_gaps([], 0)), 0, 0).tolist() == []
