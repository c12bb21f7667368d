"""Products on ciphertexts against numpy's on Python's integers."""

from collections.abc import Callable

import numpy as np
import pytest

gmpy2 = pytest.importorskip("gmpy2")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fedsim.errors import TransferError  # noqa: E402
from fedsim.transfer import ciphertexts as c  # noqa: E402
from fedsim.transfer import products as m  # noqa: E402
from fedsim.transfer.fixed import Integers  # noqa: E402
from fedsim.transfer.paillier import generate  # noqa: E402
from fedsim.transfer.pool import Pool  # noqa: E402

KEY = generate(1024, insecure=True)
SQUARE = KEY.public.square


def drawn(seed: int, *shape: int, bits: int, zeros: float = 0.3) -> Integers:
    generator = np.random.default_rng(seed)
    values = generator.integers(-(2**bits), 2**bits, shape, np.int64)
    return np.where(generator.random(shape) < zeros, 0, values)


def exact(x: Integers, y: Integers) -> Integers:
    return (x.astype(object) @ y.astype(object)).astype(np.int64)


@pytest.mark.parametrize("slots", [1, 2, None])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 5, 17, 4), (3, 1, 7, 20), (1, 30, 2, 1), (2, 3, 40, 1), (4, 2, 1, 3), (1, 2, 300, 1)]
)
def test_products_are_those_of_integers(shape: tuple[int, int, int, int], slots: int | None) -> None:
    batches, rows, terms, columns = shape
    x, y = drawn(1, batches, rows, terms, bits=20), drawn(2, batches, terms, columns, bits=32)
    secret = c.encrypt(KEY, y, slots=slots, fraction=26, bound=2**32)
    found = m.matmul(x, secret, fraction=9)
    np.testing.assert_array_equal(c.decrypt(KEY, found), exact(x, y))
    assert found.layout.shape == (batches, rows, columns) and found.layout.slots == secret.layout.slots
    assert found.layout.fraction == 35
    assert found.layout.bound == max(int(np.abs(row).sum()) for row in x.reshape(-1, terms)) * 2**32
    assert not found.fresh


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 2**30, -1, 0, 2**61, -(2**61) + 1, 2**62])
def test_the_largest_scalars_of_either_sign(value: int) -> None:
    x = np.array([[[value, 0]], [[0, -value]]])
    secret = c.encrypt(KEY, np.array([[[1], [0]], [[1], [-1]]]), bound=1)
    assert c.decrypt(KEY, m.matmul(x, secret)).ravel().tolist() == [value, value]


@pytest.mark.parametrize(("rows", "terms"), [(0, 3), (3, 0), (0, 0)])
def test_empty_products_are_zeros(rows: int, terms: int) -> None:
    secret = c.encrypt(KEY, np.zeros((2, terms, 2), np.int64))
    found = c.decrypt(KEY, m.matmul(np.zeros((2, rows, terms), np.int64), secret))
    np.testing.assert_array_equal(found, np.zeros((2, rows, 2)))


def test_no_batches() -> None:
    secret = c.encrypt(KEY, np.zeros((0, 3, 2), np.int64))
    assert m.matmul(np.zeros((0, 4, 3), np.int64), secret).layout.shape == (0, 4, 2)


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 8, 31, 53, 61]), st.integers(2, 13))
@settings(max_examples=60, deadline=None)
def test_both_ways_and_every_width_raise_to_the_same_powers(
    data: st.DataObject, rows: int, terms: int, bits: int, width: int
) -> None:
    scalar = st.one_of(st.integers(-(2**bits), 2**bits), st.sampled_from([0, 1, -1, 2**bits, -(2**bits), 2**bits - 1]))
    x = np.array(data.draw(st.lists(scalar, min_size=rows * terms, max_size=rows * terms))).reshape(rows, terms)
    bases = [KEY.public.noise() for _ in range(terms)]
    for step, way in ((1, m._by_tables), (width, m._by_buckets)):
        multiply = way(bases, width, SQUARE)
        digits = m._digits(x, width, step)
        for row in range(rows):
            expected = 1
            for base, scalar_of in zip(bases, x[row].tolist(), strict=True):
                expected = expected * pow(int(base), scalar_of, int(SQUARE)) % int(SQUARE)
            assert m._row(digits[:, row], step, multiply, SQUARE) == expected


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=10), st.integers(2, 13))
@settings(max_examples=200, deadline=None)
def test_digits_make_up_the_scalars(scalars: list[int], width: int) -> None:
    x = np.array(scalars)
    for step in (1, width):
        digits = m._digits(x, width, step)
        total = sum((digit.astype(object) << step * place for place, digit in enumerate(digits)), x.astype(object) * 0)
        assert total.tolist() == scalars
        assert np.abs(digits).max(initial=0) <= 2 ** (width - 1)
    odd = m._digits(x, width, 1)
    assert ((odd == 0) | (odd % 2 == 1)).all()
    for place in range(len(odd)):
        assert ((odd[place : place + width] != 0).sum(axis=0) <= 1).all()


@pytest.mark.parametrize(
    ("rows", "terms", "bits", "tables"),
    [(17, 16, 21, True), (256, 60, 21, True), (1, 516, 30, False), (256, 3456, 21, False), (17, 1500, 30, False)],
)
def test_the_way_is_the_one_with_fewer_multiplications(rows: int, terms: int, bits: int, tables: bool) -> None:
    x = drawn(3, rows, terms, bits=bits, zeros=0)
    assert m._way(x).tables == tables
    most = int(np.abs(x).max()).bit_length()
    assert m._way(x).cost == pytest.approx(_expected(x, m._way(x)) + rows * 2 * most)
    assert _counted(x[:20], m._way(x)) == pytest.approx(_expected(x[:20], m._way(x)), rel=0.15)


class _Counting:
    """A number that counts how often it is multiplied."""

    count = 0

    def __mul__(self, other: object) -> "_Counting":
        _Counting.count += 1
        return self

    __rmul__ = __mul__

    def __mod__(self, other: object) -> "_Counting":
        return self


def _counted(x: Integers, way: "m._Way") -> int:
    """Multiplications by the ciphertexts of one sign and another, without those of the bits of a row."""
    _Counting.count = 0
    step = 1 if way.tables else way.width
    make: Callable[..., m._Multiply] = m._by_tables if way.tables else m._by_buckets
    multiply = make([_Counting()] * x.shape[1], way.width, SQUARE)
    digits = m._digits(x, way.width, step)
    for row in range(len(x)):
        for sign in (1, -1):
            for terms, values in m._places(digits[:, row] * np.int16(sign)):
                if terms:
                    multiply(_Counting(), terms, values)
    return _Counting.count


def _expected(x: Integers, way: "m._Way") -> float:
    """The counts that the module states, without squarings of a row and without what was measured."""
    rows, terms = x.shape
    lengths = [abs(value).bit_length() for value in x.ravel().tolist()]
    mean, most = float(np.mean(lengths)), max(lengths)
    if way.tables:
        return 2 ** (way.width - 2) * terms + rows * terms * (mean / (way.width + 1) + 0.5)
    places = -(-(most + 1) // way.width)
    highest = most + 1 - way.width * (places - 1)
    return rows * (terms * min(mean / way.width + 0.5, places) + 2**way.width * (places - 1) + 2**highest)


def test_a_product_that_could_pass_2_to_the_62_is_refused() -> None:
    secret = c.encrypt(KEY, np.zeros((1, 3, 1), np.int64), bound=2**32)
    m.matmul(np.array([[[2**29, 0, -(2**29)]]]), secret)
    with pytest.raises(TransferError, match=r"overflow: encrypted values could reach 4611686022722355200, over 2\^62"):
        m.matmul(np.array([[[0, 0, 0], [2**29, 1, -(2**29)]]])[:, 1:], secret)
    for value in (2**63 - 1, -(2**63)):  # a row's sum has more than 64 bits
        with pytest.raises(TransferError, match=f"could reach {3 * abs(value) * 2**32}"):
            m.matmul(np.full((1, 2, 3), value), secret)


def test_shapes_that_do_not_fit_are_refused() -> None:
    secret = c.encrypt(KEY, np.zeros((2, 3, 1), np.int64))
    for x in (np.zeros((2, 5, 4), np.int64), np.zeros((1, 5, 3), np.int64)):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            m.matmul(x, secret)
    for bad in (np.zeros((2, 5, 3)), np.zeros((5, 3), np.int64)):
        with pytest.raises(ValueError, match="int64 and of three axes"):
            m.matmul(bad, secret)


@pytest.mark.parametrize(
    ("shape", "count", "slots"),
    [
        ((2, 16, 1), 3, 15),
        ((31, 1), 3, 15),
        ((7, 4), 3, 12),
        ((3, 15), 3, 15),
        ((4, 8), 4, 8),
        ((1, 1), 1, 15),
        ((0, 2), 0, 14),
    ],
)
def test_few_values_share_a_ciphertext_before_they_leave(shape: tuple[int, ...], count: int, slots: int) -> None:
    values = drawn(4, *shape, bits=61, zeros=0)
    array = c.encrypt(KEY, values, fraction=3, bound=2**61)
    found = m.packed(array)
    assert len(found.values) == count and found.layout.slots == slots
    assert found.layout.shape == (values.size,) and not found.fresh
    assert (found.layout.fraction, found.layout.bound) == (3, 2**61)
    np.testing.assert_array_equal(c.decrypt(KEY, found), values.ravel())


def test_rows_of_several_ciphertexts_are_not_packed() -> None:
    with pytest.raises(ValueError, match="rows have 2 ciphertexts"):
        m.packed(c.encrypt(KEY, np.zeros((2, 3), np.int64), slots=2))
    with pytest.raises(ValueError, match="rows have 0 ciphertexts"):
        m.packed(c.encrypt(KEY, np.zeros((2, 0), np.int64)))


@pytest.mark.parametrize("shape", [(1, 9, 50, 1), (3, 4, 10, 17), (2, 1, 5, 3)])
def test_any_number_of_processes_gives_the_same_ciphertexts(shape: tuple[int, int, int, int]) -> None:
    batches, rows, terms, columns = shape
    x = drawn(5, batches, rows, terms, bits=20)
    y = drawn(6, batches, terms, columns, bits=32)
    secret = c.encrypt(KEY, y, bound=2**32)
    alone = m.matmul(x, secret)
    for workers in (2, 3):
        with Pool(workers) as pool:
            found = m.matmul(x, secret, pool=pool)
            assert found == alone
            if found.layout.groups == 1:
                assert m.packed(found, pool=pool) == m.packed(alone)
    np.testing.assert_array_equal(c.decrypt(KEY, alone), exact(x, y))


def test_a_whole_exchange_at_2048_bits() -> None:
    key = generate(2048)
    x, y = drawn(7, 1, 33, 3, bits=20), drawn(8, 1, 3, 1, bits=32)
    layout = c.Layout((1, 3, 1), 1, bound=2**32)
    secret = c.from_bytes(c.to_bytes(c.encrypt(key, y, slots=1, bound=2**32)), key.public, layout)
    sent, masks = c.masked(m.packed(m.matmul(x, secret)))
    assert len(sent) == 2 * 512  # 33 values, 31 to a ciphertext
    np.testing.assert_array_equal(c.unmasked(c.opened(key, sent, 2), masks), exact(x, y).ravel())
