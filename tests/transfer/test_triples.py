"""Triples against Python's integers, and what either party sees against what it may know."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedsim.transfer import ring, triples
from fedsim.transfer.fixed import Integers
from fedsim.transfer.ring import Ring
from fedsim.transfer.terms import Shape
from fedsim.transfer.triples import Batch, Left, Right

LAYOUTS = Batch((Shape(1, 3, 7, 2), Shape(1, 2, 14, 1), Shape(2, 4, 7, 1), Shape(7, 1, 1, 2)))  # 14 secrets each


def integers(seed: int, shape: tuple[int, ...], bits: int = 64) -> Integers:
    return np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, np.int64)


def by_integers(x: Integers | Ring, y: Integers | Ring) -> Ring:
    exact = x.astype(object) @ y.astype(object)
    return np.array([int(value) % 2**64 for value in exact.ravel()], np.uint64).reshape(exact.shape)


Seen = tuple[list[Integers], list[Ring], Ring, list[Ring]]


def run(left: Left, right: Right, xs: list[Integers], y: Integers) -> Seen:
    """The results, and what is sent: X - D of each product, Y - E, and the answers."""
    batch = left.batch
    opened_left = [triples.open_left(x, left.factor(index)) for index, x in enumerate(xs)]
    opened_right = triples.open_right(y, right.factor())
    answers = [
        triples.answer(opened, y.reshape(triples.right_shape(batch.shapes[index])), right.products[index])
        for index, opened in enumerate(opened_left)
    ]
    results = [
        triples.finish(answered, left.factor(index), triples.laid_out(opened_right, batch, index), left.product(index))
        for index, answered in enumerate(answers)
    ]
    return results, opened_left, opened_right, answers


@given(st.lists(st.integers(1, 6), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_shares_of_a_dealt_triple_add_up(sizes: list[int]) -> None:
    batch = Batch((Shape(*sizes),))
    left, right = triples.deal(batch)
    expected = by_integers(left.factor(0), triples.laid_out(right.factor(), batch, 0))
    np.testing.assert_array_equal(left.product(0) + right.products[0], expected)
    assert left.factor(0).shape == tuple(sizes[:3])
    assert left.product(0).shape == right.products[0].shape == (sizes[0], sizes[1], sizes[3])


@given(st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(0, 2**32), st.sampled_from([8, 33, 64]))
@settings(max_examples=60, deadline=None)
def test_a_product_is_that_of_integers(sizes: list[int], seed: int, bits: int) -> None:
    batch = Batch((Shape(*sizes),))
    x, y = integers(seed, tuple(sizes[:3])), integers(seed + 1, (batch.size,), bits)
    found = run(*triples.deal(batch), [x], y)[0][0]
    expected = by_integers(x, y.reshape(triples.right_shape(batch.shapes[0])))
    np.testing.assert_array_equal(ring.unsigned(found), expected)


def test_products_that_fit_are_those_of_int64() -> None:
    batch = Batch((Shape(2, 30, 600, 17), Shape(1, 5, 2 * 600 * 17, 1)))
    xs = [integers(1, (2, 30, 600), 20), integers(2, (1, 5, 2 * 600 * 17), 16)]
    y = integers(3, (batch.size,), 33)
    found = run(*triples.deal(batch), xs, y)[0]
    for product, x, shape in zip(found, xs, batch.shapes, strict=True):
        assert product.dtype == np.int64
        np.testing.assert_array_equal(product, x @ y.reshape(triples.right_shape(shape)))


def test_one_matrix_of_secrets_is_read_in_several_layouts_and_opened_once() -> None:
    left, right = triples.deal(LAYOUTS)
    xs = [integers(index, triples.left_shape(shape)) for index, shape in enumerate(LAYOUTS.shapes)]
    y = integers(9, (14,))
    found, _, opened_right, _ = run(left, right, xs, y)
    assert opened_right.shape == (14,)
    for product, x, shape in zip(found, xs, LAYOUTS.shapes, strict=True):
        expected = by_integers(x, y.reshape(shape.batches, shape.terms, shape.columns))
        np.testing.assert_array_equal(ring.unsigned(product), expected)


def test_no_two_matrices_of_a_batch_have_anything_in_common() -> None:
    left, right = triples.deal(LAYOUTS)
    again, other = triples.deal(LAYOUTS)
    drawn = [one.factor(index) for one in (left, again) for index in range(4)]
    drawn += [one.product(index) for one in (left, again) for index in range(4)]
    drawn += [*right.products, *other.products, right.factor(), other.factor()]
    together = np.concatenate([one.ravel() for one in drawn])
    assert len(np.unique(together)) == len(together)  # by chance: below 2^-47


def test_what_left_keeps_is_a_seed_and_neither_part_shows_its_own() -> None:
    batch = Batch((Shape(1, 4, 5000, 1),))
    left, right = triples.deal(batch)
    assert len(left.seed) == len(right.seed) == 32 and left.seed != right.seed
    assert len(pickle.dumps(left)) < 1000 and len(pickle.dumps(right)) < 1000
    assert "seed" not in repr(left) and "seed" not in repr(right) and "products" not in repr(right)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(left)).factor(0), left.factor(0))


# ---------------------------------------------------------------- what either party sees


def test_what_right_sees_is_explained_by_any_coefficients() -> None:
    """For every X' there is one D' (and F_left') with which right sees the same, and left gets X' @ Y."""
    left, right = triples.deal(LAYOUTS)
    y = integers(1, (14,))
    for index, shape in enumerate(LAYOUTS.shapes):
        x, other = integers(2, triples.left_shape(shape)), integers(3, triples.left_shape(shape), 20)
        seen = triples.open_left(x, left.factor(index))
        d = ring.unsigned(other) - seen
        np.testing.assert_array_equal(triples.open_left(other, d), seen)
        e, y_read = (triples.laid_out(one, LAYOUTS, index) for one in (right.factor(), ring.unsigned(y)))
        f_left = by_integers(d, e) - right.products[index]
        answered = triples.answer(seen, ring.signed(y_read), right.products[index])
        opened_right = triples.laid_out(triples.open_right(y, right.factor()), LAYOUTS, index)
        found = triples.finish(answered, d, opened_right, f_left)
        np.testing.assert_array_equal(ring.unsigned(found), by_integers(other, ring.signed(y_read)))


def test_what_left_sees_follows_from_its_own_numbers_and_the_result() -> None:
    left, right = triples.deal(LAYOUTS)
    xs = [integers(index, triples.left_shape(shape)) for index, shape in enumerate(LAYOUTS.shapes)]
    results, _, _, answers = run(left, right, xs, y := integers(5, (14,)))
    anything = ring.random((14,))  # stands for Y - E in the simulation, which never sees Y
    e = ring.unsigned(y) - anything
    for index, shape in enumerate(LAYOUTS.shapes):
        opened = anything.reshape(triples.right_shape(shape))
        simulated = ring.unsigned(results[index]) - by_integers(left.factor(index), opened) - left.product(index)
        f_right = by_integers(left.factor(index), e.reshape(opened.shape)) - left.product(index)
        sent = triples.open_left(xs[index], left.factor(index))
        real = triples.answer(sent, y.reshape(opened.shape), f_right)
        np.testing.assert_array_equal(real, simulated)
        assert not np.array_equal(real, answers[index])  # another E, another answer


def test_left_sees_the_same_for_all_secrets_that_give_the_same_products() -> None:
    batch = Batch((Shape(1, 2, 3, 1), Shape(1, 1, 3, 1)))
    xs = [np.array([[[1, 2, 3], [-4, 5, 6]]]), np.array([[[6, -1, 0]]])]
    y, step = integers(4, (3,), 40), np.array([-3, -18, 13])  # which every row takes to 0
    left, right = triples.deal(batch)
    results, _, opened, answers = run(left, right, xs, y)
    e = right.factor() + ring.unsigned(step)
    np.testing.assert_array_equal(triples.open_right(y + step, e), opened)
    for index, x in enumerate(xs):
        f_right = by_integers(left.factor(index), e.reshape(1, 3, 1)) - left.product(index)
        other = (y + step).reshape(1, 3, 1)
        np.testing.assert_array_equal(results[index], x @ other)
        np.testing.assert_array_equal(
            triples.answer(triples.open_left(x, left.factor(index)), other, f_right), answers[index]
        )


def test_all_that_is_sent_is_uniform_for_constant_inputs() -> None:
    """Chi-square of each of 8 bytes over 256 values, n = 20,000 (10,000 of Y - E); false alarms: 24 * 1e-10."""
    batch = Batch((Shape(1, 200, 100, 100),))
    x, y = np.full((1, 200, 100), -3), np.full(batch.size, 5)
    _, opened_left, opened_right, answers = run(*triples.deal(batch), [x], y)
    for sent in [*opened_left, opened_right, *answers]:
        assert sent.size in {10_000, 20_000}
        for place in range(8):
            counts = np.bincount((sent.ravel() >> np.uint64(8 * place)).astype(np.uint8), minlength=256)
            expected = sent.size / 256
            assert chi2.sf(((counts - expected) ** 2 / expected).sum(), 255) > 1e-10


def test_a_triple_used_twice_would_give_a_difference_away() -> None:
    left, _ = triples.deal(Batch((Shape(1, 2, 3, 1),)))
    x, other = integers(1, (1, 2, 3), 20), integers(2, (1, 2, 3), 20)
    seen, then = (triples.open_left(one, left.factor(0)) for one in (x, other))
    np.testing.assert_array_equal(ring.signed(seen - then), x - other)


# ---------------------------------------------------------------- hostile


NONSENSE = [
    (),
    (Shape(1, 2, 0, 1),),
    (Shape(1, 2, -3, -1),),
    (Shape(1, 1, 6, 1), Shape(1, 1, 5, 1)),
    (Shape(1, 2.0, 3, 1),),
    (Shape(True, 2, 3, 1),),
    ((1, 2, 3),),
]


@pytest.mark.parametrize("shapes", NONSENSE)
def test_batches_that_make_no_sense_are_refused(shapes: tuple[Shape, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        Batch(shapes)


D, X, Y, F = (1, 2, 3), (1, 2, 3), (1, 3, 4), (1, 2, 4)


@pytest.mark.parametrize("wrong", [(2, 3), (1, 2, 1), (1, 1, 3), (2, 2, 3), (1, 3, 2), (), (0,)])
def test_arrays_of_other_shapes_are_refused(wrong: tuple[int, ...]) -> None:
    bad, values = np.zeros(wrong, np.uint64), np.zeros(wrong, np.int64)
    d, y, f = np.zeros(D, np.uint64), np.zeros(Y, np.int64), np.zeros(F, np.uint64)
    calls = [
        lambda: triples.open_left(values, d),
        lambda: triples.open_right(values, ring.unsigned(y)),
        lambda: triples.answer(bad, y, f),
        lambda: triples.answer(d, y, bad),
        lambda: triples.answer(d, values, f),
        lambda: triples.finish(bad, d, ring.unsigned(y), f),
        lambda: triples.finish(f, d, bad, f),
        lambda: triples.finish(f, d, ring.unsigned(y), bad),
        lambda: triples.laid_out(bad, LAYOUTS, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="shape"):
            call()


def test_secrets_are_opened_as_one_row() -> None:
    with pytest.raises(ValueError, match=r"shape \(14,\), got \(2, 7\)"):
        triples.laid_out(np.zeros((2, 7), np.uint64), LAYOUTS, 0)


def test_arrays_of_other_types_are_refused() -> None:
    d, y, f = np.zeros(D, np.uint64), np.zeros(Y, np.int64), np.zeros(F, np.uint64)
    calls = [
        lambda: triples.open_left(np.zeros(X), d),
        lambda: triples.open_left(np.zeros(X, np.int64), d.astype(np.int64)),
        lambda: triples.answer(np.zeros(X, np.int64), y, f),
        lambda: triples.answer(d, np.zeros(Y), f),
        lambda: triples.finish(np.zeros(F), d, ring.unsigned(y), f),
        lambda: triples.finish(f, d, np.zeros(Y), f),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="int64"):
            call()
