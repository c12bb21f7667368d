"""Fixed point: exact sums whatever the values are, small errors, and what does not fit is refused."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsim.errors import TransferError
from fedsim.transfer.fixed import (
    PRODUCT_BITS,
    SECRET_BITS,
    decode,
    encode_coefficients,
    encode_secrets,
)

reals = st.floats(-1e6, 1e6, allow_subnormal=False)


def exactly(values):
    """As fractions: another arithmetic, without any rounding."""
    return [[Fraction(float(one)) for one in row] for row in np.atleast_2d(values)]


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=reals),
    st.data(),
)
def test_sums_of_products_are_exact_in_64_bits_and_decode_to_the_real_product(coefficients, data):
    terms = coefficients.shape[1]
    secrets = data.draw(arrays(np.float64, (terms, 3), elements=st.floats(-62.9, 62.9)))
    x, y = encode_coefficients(coefficients), encode_secrets(secrets)
    found = x.values @ y
    for row in range(len(coefficients)):
        for column in range(3):
            whole = sum(int(a) * int(b) for a, b in zip(x.values[row], y[:, column], strict=True))
            assert whole == found[row, column]  # int64 has not wrapped
            assert abs(whole) <= 2**PRODUCT_BITS
    real = [[sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*exactly(secrets), strict=True)]
            for row in exactly(coefficients)]  # fmt: skip
    longest = float(np.abs(coefficients).sum(1).max())
    allowed = 63 * terms * 2.0 ** -(x.fraction + 1) + longest * 2.0**-27 + 1e-9 * longest
    assert np.abs(decode(found, x.fraction) - np.array(real, dtype=np.float64)).max() <= allowed + 1e-12


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=reals))
def test_coefficients_get_as_many_bits_as_fit(coefficients):
    found = encode_coefficients(coefficients)
    # whatever secrets are, no row's sum can pass 2^62
    assert int(np.abs(found.values).sum(-1).max()) * 2**SECRET_BITS <= 2**PRODUCT_BITS
    # and twice as large would not be sure to fit, but for what rounding may add, unless no bit is left to be gained
    if found.fraction < 30 and np.abs(coefficients).max() > 1:
        twice = float(np.ldexp(np.abs(coefficients), found.fraction + 1).sum(-1).max()) + coefficients.shape[1] / 2
        assert twice * 2**SECRET_BITS > 2**PRODUCT_BITS


@given(st.integers(-(2**31), 2**31).map(lambda one: one / 2**26).filter(lambda one: abs(one) < 63))
def test_a_multiple_of_the_last_bit_is_encoded_exactly(value):
    assert encode_secrets(np.array([value]))[0] == Fraction(value) * 2**26


def test_halves_are_rounded_to_even_and_signs_stay():
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -0.0]) / 2**26
    assert encode_secrets(values).tolist() == [0, 2, 2, 0, -2, 0]


@pytest.mark.parametrize("value", [63.0, -63.0, 1e30, float("inf"), -float("inf"), float("nan")])
def test_a_secret_that_does_not_fit(value):
    with pytest.raises(TransferError, match=r"^overflow: a score must be below 63 in magnitude, .* got (-?\d|inf|nan)"):
        encode_secrets(np.array([0.5, value]), "a score")
    assert abs(int(encode_secrets(np.array([-62.999]))[0])) < 2**SECRET_BITS


@pytest.mark.parametrize("value", [2.0**30, -(2.0**31), float("inf"), float("nan")])
def test_coefficients_that_do_not_fit(value):
    with pytest.raises(TransferError, match=r"^overflow: coefficients .* less than 2\^30"):
        encode_coefficients(np.array([[[0.5, value]]]))
    with pytest.raises(TransferError, match="overflow"):
        encode_coefficients(np.full((1, 4), 2.0**28))
    assert encode_coefficients(np.full((4, 1), 2.0**28)).values.max() > 2**28  # each row has room of its own


def test_nothing_and_zeros():
    for smallest in (5e-324, 1e-300, -1e-20):
        found = encode_coefficients(np.array([[smallest, 0.0]]))
        assert found.values.tolist() == [[0, 0]]
        assert found.fraction == 52
    assert encode_secrets(np.zeros(0)).shape == (0,)
    found = encode_coefficients(np.zeros((2, 3)))
    assert (found.values == 0).all()
    assert (decode(found.values, found.fraction) == 0).all()
