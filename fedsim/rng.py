"""Keys and draws: the only source of randomness in fedsim.

A *key* is 64 bits, as an ``int`` in Python code and as an int64 tensor of any shape in tensor code. It is made from
a path, ``fold(seed, "round", 3, "client", 17, "step", 40)``, and a draw is a pure function of a key and a counter, so
it is the same under ``torch.func.vmap``, in a worker process, after a resume, and, for integer and uniform draws, on
any other machine. :func:`normal` needs a logarithm and a cosine, which torch computes by other instructions on other
processors; see there.

Draw ``i`` of key ``k`` is output ``i`` of the SplitMix64 generator started at ``k``: ``mix(k + (i + 1) * GOLDEN)``.
Keys are folded with another finaliser (Murmur3's), so that a folded key is never one of its parent's draws.
Nothing here is secret or unpredictable: cryptography takes its randomness from ``secrets``.

Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", OOPSLA, figure 17 (mix and GOLDEN).
    Differs: keys are folded along a path; the published ``split`` draws a new increment instead.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_SPLITMIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), 31)  # shift, multiplier; shift, multiplier; shift
_MURMUR = ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), 33)
_Constants = tuple[tuple[int, int], tuple[int, int], int]


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - (1 << 64) if bits >> 63 else bits


def _mix_int(z: int, constants: _Constants) -> int:
    (s1, m1), (s2, m2), s3 = constants
    z = ((z ^ (z >> s1)) * m1) & _MASK
    z = ((z ^ (z >> s2)) * m2) & _MASK
    return z ^ (z >> s3)


def _mix_(z: Tensor, constants: _Constants, *, last: bool = True) -> Tensor:
    """Mix ``z`` in place; pass a fresh tensor. The last step leaves the top bits, as many as its shift, as they are."""
    (s1, m1), (s2, m2), s3 = constants
    z.bitwise_xor_(_shift(z, s1)).mul_(_signed(m1))
    z.bitwise_xor_(_shift(z, s2)).mul_(_signed(m2))
    return z.bitwise_xor_(_shift(z, s3)) if last else z


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift; torch's ``>>`` on int64 copies the sign bit."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


def _draws(key: Tensor | int, n: int, *, last: bool = True) -> Tensor:
    """The first ``n`` draws, along the axis against which ``key`` broadcasts; with or without the mix's last step."""
    key = as_tensor(key) if isinstance(key, int) else key
    counter = torch.arange(1, n + 1, dtype=torch.int64, device=key.device)
    return _mix_(torch.add(key, counter, alpha=_signed(_GOLDEN)), _SPLITMIX, last=last)


def _word(part: int | str) -> int:
    """64 bits for one element of a path."""
    return _named(part) if isinstance(part, str) else int(part) & _MASK


@lru_cache(maxsize=1024)
def _named(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def fold(key: int, *path: int | str) -> int:
    """The key at ``path`` below ``key``.

    ``fold(k, a, b) = fold(fold(k, a), b)``; each step is ``mix(k ^ mix(word(a) + GOLDEN))`` modulo 2^64.

    Args:
        key: a key, or a run's seed (any integer; taken modulo 2^64).
        path: integers (modulo 2^64) and names. Order matters.

    Returns:
        A key in [0, 2^64).

    >>> fold(7, "round", 3) == fold(fold(7, "round"), 3)
    True
    """
    for part in path:
        key = _mix_int((key & _MASK) ^ _mix_int((_word(part) + _GOLDEN) & _MASK, _MURMUR), _MURMUR)
    return key & _MASK


def fold_tensor(key: Tensor, part: int | str | Tensor) -> Tensor:
    """One step of :func:`fold` in tensor arithmetic: for the keys of many clients at once.

    Args:
        key: int64 tensor, any shape.
        part: a name, an integer, or an int64 tensor that broadcasts against ``key``, on its device.

    Returns:
        Int64 tensor of the broadcast shape, bit-equal to ``fold`` of each pair.
    """
    if isinstance(part, Tensor):
        return _mix_(key ^ _mix_(part + _signed(_GOLDEN), _MURMUR), _MURMUR)
    return _mix_(key ^ _signed(_mix_int((_word(part) + _GOLDEN) & _MASK, _MURMUR)), _MURMUR)


def as_tensor(key: int, device: torch.device | str = "cpu") -> Tensor:
    """The key as an int64 tensor of shape ()."""
    return torch.tensor(_signed(key & _MASK), dtype=torch.int64, device=device)


def bits(key: Tensor | int, *shape: int) -> Tensor:
    """64 random bits per element.

    Args:
        key: int64 tensor of shape () (batch it with ``torch.func.vmap``), or an ``int`` key.
        shape: of the result. Element ``i`` in row-major order is draw ``i``, whatever the shape.

    Returns:
        Int64 tensor of ``shape``, uniform over all 2^64 values.
    """
    return _draws(key, math.prod(shape)).reshape(shape)


def uniform(key: Tensor | int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform on [0, 1): the top 24 (float32) or 53 (float64) bits of each draw, over 2^24 or 2^53.

    Args:
        key: as in :func:`bits`.
        shape: of the result.
        dtype: float32 or float64.

    Returns:
        Tensor of ``shape``; never 1.0.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be float32 or float64, got {dtype}")
    kept = 24 if dtype == torch.float32 else 53
    draws = _draws(key, math.prod(shape), last=kept > _SPLITMIX[2])
    return _shift(draws, 64 - kept).to(dtype).mul_(2.0**-kept).reshape(shape)


def uniforms(keys: Tensor, n: int) -> Tensor:
    """The first ``n`` float32 draws of :func:`uniform` for each key, without ``torch.func.vmap``.

    Args:
        keys: int64 (c,).
        n: >= 0.

    Returns:
        Float32 tensor (c, n), each row bit-equal to ``uniform`` of its key.
    """
    return _shift(_draws(keys[:, None], n, last=False), 40).to(torch.float32).mul_(2.0**-24)


def bernoulli(key: Tensor | int, p: float | Tensor, *shape: int) -> Tensor:
    """Boolean tensor of ``shape``, true with probability ``p`` in [0, 1] (exact to 2^-24)."""
    return uniform(key, *shape) < p


def coins(key: Tensor | int, p: Tensor, *shape: int) -> Tensor:
    """As :func:`bernoulli`, in 55 to 75 % of the time: two of each draw, and exact to 2^-32.

    Coin i depends on the key and on i alone, so rows added at the end of a batch change no other row.

    Args:
        key: as in :func:`bits`.
        p: probability of true, a float64 tensor () in [0, 1).
        shape: of the result.
    """
    n = math.prod(shape)
    below = (p * 2.0**32 - 2.0**31).floor().to(torch.int32)
    return _draws(key, (n + 1) // 2).view(torch.int32)[:n].reshape(shape) < below


def normal(key: Tensor | int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws by Box-Muller: ``sqrt(-2 ln(1 - u)) cos(2 pi v)``.

    Computed in float64 and rounded, so the tails reach 8.5 standard deviations in either dtype.

    On another kind of processor the last place of a float64 draw may differ: of 100,003 draws, 3,828 differed between
    torch's AVX2 and its portable code, by at most 4.4e-16. Rounded to float32 all 100,003 were equal; a draw next to
    the middle of two float32 numbers need not be.

    Args:
        key: as in :func:`bits`.
        shape: of the result.
        dtype: float32 or float64.

    Returns:
        Tensor of ``shape``.
    """
    u = uniform(key, 2, *shape, dtype=torch.float64)
    return (torch.sqrt(-2.0 * torch.log1p(-u[0])) * torch.cos(2.0 * math.pi * u[1])).to(dtype)


def noise(key: Tensor | int, *shape: int) -> Tensor:
    """Standard normal draws for layers, in float32: three times as fast as :func:`normal`, and less fine.

    Draw i depends on the key and on i alone, so rows added at the end of a batch change no other row, as they would in
    :func:`normal`. Both numbers of a Box-Muller pair are 24 bits of one draw; no value is beyond 5.77.

    Args, Returns: as for :func:`normal`.
    """
    draws = _draws(key, math.prod(shape))
    u = _shift(draws, 40).add_(1).to(torch.float32).mul_(2.0**-24)  # in (0, 1]
    v = draws.bitwise_and_((1 << 24) - 1).to(torch.float32).mul_(2.0**-24 * 2.0 * math.pi)
    return u.log_().mul_(-2.0).sqrt_().mul_(v.cos_()).reshape(shape)


GAMMA_TRIES = 8  # each is taken with a probability above 0.95; all fail in one draw of 2.5 * 10^10 or rarer


def log_gammas(key: Tensor | int, a: Sequence[float], *shape: int) -> Tensor:
    """Logarithms of draws from gamma distributions of scale 1.

    For a >= 1, ``d * v`` with ``d = a - 1/3``, ``v = (1 + x / sqrt(9 d))^3`` and x standard normal is taken if
    ``log u < x^2 / 2 + d - d v + d log v``; of a fixed number of tries the first that is, else d. For a < 1 it is a
    draw for a + 1, times ``u^(1/a)``: hence the logarithm, which cannot underflow.

    Args:
        key: as in :func:`bits`.
        a: shape parameters, > 0.
        shape: of the draws for each.

    Returns:
        Float64 tensor (*shape, len(a)).

    Raises:
        ValueError: one of a is not positive.

    Source: Marsaglia, Tsang 2000, "A simple method for generating gamma variables", ACM TOMS 26, sections 2 and 6.
        Differs: a fixed number of tries, for ``torch.func.vmap``.
    """
    if not all(each > 0 for each in a):
        raise ValueError(f"a must be > 0, got {a}")
    x = normal(_below(key, 0), GAMMA_TRIES, *shape, len(a), dtype=torch.float64)
    u = uniform(_below(key, 1), GAMMA_TRIES + 1, *shape, len(a), dtype=torch.float64)
    of, log_u = torch.tensor(a, dtype=torch.float64, device=x.device), torch.log1p(-u)
    d = of + (of < 1) - 1 / 3
    root = 1 + x / torch.sqrt(9 * d)
    log_v = 3 * torch.log(root.clamp(min=torch.finfo(torch.float64).tiny))
    taken = (root > 0) & (log_u[:-1] < x.square() / 2 + d - d * log_v.exp() + d * log_v)
    first = taken & (taken.cumsum(0) == 1)
    return torch.log(d) + torch.where(first, log_v, 0.0).sum(0) + torch.where(of < 1, log_u[-1] / of, 0.0)


def beta(key: Tensor | int, a: float, b: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws from Beta(a, b): ``x / (x + y)`` of two gamma draws, by their logarithms, so that tiny a and b work too.

    Args:
        key: as in :func:`bits`.
        a, b: > 0.
        shape: of the result.
        dtype: computed in float64 and rounded to this, so that draws next to 0 or 1 can be 0 or 1.

    Returns:
        Tensor of ``shape`` in [0, 1].

    Raises:
        ValueError: a or b is not positive.
    """
    x, y = log_gammas(key, (a, b), *shape).unbind(-1)
    return torch.sigmoid(x - y).to(dtype)


def _below(key: Tensor | int, part: int) -> Tensor | int:
    return fold_tensor(key, part) if isinstance(key, Tensor) else fold(key, part)


def permutation(key: Tensor | int, n: int) -> Tensor:
    """A uniform random order of ``range(n)``: int64 tensor (n,). Sorts 64-bit draws; ties have odds n^2 / 2^65."""
    return torch.argsort(bits(key, n), stable=True)


def permutations(keys: Tensor, sizes: Tensor) -> Tensor:
    """One :func:`permutation` per key, each of its own length, sorted together.

    Args:
        keys: int64 (c,), c >= 1.
        sizes: int64 (c,), each >= 1, on the device of ``keys``.

    Returns:
        Int64 (c, sizes.max()). The first ``sizes[i]`` entries of row i are ``permutation(keys[i], sizes[i])``; the
        others are 0, which is a valid index.

    Raises:
        ValueError: a size below 1.
    """
    shortest, longest = (int(end) for end in torch.aminmax(sizes))
    if shortest < 1:
        raise ValueError(f"sizes must be >= 1, got {shortest}")
    draws = _draws(keys[:, None], longest)
    if shortest == longest:
        return torch.argsort(draws, stable=True)
    absent = torch.arange(longest, device=keys.device) >= sizes[:, None]
    # A real draw can equal the filling. It stands before it, and a stable sort keeps it there.
    order = torch.argsort(draws.masked_fill_(absent, torch.iinfo(torch.int64).max), stable=True)
    return order.masked_fill_(absent, 0)


def choice(key: Tensor | int, n: int, k: int) -> Tensor:
    """``k`` of ``range(n)`` without replacement, ascending: int64 tensor (k,).

    Raises:
        ValueError: k is not in [0, n].
    """
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, {n}], got {k}")
    return torch.sort(torch.topk(bits(key, n), k, largest=False, sorted=False).indices).values


@contextlib.contextmanager
def torch_seeded(key: int) -> Iterator[None]:
    """Let code that draws from torch's global generator (a constructor, a user's forward) draw from ``key`` instead.

    The global state is put back on leaving, so nothing outside sees that anything was drawn. This is the one place
    where fedsim touches that generator; such code gives it no other way in. The generator takes the lower 32 bits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(_signed(key & _MASK)).get_state())
        yield
