"""Encrypted arrays against numpy and Python's integers."""

from dataclasses import replace

import numpy as np
import pytest

gmpy2 = pytest.importorskip("gmpy2")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from scipy.stats import chi2  # noqa: E402

from fedsim.errors import TransferError  # noqa: E402
from fedsim.transfer import ciphertexts as c  # noqa: E402
from fedsim.transfer.ciphertexts import LARGEST, Encrypted, Layout  # noqa: E402
from fedsim.transfer.fixed import Integers  # noqa: E402
from fedsim.transfer.paillier import generate  # noqa: E402
from fedsim.transfer.pool import Pool  # noqa: E402

KEY = generate(1024, insecure=True)
N = int(KEY.public.n)
EDGES = [0, 1, -1, 2**31, -(2**31), 2**61, -(2**61)]
whole = st.one_of(st.sampled_from(EDGES), st.integers(-(2**61), 2**61))


def drawn(seed: int, *shape: int, bits: int = 40) -> Integers:
    return np.random.default_rng(seed).integers(-(2**bits), 2**bits, shape, np.int64)


def slow(array: Encrypted) -> list[int]:
    """All slots, by taking digits off one by one."""
    found = []
    for value in array.values:
        left = int(KEY.decrypt(value))
        left = left - N if left > N // 2 else left
        for _ in range(array.layout.slots):
            digit = (left + 2**63) % 2**64 - 2**63
            found.append(digit)
            left = (left - digit) >> 64
        assert left == 0
    return found


@pytest.mark.parametrize(
    ("shape", "slots", "count"),
    [
        ((5,), 1, 5),
        ((5,), None, 1),
        ((2, 37), None, 6),
        ((2, 3, 7), 3, 18),
        ((0,), None, 0),
        ((3, 0), None, 0),
        ((4, 15), 15, 4),
    ],
)
def test_arrays_of_any_shape_come_back(shape: tuple[int, ...], slots: int | None, count: int) -> None:
    values = drawn(1, *shape, bits=62)
    for key in (KEY, KEY.public):
        array = c.encrypt(key, values, slots=slots)
        assert len(array.values) == array.layout.count == count and array.fresh
        found = c.decrypt(KEY, array)
        np.testing.assert_array_equal(found, values)
        assert found.dtype == np.int64 and found.shape == shape


def test_slots_are_signed_digits_of_64_bits_the_first_one_lowest() -> None:
    values = [LARGEST, -LARGEST, 0, -1, 1, -LARGEST, LARGEST]
    array = c.encrypt(KEY, np.array(values), slots=4)
    assert slow(array) == [*values, 0]
    plain = sum(value << 64 * slot for slot, value in enumerate(values[:4]))
    assert KEY.decrypt(array.values[0]) == plain % N


def test_as_many_slots_as_the_modulus_holds() -> None:
    assert [c.most_slots(bits) for bits in (1024, 2048, 3072)] == [15, 31, 47]
    for sign in (1, -1):
        values = np.full(15, sign * LARGEST)
        np.testing.assert_array_equal(c.decrypt(KEY, c.encrypt(KEY, values)), values)
    with pytest.raises(ValueError, match="cannot hold"):
        c.encrypt(KEY, np.zeros(16, np.int64), slots=16)


@given(st.lists(st.tuples(whole, whole), min_size=1, max_size=20), st.sampled_from([1, 4, 15]))
@settings(max_examples=20, deadline=None)
def test_sums_of_encrypted_and_plain_arrays(pairs: list[tuple[int, int]], slots: int) -> None:
    a, b = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    left = c.encrypt(KEY, a, slots=slots, bound=2**61)
    both = c.add(left, c.encrypt(KEY.public, b, slots=slots, bound=2**61))
    np.testing.assert_array_equal(c.decrypt(KEY, both), a + b)
    np.testing.assert_array_equal(c.decrypt(KEY, c.add_plain(left, b)), a + b)
    assert both.layout.bound == 2**62 and not both.fresh


@given(
    st.lists(st.integers(-(2**31), 2**31), min_size=7, max_size=7),
    st.lists(st.integers(-(2**31), 2**31), min_size=3, max_size=3),
)
@settings(max_examples=20, deadline=None)
def test_multiples_of_all_slots_of_a_ciphertext(values: list[int], scalars: list[int]) -> None:
    array = c.encrypt(KEY, np.array(values), slots=3, fraction=5, bound=2**31)
    found = c.scaled(array, np.array(scalars), fraction=7)
    expected = np.array(values) * np.repeat(scalars, 3)[:7]
    np.testing.assert_array_equal(c.decrypt(KEY, found), expected)
    assert found.layout.fraction == 12 and found.layout.bound == 2**31 * max(map(abs, scalars))


def test_what_could_pass_2_to_the_62_is_refused_before_it_is_calculated() -> None:
    half = c.encrypt(KEY, np.array([2**61, -(2**61)]), bound=2**61)
    whole = c.add(half, half)
    assert c.decrypt(KEY, whole).tolist() == [2**62, -(2**62)]
    for calculate in (
        lambda: c.add(whole, c.encrypt(KEY, np.array([0, 1]), bound=1)),
        lambda: c.add_plain(whole, np.array([0, -1])),
        lambda: c.scaled(half, np.array([-3])),
        lambda: c.scaled(half, np.array([np.iinfo(np.int64).min])),
    ):
        with pytest.raises(TransferError, match=r"overflow: encrypted values could reach \d+, over 2\^62"):
            calculate()
    assert c.decrypt(KEY, c.scaled(half, np.array([-2]))).tolist() == [-(2**62), 2**62]
    with pytest.raises(TransferError, match="overflow: a value of 9 where at most 8 was agreed"):
        c.encrypt(KEY, np.array([-9]), bound=8)
    with pytest.raises(TransferError, match="overflow: a value of 9223372036854775808"):
        c.encrypt(KEY, np.array([np.iinfo(np.int64).min]))


def test_arrays_that_do_not_fit_each_other_are_not_added() -> None:
    a = c.encrypt(KEY, np.zeros((2, 3), np.int64), fraction=4, bound=1)
    for other, told in (
        (c.encrypt(KEY, np.zeros((2, 3), np.int64), fraction=5, bound=1), "same fraction, got 4 and 5"),
        (c.encrypt(KEY, np.zeros((3, 2), np.int64), slots=3, fraction=4, bound=1), "same shape"),
        (c.encrypt(KEY, np.zeros((2, 3), np.int64), slots=2, fraction=4, bound=1), "same slots"),
        (c.encrypt(generate(1024, insecure=True), np.zeros((2, 3), np.int64), fraction=4, bound=1), "same key"),
    ):
        with pytest.raises(ValueError, match=told):
            c.add(a, other)
    with pytest.raises(ValueError, match="same fraction"):
        c.add_plain(a, np.zeros((2, 3), np.int64), fraction=3)
    with pytest.raises(ValueError, match="under another key"):
        c.decrypt(generate(1024, insecure=True), a)
    with pytest.raises(ValueError, match="must be int64, got float64"):
        c.encrypt(KEY, np.zeros(3))


def test_equal_values_never_give_equal_ciphertexts() -> None:
    assert len(set(c.encrypt(KEY, np.zeros(100, np.int64), slots=1).values)) == 100
    assert len(set(c.encrypt(KEY.public, np.zeros(100, np.int64), slots=1).values)) == 100


def test_what_leaves_is_made_random_again_unless_it_is_fresh() -> None:
    fresh = c.encrypt(KEY, drawn(3, 4), slots=1)
    sent = c.to_bytes(fresh)
    assert sent == b"".join(int(value).to_bytes(256, "big") for value in fresh.values)
    arrived = c.from_bytes(sent, KEY.public, fresh.layout)
    assert arrived.values == fresh.values and not arrived.fresh
    for array in (arrived, c.add_plain(fresh, np.zeros(4, np.int64)), c.scaled(fresh, np.ones(4, np.int64))):
        first, second = (c.from_bytes(c.to_bytes(array), KEY.public, array.layout) for _ in range(2))
        assert not {*array.values} & {*first.values} and not {*first.values} & {*second.values}
        np.testing.assert_array_equal(c.decrypt(KEY, first), drawn(3, 4))
    again = c.rerandomised(arrived)
    assert again.fresh and not {*again.values} & {*arrived.values}


def test_masked_arrays_are_opened_by_the_owner_and_unmasked_by_the_other() -> None:
    values = drawn(4, 3, 20, bits=61)
    array = c.from_bytes(c.to_bytes(c.encrypt(KEY, values)), KEY.public, Layout((3, 20), 15))
    sent, masks = c.masked(array)
    assert len(sent) == 6 * 256
    opened = c.opened(KEY, sent, 6)
    assert len(opened) == 6 * 128
    np.testing.assert_array_equal(c.unmasked(opened, masks), values)
    numbers = [int.from_bytes(opened[at : at + 128], "big") for at in range(0, len(opened), 128)]
    under = [int(KEY.decrypt(value)) for value in array.values]
    assert numbers == [(a + int(b)) % N for a, b in zip(under, masks.values, strict=True)]
    hidden = [int.from_bytes(sent[at : at + 256], "big") for at in range(0, len(sent), 256)]
    assert not {value % N for value in hidden} & {int(value) % N for value in array.values}  # new random factors
    assert "values" not in repr(masks)


def test_masks_are_uniform_mod_n() -> None:
    """n = 2,000 numbers in 16 equal parts of [0, n); false-alarm rate 1e-6."""
    zeros = Encrypted(KEY.public, Layout((2000,)), (gmpy2.mpz(1),) * 2000)
    _, masks = c.masked(zeros)
    counts = np.bincount([int(mask * 16 // N) for mask in masks.values], minlength=16)
    assert ((counts - 125) ** 2 / 125).sum() < chi2.isf(1e-6, 15)
    assert len(counts) == 16


def test_what_is_opened_is_uniform_whatever_lies_below() -> None:
    """n = 400 openings of one large value in 8 equal parts of [0, n); false-alarm rate 1e-6."""
    array = c.encrypt(KEY, np.full((400, 15), LARGEST))
    sent, _ = c.masked(array)
    opened = c.opened(KEY, sent, 400)
    counts = np.bincount(
        [int.from_bytes(opened[at : at + 128], "big") * 8 // N for at in range(0, len(opened), 128)], minlength=8
    )
    assert ((counts - 50) ** 2 / 50).sum() < chi2.isf(1e-6, 7)


GOOD = c.to_bytes(c.encrypt(KEY, np.array([5, 6]), slots=1))


def number(value: int, size: int = 256) -> bytes:
    return value.to_bytes(size, "big")


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "0 bytes where 2 numbers of 256 bytes"),
        (GOOD[:-1], "511 bytes where 2"),
        (GOOD + GOOD[:256], "768 bytes where 2"),
        (GOOD[:256] + number(0), r"not between 0 and n\^2"),
        (GOOD[:256] + number(N * N), r"not between 0 and n\^2"),
        (GOOD[:256] + number(2**2048 - 1), r"not between 0 and n\^2"),
        (GOOD[:256] + number(N), "factor in common"),
        (number(int(KEY.p) * 3) + GOOD[256:], "factor in common"),
        (number(int(KEY.p)) + number(int(KEY.q)), "factor in common"),
    ],
)
def test_hostile_ciphertexts_are_refused(payload: bytes, told: str) -> None:
    with pytest.raises(TransferError, match=told):
        c.from_bytes(payload, KEY.public, Layout((2,)))
    with pytest.raises(TransferError, match=told):
        c.opened(KEY, payload, 2)


def test_hostile_plaintexts_are_refused() -> None:
    array = c.encrypt(KEY, np.array([5, 6, 7]), slots=2, bound=100)
    sent, masks = c.masked(array)
    opened = c.opened(KEY, sent, 2)
    masks_of = [int(mask) for mask in masks.values]
    for payload, told in (
        (opened[:-1], "255 bytes where 2 numbers of 128 bytes"),
        (opened[:128] + number(N, 128), "not below n"),
        (opened[:128] + number((masks_of[1] + 2**128) % N, 128), "not 2 slots of 64 bits"),
        (opened[:128] + number((masks_of[1] + N // 2) % N, 128), "not 2 slots of 64 bits"),
        (opened[:128] + number((masks_of[1] - 2**127 - 2**63 - 1) % N, 128), "not 2 slots of 64 bits"),
        (opened[:128] + number((masks_of[1] - 101) % N, 128), "a decrypted value of 101 where at most 100"),
    ):
        with pytest.raises(TransferError, match=told):
            c.unmasked(payload, masks)
    assert c.unmasked(opened[:128] + number((masks_of[1] - 100) % N, 128), masks).tolist() == [5, 6, -100]


def test_no_ciphertext_is_taken_for_another_layout() -> None:
    array = c.encrypt(KEY, np.array([5, 6]), slots=1)
    with pytest.raises(ValueError, match="2 ciphertexts of 1024 bits cannot hold"):
        replace(array, layout=Layout((3,)))
    for layout in ({"shape": ()}, {"shape": (2,), "slots": 0}):
        with pytest.raises(ValueError, match="needs an axis and a slot"):
            Layout(**layout)


def test_any_number_of_processes_gives_the_same_values() -> None:
    values = drawn(5, 9, 3)
    with Pool(2) as pool:
        array = c.encrypt(KEY, values, slots=2, bound=2**40, pool=pool)
        scalars = drawn(6, 18, bits=20)
        found = c.scaled(array, scalars, pool=pool)
        assert found.values == c.scaled(array, scalars).values
        sent, masks = c.masked(found, pool=pool)
        expected = values * scalars.reshape(9, 2)[:, [0, 0, 1]]
        np.testing.assert_array_equal(c.unmasked(c.opened(KEY, sent, 18, pool=pool), masks), expected)
        np.testing.assert_array_equal(c.decrypt(KEY, c.rerandomised(found, pool=pool), pool=pool), expected)
