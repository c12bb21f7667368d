"""Codings of values: one vector of floating-point numbers to bytes of a known length, and back.

A coding knows nothing of names, shapes and zeros: :mod:`fedsim.wire.sparse` says which entries are sent, and a coding
how each of them is. None needs a key to be read.

A coding with a scale reads a NaN or an infinity, and all that shares its scale, as NaN: whoever checks results for
finite numbers finds the same as without the coding. Scales are float64 for float64 values, and float32 for all others.
"""

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.wire.bits import pack, packed_size, unpack

BUCKET = 512  # values that share one norm in QSGD


@dataclass(frozen=True)
class Coding:
    """How values are written.

    name: its key in :data:`CODINGS`.
    encode: values (n,) of any floating dtype, and a key (None: not stochastic) -> bytes.
    decode: bytes of the right length, n and dtype -> values (n,). ValueError: a code that means nothing.
    size: n and dtype -> how many bytes ``encode`` returns.
    keeps_zero: 0.0 is read as 0.0, so a vector with zeros may be coded whole.
    stochastic: ``encode`` needs a key; ``decode(encode(x))`` has the mean x.
    """

    name: str
    encode: Callable[[Tensor, int | None], bytes]
    decode: Callable[[memoryview, int, torch.dtype], Tensor]
    size: Callable[[int, torch.dtype], int]
    keeps_zero: bool = True
    stochastic: bool = False


def to_bytes(values: Tensor) -> bytes:
    """The bits of a vector of any dtype, as they are."""
    return values.view(torch.uint8).numpy().tobytes() if len(values) else b""


def of_bytes(data: memoryview, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`to_bytes`, copied."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.zeros(0, dtype=dtype)


EXACT = Coding(
    "exact",
    encode=lambda values, key: to_bytes(values),
    decode=lambda data, n, dtype: of_bytes(data, dtype),
    size=lambda n, dtype: n * dtype.itemsize,
)


def cast(name: str, to: torch.dtype) -> Coding:
    """Values rounded to a shorter floating dtype.

    float16: ``|y - x| <= 2^-11 |x|`` from 2^-14 (below that 2^-25) up to 65,504, and beyond 65,520 infinite.
    bfloat16: ``|y - x| <= 2^-8 |x|`` over the range of float32.
    """
    return Coding(
        name,
        encode=lambda values, key: to_bytes(values.to(to)),
        decode=lambda data, n, dtype: of_bytes(data, to).to(dtype),
        size=lambda n, dtype: n * to.itemsize,
    )


def uniform(name: str, levels: int) -> Coding:
    """The nearest of 2 L + 1 equally spaced numbers: ``y = max|x| round(L x / max|x|) / L``.

    Symmetric, so that 0 stays 0 (an affine grid from min to max need not hold it); nearest, so that the error is the
    smallest there is for the grid: ``|y - x| <= max|x| / (2 L)``, and no key is needed. Rounding in the arithmetic
    adds some units in the last place of max|x|. Decoded values are coded to themselves.

    Args:
        name: of the coding.
        levels: L, 1 to 127: a value takes ``ceil(log2(2 L + 1))`` bits.
    """

    def encode(values: Tensor, key: int | None) -> bytes:
        x = values.to(_working(values.dtype))
        scale = x.abs().amax() if len(x) else x.sum()
        return _write(scale[None], _ratio(x, scale).mul_(levels).round_(), levels)

    def decode(data: memoryview, n: int, dtype: torch.dtype) -> Tensor:
        scale, share = _read(data, 1, n, dtype, levels)
        return share.mul_(scale).to(dtype)

    return Coding(name, encode, decode, lambda n, dtype: _size(n, 1, dtype, _width(levels)))


def qsgd(name: str, levels: int) -> Coding:
    """QSGD: ``y_i = |v| sgn(v_i) xi_i``, the Euclidean norm of v times a random multiple of 1/s, unbiased.

    With l = floor(s |v_i| / |v|), xi_i is (l + 1) / s with probability ``s |v_i| / |v| - l`` and else l / s. So
    E y = v, ``|y_i - v_i| < |v| / s``, and ``E |y - v|^2 <= min(n / s^2, sqrt(n) / s) |v|^2``. Probabilities are exact
    to about s 2^-24. n is the number of values that share a norm, at most 512.

    Args:
        name: of the coding.
        levels: s, 1 to 127: a value takes ``ceil(log2(2 s + 1))`` bits.

    Source: Alistarh et al. 2017, "QSGD: Communication-efficient SGD via gradient quantization and encoding", NeurIPS,
        section 3.1 and lemma 3.1. Differs: v is not a whole tensor but each run of 512 of its values (the paper
        buckets in its experiments, too), for the variance grows with sqrt(n); codes of fixed width, not Elias codes.
    """

    def encode(values: Tensor, key: int | None) -> bytes:
        if key is None:
            raise ValueError(f"{name} is stochastic and needs a key")
        x = values.to(_working(values.dtype))
        norm = _norms(x)
        share = _ratio(x, _each(norm, len(x))).clamp_(-1, 1).mul_(levels)
        low = share.abs().floor()
        low += rng.uniform(key, len(x)) < share.abs() - low
        return _write(norm, low.copysign_(share), levels)

    def decode(data: memoryview, n: int, dtype: torch.dtype) -> Tensor:
        norm, share = _read(data, -(-n // BUCKET), n, dtype, levels)
        return share.mul_(_each(norm, n)).to(dtype)

    return Coding(
        name, encode, decode, lambda n, dtype: _size(n, -(-n // BUCKET), dtype, _width(levels)), stochastic=True
    )


def sign(name: str) -> Coding:
    """EF-signSGD's coding: ``y = (|x|_1 / n) sgn(x)``, the mean of all magnitudes with each value's sign; sgn(0) is +1.

    One bit for each value. Biased, so it wants error feedback: ``|y - x|^2 = |x|^2 - |x|_1^2 / n``.

    Source: Karimireddy et al. 2019, "Error feedback fixes SignSGD and other gradient compression schemes", ICML,
        algorithm 1 (EF-signSGD), the line of Delta_t. Differs: for each tensor by itself; zeros that are not sent do
        not count in n.
    """

    def encode(values: Tensor, key: int | None) -> bytes:
        size = values.double().abs()
        least = size.amin() if len(size) else size.sum()
        mean = least + (size - least).mean() if len(size) else least  # exact if all are equal, so y is coded to itself
        return _scales(mean.to(_working(values.dtype))[None]) + pack((values < 0).numpy().view(np.uint8), 1)

    def decode(data: memoryview, n: int, dtype: torch.dtype) -> Tensor:
        width = _working(dtype).itemsize
        mean = of_bytes(data[:width], _working(dtype)).to(dtype)
        return torch.where(torch.from_numpy(unpack(data[width:], n, 1)).bool(), -mean, mean)

    return Coding(name, encode, decode, lambda n, dtype: _size(n, 1, dtype, width=1), keeps_zero=False)


def _working(dtype: torch.dtype) -> torch.dtype:
    """Of scales, and of the arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale == 0, 1.0, scale)


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each bucket; the largest value is divided out first, for squares over- and underflow."""
    buckets = torch.nn.functional.pad(x, (0, -len(x) % BUCKET)).view(-1, BUCKET)
    largest = buckets.abs().amax(1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(_ratio(buckets, largest), dim=1)
    return norms.mul_(largest[:, 0])


def _each(norm: Tensor, n: int) -> Tensor:
    """The norm of each value's bucket."""
    return norm.repeat_interleave(BUCKET)[:n]


def _width(levels: int) -> int:
    return (2 * levels).bit_length()


def _size(n: int, scales: int, dtype: torch.dtype, width: int) -> int:
    return scales * _working(dtype).itemsize + packed_size(n, width)


def _scales(scale: Tensor) -> bytes:
    return to_bytes(torch.where(torch.isfinite(scale), scale, torch.nan))


def _write(scale: Tensor, level: Tensor, levels: int) -> bytes:
    """Scales, and whole numbers from -levels to levels."""
    codes = level.nan_to_num_(0.0).add_(levels).to(torch.uint8)
    return _scales(scale) + pack(codes.numpy(), _width(levels))


def _read(data: memoryview, scales: int, n: int, dtype: torch.dtype, levels: int) -> tuple[Tensor, Tensor]:
    """The scales, and the levels over their number: in [-1, 1]."""
    start = scales * _working(dtype).itemsize
    codes = unpack(data[start:], n, _width(levels))
    if n and int(codes.max()) > 2 * levels:
        raise ValueError(f"a level must be at most {2 * levels}, got {codes.max()}")
    scale = of_bytes(data[:start], _working(dtype))
    level = torch.from_numpy(codes.astype(np.float64 if scale.dtype == torch.float64 else np.float32))
    return scale, level.sub_(levels).div_(levels)


CODINGS: Mapping[str, Coding] = types.MappingProxyType(
    {
        coding.name: coding
        for coding in (
            EXACT,
            cast("fp16", torch.float16),
            cast("bf16", torch.bfloat16),
            uniform("uniform8", 127),
            uniform("uniform4", 7),
            qsgd("qsgd8", 127),
            qsgd("qsgd4", 7),
            qsgd("qsgd2", 1),
            sign("sign"),
        )
    }
)
