"""Arithmetic in Z_2^64 against Python's integers, and the streams against single blocks of the cipher."""

import hashlib
import hmac
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedsim.transfer import ring
from fedsim.transfer.ring import Ring

EDGES = [0, 1, 2**21 - 1, 2**21, 2**22 - 1, 2**22, 2**43 - 1, 2**43, 2**44 - 1, 2**62, 2**63 - 1]
ELEMENTS = [value % 2**64 for edge in EDGES for value in (edge, -edge, -edge - 1)]


def by_integers(x: Ring, y: Ring) -> Ring:
    """The product of Python integers, reduced at the end."""
    exact = x.astype(object) @ y.astype(object)
    return np.array([int(value) % 2**64 for value in exact.ravel()], np.uint64).reshape(exact.shape)


def drawn(seed: int, shape: tuple[int, ...], bits: int = 64) -> Ring:
    """Elements with a sign and fewer than ``bits`` bits."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(low, high, shape, np.int64).view(np.uint64)


@given(st.data(), st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_products_are_those_of_integers(data: st.DataObject, batches: int, rows: int, terms: int, columns: int) -> None:
    leading = (batches,) if batches else ()
    elements = st.one_of(st.sampled_from(ELEMENTS), st.integers(0, 2**64 - 1))

    def some(*shape: int) -> Ring:
        count = int(np.prod(shape))
        return np.array(data.draw(st.lists(elements, min_size=count, max_size=count)), np.uint64).reshape(shape)

    x, y = some(*leading, rows, terms), some(*leading, terms, columns)
    expected = by_integers(x, y)
    np.testing.assert_array_equal(ring.matmul(x, y), expected)
    np.testing.assert_array_equal(ring.by_limbs(x, y), expected)


@pytest.mark.parametrize("left", [2**63 - 1, 2**64 - 1, 2**63, 2**43 - 1, 2**23 - 1, 2**22 - 1, -(2**43) % 2**64])
@pytest.mark.parametrize("right", [2**63 - 1, 2**64 - 1, 2**43 - 1, 2**23 - 1])
@pytest.mark.parametrize("terms", [511, 512, 513, 1537])
def test_sums_of_the_largest_limbs_are_exact_across_blocks(left: int, right: int, terms: int) -> None:
    x, y = np.full((2, terms), left, np.uint64), np.full((terms, 3), right, np.uint64)
    np.testing.assert_array_equal(ring.by_limbs(x, y), np.full((2, 3), left * right * terms % 2**64, np.uint64))


@pytest.mark.parametrize("bits", [(64, 64), (64, 33), (31, 64), (22, 22), (44, 23), (45, 45)])
def test_longer_products_are_those_of_integers_both_ways(bits: tuple[int, int]) -> None:
    x, y = drawn(1, (2, 20, 700), bits[0]), drawn(2, (2, 700, 19), bits[1])
    np.testing.assert_array_equal(ring.matmul(x, y), by_integers(x, y))
    np.testing.assert_array_equal(ring.by_limbs(x, y), by_integers(x, y))


def test_both_ways_are_taken_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, original = [], ring.by_limbs
    monkeypatch.setattr(ring, "by_limbs", lambda x, y: taken.append(x.shape) or original(x, y))
    for shape in [(63, 2**12, 70), (70, 2**12, 63), (64, 2**12, 64), (64, 2**12 - 1, 64), (300, 1000, 1)]:
        x, y = drawn(3, shape[:2]), drawn(4, shape[1:])
        np.testing.assert_array_equal(ring.matmul(x, y), x @ y)
    assert taken == [(64, 2**12)]


def test_arrays_may_be_strided() -> None:
    x, y = drawn(5, (40, 3, 600)).transpose(1, 0, 2), drawn(6, (33, 600, 3)).transpose(2, 1, 0)
    np.testing.assert_array_equal(ring.by_limbs(x, y), by_integers(x, y))


def test_integers_whose_sums_fit_are_multiplied_as_int64() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.integers(-(2**20), 2**20, (3, 40, 900)), rng.integers(-(2**32) + 1, 2**32, (3, 900, 50))
    found = ring.signed(ring.matmul(ring.unsigned(x), ring.unsigned(y)))
    assert np.abs(x).sum(-1).max() * 2**32 <= 2**62
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, x @ y)


def test_no_terms_give_zero() -> None:
    assert ring.by_limbs(drawn(1, (3, 0)), drawn(1, (0, 4))).tolist() == [[0] * 4] * 3
    assert ring.matmul(drawn(1, (3, 0)), drawn(1, (0, 4))).tolist() == [[0] * 4] * 3


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 3)), ((3,), (3, 1)), ((2, 2, 3), (3, 2)), ((2, 2, 3), (1, 3, 2)), ((0, 2, 3), (1, 3, 2))]
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="shapes must be"):
        ring.matmul(np.zeros(shapes[0], np.uint64), np.zeros(shapes[1], np.uint64))


@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.uint32, object])
def test_other_types_are_refused(dtype: type) -> None:
    good, bad = np.zeros((2, 2), np.uint64), np.zeros((2, 2), dtype)
    for x, y in [(good, bad), (bad, good)]:
        with pytest.raises(ValueError, match="uint64"):
            ring.matmul(x, y)
    if dtype != np.int64:
        with pytest.raises(ValueError, match="int64"):
            ring.unsigned(bad)


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_signs_come_back(values: list[int]) -> None:
    found = ring.unsigned(np.array(values, np.int64))
    assert found.tolist() == [value % 2**64 for value in values]
    assert ring.signed(found).tolist() == values


@given(st.lists(st.integers(0, 2**64 - 1)))
def test_bytes_are_little_endian_whatever_the_array(values: list[int]) -> None:
    expected = b"".join(value.to_bytes(8, "little") for value in values)
    for order in "<>":
        assert ring.to_bytes(np.array(values, f"{order}u8")) == expected
    found = ring.from_bytes(expected, (len(values), 1))
    assert found.tolist() == [[value] for value in values]
    assert found.dtype == np.uint64 and found.flags.writeable
    with pytest.raises(ValueError, match="bytes, got"):
        ring.from_bytes(expected + b"\0", (len(values),))


# ---------------------------------------------------------------- random elements


def test_a_stream_is_the_cipher_of_a_counter() -> None:
    seed = bytes(range(32))
    key = hmac.new(seed, b"D 1", hashlib.sha256).digest()
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    data = b"".join(block.update(count.to_bytes(16, "big")) for count in range(3))
    expected = [int.from_bytes(data[at : at + 8], "little") for at in range(0, 40, 8)]
    assert ring.expand(seed, "D 1", (5, 1)).ravel().tolist() == expected


def test_streams_differ_by_label_and_seed_and_longer_ones_begin_alike() -> None:
    seed = ring.random_seed()
    first = ring.expand(seed, "E", (1000,))
    np.testing.assert_array_equal(ring.expand(seed, "E", (7, 11)).ravel(), first[:77])
    others = [ring.expand(seed, "D 0", (1000,)), ring.expand(ring.random_seed(), "E", (1000,))]
    assert all(len(np.intersect1d(first, other)) == 0 for other in others)  # by chance: below 2^-43
    assert len(seed) == 32


@pytest.mark.parametrize("seed", [b"", bytes(31), bytes(33)])
def test_seeds_of_another_length_are_refused(seed: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        ring.expand(seed, "E", (1,))


@pytest.mark.parametrize("draw", [ring.random, lambda shape: ring.expand(ring.random_seed(), "x", shape)])
def test_random_elements_are_uniform(draw: Callable[[tuple[int, ...]], Ring]) -> None:
    """Chi-square of each of the 8 bytes over 256 values, n = 50,000; false alarms: 8 * 1e-10."""
    values = draw((100, 500))
    assert values.shape == (100, 500) and values.dtype == np.uint64
    for place in range(8):
        counts = np.bincount((values.ravel() >> np.uint64(8 * place)).astype(np.uint8), minlength=256)
        statistic = ((counts - 50_000 / 256) ** 2 / (50_000 / 256)).sum()
        assert chi2.sf(statistic, 255) > 1e-10
