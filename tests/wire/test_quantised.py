"""Value codings against their formulas: bounds, laws, exact lengths, and what is read codes to itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.wire.quantised import BUCKET, CODINGS

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LEVELS = {"uniform8": 127, "uniform4": 7, "qsgd8": 127, "qsgd4": 7, "qsgd2": 1}
WIDTHS = {"uniform8": 8, "uniform4": 4, "qsgd8": 8, "qsgd4": 4, "qsgd2": 2, "sign": 1}
DETERMINISTIC = [name for name, coding in CODINGS.items() if not coding.stochastic]
BOTH = [torch.float32, torch.float64]


def there_and_back(name, values, key=None):
    """Read again; the length is checked on the way."""
    coding = CODINGS[name]
    data = coding.encode(values, key)
    assert len(data) == coding.size(len(values), values.dtype)
    back = coding.decode(memoryview(data), len(values), values.dtype)
    assert back.dtype == values.dtype and back.shape == values.shape
    return back


def same(a, b):
    return p.same_bits({"": a}, {"": b})


@st.composite
def vectors(draw, dtypes=tuple(FLOATS)):
    """Mixed signs, wide ranges, zeros, empty and of one entry."""
    dtype, n = draw(st.sampled_from(dtypes)), draw(st.integers(0, 40) | st.sampled_from([511, 512, 513, 1025]))
    size = 10.0 ** draw(st.integers(-3, 3) if dtype == torch.float16 else st.integers(-40, 30))
    x = rng.normal(draw(st.integers(0, 99)), n, dtype=torch.float64) * size
    x[rng.bernoulli(draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.3, 1.0])), n)] = 0.0
    return x.to(dtype)


@pytest.mark.parametrize("name", CODINGS)
@given(vectors(), st.integers(0, 2**63))
@settings(deadline=None, max_examples=60)
def test_every_coding_reads_finite_values_of_as_many_bytes_as_it_says(name, values, key):
    back = there_and_back(name, values, key)
    if name != "fp16":  # whose range is smaller
        assert bool(torch.isfinite(back).all())
    if CODINGS[name].keeps_zero:
        assert bool((back[values == 0] == 0).all())


@pytest.mark.parametrize("name", DETERMINISTIC)
@given(vectors())
@settings(deadline=None, max_examples=100)
def test_what_is_read_codes_to_itself(name, values):
    once = there_and_back(name, values)
    assert same(there_and_back(name, once), once)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_coding_without_chance_ignores_the_key(name):
    x = rng.normal(1, 700)
    assert CODINGS[name].encode(x, 5) == CODINGS[name].encode(x, None)


def test_lengths_are_a_scale_and_so_many_bits_for_each_value():
    for name, width in WIDTHS.items():
        for n in (0, 1, 5, 512, 513, 2000):
            scales = -(-n // 512) if name.startswith("qsgd") else 1
            assert CODINGS[name].size(n, torch.float32) == 4 * scales + math.ceil(n * width / 8)
            assert CODINGS[name].size(n, torch.float64) == 8 * scales + math.ceil(n * width / 8)
    assert [CODINGS[name].size(10, torch.float64) for name in ("exact", "fp16", "bf16")] == [80, 20, 20]


@given(st.binary(max_size=80), st.sampled_from(FLOATS))
@settings(deadline=None, max_examples=100)
def test_exact_keeps_all_bits(data, dtype):
    data = data[: len(data) // dtype.itemsize * dtype.itemsize]
    values = torch.tensor(list(data), dtype=torch.uint8).view(dtype) if data else torch.zeros(0, dtype=dtype)
    assert CODINGS["exact"].encode(values, None) == data
    assert same(there_and_back("exact", values), values)


# ---------------------------------------------------------------- casts


def test_fp16_is_numpys():
    x = torch.cat([rng.normal(1, 5000) * 10.0**power for power in range(-9, 7)])
    with np.errstate(over="ignore"):
        assert CODINGS["fp16"].encode(x, None) == x.numpy().astype(np.float16).tobytes()


@pytest.mark.parametrize("dtype", BOTH)
def test_casts_are_off_by_as_much_as_stated(dtype):
    x = torch.cat([rng.normal(1, 2000, dtype=dtype) * 10.0**power for power in range(-9, 4)])
    error = (there_and_back("fp16", x) - x).abs().double()
    assert bool((error <= torch.maximum(2.0**-11 * x.abs(), torch.tensor(2.0**-25))).all())
    wide = torch.cat([x * 1e-20, x, x * 1e20])
    error = (there_and_back("bf16", wide) - wide).abs().double()
    assert bool((error <= 2.0**-8 * wide.abs()).all()) and bool((error > 2.0**-9.5 * wide.abs()).any())
    assert there_and_back("fp16", torch.tensor([65504.0, 65519.0, -65520.0])).tolist() == [65504, 65504, -math.inf]


# ---------------------------------------------------------------- uniform


@pytest.mark.parametrize("name", ["uniform8", "uniform4"])
def test_uniform_is_torchs_quantisation_with_this_scale(name):
    levels, x = LEVELS[name], rng.normal(1, 5000)
    scale = float(x.abs().max()) / levels
    expected = torch.fake_quantize_per_tensor_affine(x, scale, 0, -levels, levels)
    assert torch.allclose(there_and_back(name, x), expected, rtol=1e-6, atol=0)


def test_uniform_of_some_numbers():
    x = torch.tensor([7.0, -7.0, 3.4, -3.6, 0.4, -0.0])
    assert there_and_back("uniform4", x).tolist() == [7.0, -7.0, 3.0, -4.0, 0.0, 0.0]
    assert CODINGS["uniform4"].encode(x, None).hex() == "0000e040" + "0e" + "3a" + "77"  # 14 0, 10 3, 7 7


@pytest.mark.parametrize("name", ["uniform8", "uniform4"])
@given(vectors(dtypes=tuple(BOTH)))
@settings(deadline=None, max_examples=100)
def test_uniform_is_off_by_at_most_half_a_step(name, values):
    step = float(values.abs().max()) / LEVELS[name] if len(values) else 0.0
    least = torch.finfo(values.dtype).smallest_normal * torch.finfo(values.dtype).eps  # the smallest subnormal
    error = (there_and_back(name, values).double() - values.double()).abs()
    assert bool((error <= step / 2 * (1 + 1e-4) + least).all())


# ---------------------------------------------------------------- QSGD


def exact_law(x, levels):
    """Step, lower level and probability of the upper one for each value, one bucket after the other."""
    rows = []
    for start in range(0, len(x), BUCKET):
        bucket = x[start : start + BUCKET].double().tolist()
        norm = math.sqrt(math.fsum(v * v for v in bucket))
        rows += [(norm / levels, math.floor(levels * abs(v) / norm), levels * abs(v) / norm % 1) for v in bucket]
    return tuple(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))


def long_vector(dtype):
    """Two buckets of different sizes and norms; one value is most of its bucket's norm."""
    x = torch.cat([rng.normal(1, BUCKET, dtype=dtype), 0.01 * rng.normal(2, 88, dtype=dtype)])
    x[3], x[-1], x[5] = -40.0, 0.0, 1e-6
    return x


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", ["qsgd8", "qsgd4", "qsgd2"])
def test_qsgd_takes_one_of_the_two_nearest_levels_with_the_sign_of_the_value(name, dtype):
    x = long_vector(dtype)
    step, low, _ = exact_law(x, LEVELS[name])
    for key in range(20):
        y = there_and_back(name, x, key).double()
        up = y.abs() / step - low
        assert bool((torch.minimum(up.abs(), (up - 1).abs()) < 1e-4).all())
        assert bool((y * x >= 0).all())


@pytest.mark.parametrize("name", ["qsgd8", "qsgd4", "qsgd2"])
def test_qsgd_is_unbiased_and_its_variance_is_that_of_its_law(name):
    """Hoeffding's bounds, each with a false-alarm rate of 1e-9: 2000 draws of 600 values.

    Of one value: all draws lie in an interval of one step, so its mean is off by less than 0.084 steps. Of all values
    in the direction of their signs: by less than 0.003 steps. The squared error lies between 0 and 1 squared steps.
    """
    x, draws = long_vector(torch.float32), 2000
    step, _, up = exact_law(x, LEVELS[name])
    y = torch.stack([there_and_back(name, x, key).double() for key in range(draws)])
    off = (y - x.double()) / step
    of_one = math.sqrt(math.log(2 * len(x) / 1e-9) / (2 * draws))
    of_all = math.sqrt(math.log(2 / 1e-9) / (2 * draws * len(x)))
    assert float(off.mean(0).abs().max()) < of_one < 0.084
    assert abs(float((off.mean(0) * x.sign()).mean())) < of_all < 0.003
    assert abs(float((off.square().mean(0) - up * (1 - up)).mean())) < of_all


@pytest.mark.parametrize("name", ["qsgd8", "qsgd4", "qsgd2"])
def test_the_variance_of_qsgd_is_below_the_papers_bound(name):
    """Lemma 3.1, for the exact law; the mean of 200 draws would exceed 1.2 times the bound rarely enough."""
    levels, x = LEVELS[name], rng.normal(4, BUCKET)
    step, _, up = exact_law(x, levels)
    bound = min(BUCKET / levels**2, math.sqrt(BUCKET) / levels) * float(x.double().square().sum())
    assert 0.05 * bound < float((step**2 * up * (1 - up)).sum()) < bound
    errors = [float((there_and_back(name, x, key) - x).double().square().sum()) for key in range(200)]
    assert sum(errors) / 200 < 1.2 * bound


@pytest.mark.parametrize("name", ["qsgd8", "qsgd4", "qsgd2"])
@pytest.mark.parametrize("value", [3.3, -1e-30, 0.0])
def test_qsgd_of_one_value_among_zeros_is_exact(name, value):
    x = torch.zeros(700)
    x[600] = value
    for key in range(20):
        assert torch.equal(there_and_back(name, x, key), x)
        assert torch.equal(there_and_back(name, x[600:601], key), x[600:601])


def test_qsgd_has_the_same_draws_for_the_same_key_and_needs_one():
    x, coding = rng.normal(1, 700), CODINGS["qsgd4"]
    assert coding.encode(x, 1) == coding.encode(x, 1) != coding.encode(x, 2)
    with pytest.raises(ValueError, match="qsgd4 is stochastic and needs a key"):
        coding.encode(x, None)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_norms_of_values_whose_squares_are_no_numbers(size):
    x = rng.normal(1, 100, dtype=torch.float64)
    assert torch.allclose(there_and_back("qsgd8", x * size, 2) / size, there_and_back("qsgd8", x, 2), rtol=1e-12)


# ---------------------------------------------------------------- sign


@pytest.mark.parametrize("dtype", BOTH)
def test_sign_is_the_mean_magnitude_with_each_sign(dtype):
    x = rng.normal(1, 1001, dtype=dtype) + 0.3
    y = there_and_back("sign", x)
    mean = math.fsum(abs(v) for v in x.tolist()) / 1001
    assert y.tolist() == pytest.approx([math.copysign(mean, v) for v in x.tolist()], rel=1e-7)
    square = float((y - x).double().square().sum())
    assert square == pytest.approx(float(x.double().square().sum()) - mean * mean * 1001, rel=1e-6)


def test_sign_of_some_numbers():
    x = torch.tensor([1.0, -2.0, 0.0, -0.0, -5.0])
    assert CODINGS["sign"].encode(x, None) == torch.tensor([1.6]).numpy().tobytes() + bytes([0b10010])
    assert there_and_back("sign", x).tolist() == pytest.approx([1.6, -1.6, 1.6, 1.6, -1.6])
    assert not CODINGS["sign"].keeps_zero


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_all_that_shares_its_scale(name, wrong):
    x = torch.full((BUCKET + 3,), 2.0)
    x[1] = wrong
    y = there_and_back(name, x, 1)
    shared = BUCKET if name.startswith("qsgd") else len(x)
    assert bool(y[:shared].isnan().all()) and bool(y[shared:].isfinite().all())


@pytest.mark.parametrize("name", LEVELS)
def test_a_level_beyond_the_last_is_refused(name):
    coding, n = CODINGS[name], 9
    most = 2 * LEVELS[name]
    data = bytearray(coding.encode(torch.ones(n), 1))
    assert coding.decode(memoryview(bytes(data)), n, torch.float32).shape == (n,)
    data[4] = 255
    with pytest.raises(ValueError, match=f"a level must be at most {most}, got {2 ** WIDTHS[name] - 1}"):
        coding.decode(memoryview(bytes(data)), n, torch.float32)
