"""The generator as a generator: statistics of its draws, its keys, and how the two relate; and of weak ones.

A check draws from fixed keys below a seed and returns a p-value, two-sided: a generator may also be too even. Where it
looks at several numbers it takes the smallest p-value times how many it looked at (Bonferroni), so a perfect generator
fails a check with probability FALSE_ALARM, at most, over the choice of seeds: 2e-5 for all twenty. That each check can
fail is shown by generators that are weak in a way people have met: each is put in the place of fedsim's own, and the
check finds it.

Source: Knuth 1997, "The Art of Computer Programming" 2, section 3.3; birthday spacings: Marsaglia 1985, "A current view
of random number generators", in the form of L'Ecuyer and Simard 2001, "On the performance of birthday spacings tests".
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch.func import vmap

from fedsim import rng

FALSE_ALARM = 1e-6
SEED = 2024
GOLDEN = rng._signed(0x9E3779B97F4A7C15)
ODD = rng._signed(0xD1342543DE82EF95)  # a good multiplier of a linear congruential generator, Steele and Vigna 2021
FAMILIES = ("consecutive keys", "children", "children of consecutive keys")
Mix = Callable[[torch.Tensor], torch.Tensor]
Check = Callable[[int], float]


# ---------------------------------------------------------------- p-values


def two_sided(below: float, above: float) -> float:
    """From P(X <= x) and P(X >= x)."""
    return min(1.0, 2 * min(float(below), float(above)))


def smallest(*p: float) -> float:
    return min(1.0, min(p) * len(p))


def chi_squared(statistic: float, freedom: int) -> float:
    return two_sided(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom))


def even(cells: torch.Tensor, number: int) -> float:
    """Chi-squared of how often each of ``number`` cells, all equally likely, was hit."""
    counts = np.bincount(cells.reshape(-1).numpy(), minlength=number)
    return chi_squared(stats.chisquare(counts).statistic, number - 1)


def poisson(count: int, mean: float) -> float:
    return two_sided(stats.poisson.cdf(count, mean), stats.poisson.sf(count - 1, mean))


def binomial(counts: torch.Tensor | np.ndarray, n: int, p: float) -> float:
    """Independent counts: the furthest one, their total, and whether their spread is what it should be."""
    counts = np.asarray(counts)
    size, total = counts.size, int(counts.sum())
    furthest = np.minimum(stats.binom.cdf(counts, n, p), stats.binom.sf(counts - 1, n, p)).min() * size
    return smallest(
        two_sided(furthest, 1.0),
        two_sided(stats.binom.cdf(total, n * size, p), stats.binom.sf(total - 1, n * size, p)),
        chi_squared(float(((counts - n * p) ** 2).sum() / (n * p * (1 - p))), size),
    )


def kolmogorov_smirnov(values: torch.Tensor, cdf: str) -> float:
    """By the limit of many values; the exact distribution takes seconds."""
    distance = stats.kstest(values.double().numpy(), cdf, method="asymp").statistic * len(values) ** 0.5
    return two_sided(stats.kstwobign.cdf(distance), stats.kstwobign.sf(distance))


def correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Standard normal score of the correlation of uniform draws, along the last axis."""
    return ((a - 0.5) * (b - 0.5)).sum(-1) * 12 / a.shape[-1] ** 0.5


def collisions(words: torch.Tensor) -> float:
    """64-bit words: equal ones, and equal upper and lower halves, of which there should be so many."""
    n, p = words.numel(), []
    for part, size in ((words, 2**64), (words >> 32, 2**32), (words & (2**32 - 1), 2**32)):
        ordered = np.sort(part.reshape(-1).numpy())
        p.append(poisson(int((ordered[1:] == ordered[:-1]).sum()), n - size * -np.expm1(n * np.log1p(-1 / size))))
    return smallest(*p)


# ---------------------------------------------------------------- draws of one key


def own(seed: int, *path: int | str) -> torch.Tensor:
    return rng.as_tensor(rng.fold(seed, "quality", *path))


def fills_bins(seed: int) -> float:
    """Chi-squared over 1,024 bins, n = 2^18: the uniform draws of either dtype, and the lowest 10 bits."""
    key = own(seed, "bins")
    single, double = (rng.uniform(key ^ i, 2**18, dtype=d) for i, d in enumerate((torch.float32, torch.float64)))
    cells = ((single * 1024).long(), (double * 1024).long(), rng.bits(key ^ 2, 2**18) & 1023)
    return smallest(*(even(cell, 1024) for cell in cells))


def follows_the_uniform_distribution(seed: int) -> float:
    """Kolmogorov-Smirnov, n = 2^16, either dtype."""
    draws = (rng.uniform(own(seed, "ks", str(d)), 2**16, dtype=d) for d in (torch.float32, torch.float64))
    return smallest(*(kolmogorov_smirnov(u, "uniform") for u in draws))


def follows_the_normal_distribution(seed: int) -> float:
    """Kolmogorov-Smirnov, sum of squares, and how many lie beyond 3; n = 2^18, either dtype."""
    p = []
    for dtype in (torch.float32, torch.float64):
        z = rng.normal(own(seed, "normal", str(dtype)), 2**18, dtype=dtype).double()
        beyond = np.array([int((z > 3).sum()), int((z < -3).sum())])
        p += [kolmogorov_smirnov(z, "norm"), chi_squared(float((z**2).sum()), len(z))]
        p.append(binomial(beyond, len(z), float(stats.norm.sf(3))))
    return smallest(*p)


def has_fair_bits(seed: int) -> float:
    """Each of 64 bits, n = 2^17 draws."""
    return binomial(ones(rng.bits(own(seed, "fair"), 2**17)), 2**17, 0.5)


def has_unrelated_bits(seed: int) -> float:
    """Squared correlations of the 2,016 pairs of bits, summed; n = 2^16 draws."""
    signs = torch.from_numpy(unpacked(rng.bits(own(seed, "pairs of bits"), 2**16))).float() * 2 - 1
    squares = (signs.T @ signs).square().double() / len(signs)
    return chi_squared(float(squares.triu(diagonal=1).sum()), 2016)


def has_unrelated_neighbours(seed: int) -> float:
    """Draws at a distance of 1, 2 and 7, upper and lower 4 bits: chi-squared over 16 x 16 cells, n = 2^16 pairs."""
    p = []
    for lag in (1, 2, 7):
        draws = rng.bits(own(seed, "neighbours", lag), 2**16 // lag, 2, lag)  # no draw is in two pairs
        p += pairs(draws[:, 0], draws[:, 1])
    return smallest(*p)


def has_no_serial_correlation(seed: int) -> float:
    """Squared correlations at lags 1 to 64, summed; n = 2^16."""
    u, n = rng.uniform(own(seed, "lags"), 2**16 + 64, dtype=torch.float64), 2**16
    scores = torch.stack([correlation(u[:n], u[lag : lag + n]) for lag in range(1, 65)])
    return chi_squared(float(scores.square().sum()), 64)


def has_poisson_birthday_spacings(seed: int) -> float:
    """m = 2^12 birthdays in a year of d = 2^34 days, 64 years: equal spacings, Poisson of mean 64 m^3 / (4 d) = 64.

    Birthdays are the upper and the lower 34 bits of the draws of one key, and of the first draw of many children.
    """
    year, children = (64, 2**12), family("children", own(seed, "birthdays"), 2**18)
    p = []
    for draws in (rng.bits(own(seed, "birthdays"), *year), first_draws(children).view(year)):
        for days in (draws >> 30, draws & (2**34 - 1)):
            spacings = np.sort(np.diff(np.sort(days.numpy())))
            p.append(poisson(int((spacings[:, 1:] == spacings[:, :-1]).sum()), 64.0))
    return smallest(*p)


def tosses_fair_coins(seed: int) -> float:
    """True in each of 64 blocks of 4,096 draws, for four probabilities."""
    p = (0.02, 0.3, 0.5, 0.97)
    tosses = [rng.bernoulli(own(seed, "coins", i), each, 64, 4096).sum(1) for i, each in enumerate(p)]
    return smallest(*(binomial(counts, 4096, each) for counts, each in zip(tosses, p, strict=True)))


def unpacked(words: torch.Tensor) -> np.ndarray:
    """Bits, lowest first: (n, 64) zeros and ones."""
    return np.unpackbits(words.contiguous().numpy().view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")


def ones(words: torch.Tensor) -> np.ndarray:
    """How many words have each of 64 bits."""
    return unpacked(words).sum(0, dtype=np.int64)


def pairs(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Chi-squared over 16 x 16 cells of the upper and of the lower 4 bits."""
    upper = (a >> 60 & 15) * 16 + (b >> 60 & 15)
    return [even(upper, 256), even((a & 15) * 16 + (b & 15), 256)]


# ---------------------------------------------------------------- draws of many keys


def family(kind: str, key: torch.Tensor, n: int) -> torch.Tensor:
    """n keys that stand next to each other in some way."""
    if kind == "children":
        return rng.fold_tensor(key, torch.arange(n))
    return key + torch.arange(n) if kind == "consecutive keys" else rng.fold_tensor(key + torch.arange(n), "x")


def first_draws(keys: torch.Tensor) -> torch.Tensor:
    return vmap(lambda key: rng.bits(key, 1))(keys)[:, 0]


def has_unrelated_families(seed: int) -> float:
    """First draws of the keys 2i and 2i + 1: chi-squared over 16 x 16 cells, n = 2^16 pairs, three families."""
    draws = [first_draws(family(kind, own(seed, kind), 2**17)).view(-1, 2) for kind in FAMILIES]
    return smallest(*itertools.chain.from_iterable(pairs(each[:, 0], each[:, 1]) for each in draws))


def has_unrelated_lanes(seed: int) -> float:
    """Correlations of draws 0, 1 of lane k with draws 0, 1 of lane k + 1, n = 2^16, three families, squared, summed."""
    total, n = 0.0, 2**16
    for kind in FAMILIES:
        u = vmap(lambda key: rng.uniform(key, 2, dtype=torch.float64))(family(kind, own(seed, kind), n + 1)).T
        scores = [correlation(u[i, :-1], u[j, 1:]) for i, j in itertools.product(range(2), repeat=2)]
        total += float(torch.stack(scores).square().sum())
    return chi_squared(total, 4 * len(FAMILIES))


def has_unrelated_generations(seed: int) -> float:
    """Correlations of a key's draws with its child's, and its child's child's, up to 8 later; n = 2^16; as above."""
    key, n = own(seed, "generations"), 2**16
    child = rng.fold_tensor(key, 0)
    parent, *younger = (rng.uniform(k, n + 8, dtype=torch.float64) for k in (key, child, rng.fold_tensor(child, 0)))
    scores = [correlation(parent[i : n + i], u[:n]) for i in range(9) for u in younger]
    return chi_squared(float(torch.stack(scores).square().sum()), 18)


def has_unrelated_keys_one_bit_apart(seed: int) -> float:
    """Squared correlations of the first draws of keys that differ in one bit, summed; n = 4,096 for each of 64 bits."""
    keys = rng.bits(own(seed, "one bit"), 4096)
    others = keys ^ (1 << torch.arange(64))[:, None]
    u, v = (vmap(lambda key: rng.uniform(key, 1, dtype=torch.float64))(k.reshape(-1)) for k in (keys, others))
    return chi_squared(float(correlation(u.view(1, 4096), v.view(64, 4096)).square().sum()), 64)


def avalanche(function: Mix, seed: int) -> float:
    """Flip each of 64 bits of 1,024 inputs: each of 64 output bits flips in half of them; 4,096 counts."""
    inputs = rng.bits(own(seed, "avalanche"), 1024)
    plain = function(inputs)
    counts = [ones(function(inputs ^ (torch.tensor(1) << bit)) ^ plain) for bit in range(64)]
    return binomial(np.stack(counts), 1024, 0.5)


def spreads_a_bit_of_the_key_over_the_draw(seed: int) -> float:
    """See :func:`avalanche`."""
    return avalanche(first_draws, seed)


def spreads_a_bit_of_the_key_over_its_child(seed: int) -> float:
    """See :func:`avalanche`."""
    return avalanche(lambda keys: rng.fold_tensor(keys, "child"), seed)


def spreads_a_bit_of_the_path_over_the_child(seed: int) -> float:
    """See :func:`avalanche`."""
    return avalanche(lambda numbers: rng.fold_tensor(own(seed, "parent"), numbers), seed)


# ---------------------------------------------------------------- keys


def keeps_paths_apart(seed: int) -> float:
    """Keys of 100 rounds x 200 clients x 50 steps, n = 10^6: no two equal (mean 3e-8); halves as often as by chance."""
    keys = own(seed, "grid")
    for name, count in (("round", 100), ("client", 200), ("step", 50)):
        keys = rng.fold_tensor(rng.fold_tensor(keys, name)[..., None], torch.arange(count))
    return collisions(keys)


def keeps_keys_and_draws_apart(seed: int) -> float:
    """A key's draws, its children, their draws and their children: n = 622,592 words, no two equal (mean 1e-8)."""
    key = own(seed, "family")
    children = family("children", key, 2**14)
    draws = vmap(lambda child: rng.bits(child, 32))(children)
    grandchildren = rng.fold_tensor(children[:256, None], torch.arange(256))
    return collisions(torch.cat([rng.bits(key, 2**14), children, draws.flatten(), grandchildren.flatten()[: 2**15]]))


# ---------------------------------------------------------------- orders and choices


def shuffles_evenly(seed: int) -> float:
    """The 24 orders of four, n = 24,000, and 12,000 padded; each of ten numbers in each of ten places, n = 20,000.

    Counts of number by place, whose rows and columns are fixed: (9/10) sum (O - E)^2 / E is chi-squared of 9^2.
    """
    keys = family("children", own(seed, "orders"), 24_000)
    code = torch.tensor([64, 16, 4, 1])
    of_code = torch.zeros(256, dtype=torch.int64)
    of_code[torch.tensor([tuple(order) for order in itertools.permutations(range(4))]) @ code] = torch.arange(24)
    alone = rng.permutations(keys, torch.full((24_000,), 4))
    padded = rng.permutations(rng.fold_tensor(keys, "b"), torch.tensor([4, 7]).repeat(12_000))[::2, :4]
    tens = rng.permutations(rng.fold_tensor(keys[:20_000], "c"), torch.full((20_000,), 10))
    counts = np.bincount((tens * 10 + torch.arange(10)).reshape(-1).numpy(), minlength=100)
    places = chi_squared(0.9 * stats.chisquare(counts).statistic, 81)
    return smallest(even(of_code[alone @ code], 24), even(of_code[padded @ code], 24), places)


def chooses_evenly(seed: int) -> float:
    """The 15 pairs of six, n = 15,000 keys; each of 20 numbers among 7 chosen, n = 20,000 keys."""
    number = torch.zeros(36, dtype=torch.int64)
    number[[6 * a + b for a, b in itertools.combinations(range(6), 2)]] = torch.arange(15)
    keys = family("children", own(seed, "choices"), 20_000)
    two = vmap(lambda key: rng.choice(key, 6, 2))(keys[:15_000])
    seven = vmap(lambda key: rng.choice(rng.fold_tensor(key, "b"), 20, 7))(keys)
    counts = np.bincount(seven.reshape(-1).numpy(), minlength=20)
    each = chi_squared(19 / 20 * stats.chisquare(counts).statistic / (1 - 7 / 20), 19)
    return smallest(even(number[two @ torch.tensor([6, 1])], 15), each)


# ---------------------------------------------------------------- fedsim's generator passes, weak ones do not

CHECKS: tuple[Check, ...] = (
    fills_bins,
    follows_the_uniform_distribution,
    follows_the_normal_distribution,
    has_fair_bits,
    has_unrelated_bits,
    has_unrelated_neighbours,
    has_no_serial_correlation,
    has_poisson_birthday_spacings,
    tosses_fair_coins,
    has_unrelated_families,
    has_unrelated_lanes,
    has_unrelated_generations,
    has_unrelated_keys_one_bit_apart,
    spreads_a_bit_of_the_key_over_the_draw,
    spreads_a_bit_of_the_key_over_its_child,
    spreads_a_bit_of_the_path_over_the_child,
    keeps_paths_apart,
    keeps_keys_and_draws_apart,
    shuffles_evenly,
    chooses_evenly,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_generator(check):
    assert check(SEED) > FALSE_ALARM


DRAWS, UNIFORM, BERNOULLI = rng._draws, rng.uniform, rng.bernoulli


def mixing(mix: Mix) -> dict[str, object]:
    return {"_mix_": lambda z, constants, *, last=True: mix(z)}


def drawing(change: Mix) -> dict[str, object]:
    return {"_draws": lambda key, n, *, last=True: change(DRAWS(key, n))}


def congruential(key: torch.Tensor, n: int, *, last: bool = True) -> torch.Tensor:
    """x -> ODD x + GOLDEN modulo 2^64, started at the key."""
    powers = torch.full((n,), ODD).cumprod(0)
    return key * powers + torch.cat([torch.ones(1, dtype=torch.int64), powers[:-1]]).cumsum(0) * GOLDEN


def lagged_fibonacci(key: torch.Tensor, n: int, *, last: bool = True) -> torch.Tensor:
    """x[i] = x[i - 24] + x[i - 55], Mitchell and Moore 1958, from 55 good draws."""
    x = torch.cat([DRAWS(key, min(n, 55)), torch.zeros(max(n - 55, 0), dtype=torch.int64)])
    for i in range(55, n, 24):
        x[i : i + 24] = x[i - 24 : min(i, n - 24)] + x[i - 55 : min(i - 31, n - 55)]
    return x


def xor_shifts(z: torch.Tensor) -> torch.Tensor:
    """Marsaglia 2003, "Xorshift RNGs"; linear over bits."""
    z = z ^ z << 13
    z = z ^ rng._shift(z, 7)
    return z ^ z << 17


def word(part: int | str | torch.Tensor) -> torch.Tensor:
    return part if isinstance(part, torch.Tensor) else torch.tensor(rng._signed(rng._word(part)))


def swapping(keys: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The shuffle that swaps each place with any place."""
    n, rows = int(sizes.max()), torch.arange(len(keys))
    order = torch.arange(n).repeat(len(keys), 1)
    partners = vmap(lambda key: rng.bits(key, n))(keys).remainder(sizes[:, None])
    for place in range(n):
        partner = torch.where(place < sizes, partners[:, place], place)
        order[rows, place], order[rows, partner] = order[rows, partner], order[rows, place].clone()
    return order


WEAK: dict[str, dict[str, object]] = {
    "a counter without mixing": mixing(lambda z: z),
    "one round of mixing": mixing(lambda z: (z ^ rng._shift(z, 30)) * ODD),
    "shifts alone": mixing(xor_shifts),
    "a linear congruential generator": {"_draws": congruential},
    "a lagged Fibonacci generator": {"_draws": lagged_fibonacci},
    "an unfair bit": drawing(lambda draws: draws | draws >> 23 & 1 << 17),
    "a repeated bit": drawing(lambda draws: draws & ~(1 << 17) | draws >> 23 & 1 << 17),
    "draws that repeat": drawing(lambda draws: torch.where(draws & 15 == 0, draws.roll(1, -1), draws)),
    "eight-bit fractions": {"uniform": lambda *args, **kw: (UNIFORM(*args, **kw) * 256).floor() / 256},
    "fractions to the power 1.05": {"uniform": lambda *args, **kw: UNIFORM(*args, **kw) ** 1.05},
    "twelve fractions for a normal": {"normal": lambda key, n, dtype: UNIFORM(key, 12, n, dtype=dtype).sum(0) - 6},
    "a coin of 1.02 p": {"bernoulli": lambda key, p, *shape: BERNOULLI(key, 1.02 * p, *shape)},
    "children on the parent's stream": {"fold_tensor": lambda key, part: key + (word(part) + 1) * GOLDEN},
    "children that are draws": {
        "fold_tensor": lambda key, part: rng._mix_(key + (word(part) + 1) * GOLDEN, rng._SPLITMIX)
    },
    "paths that commute": {"fold_tensor": lambda key, part: key + rng._mix_(word(part) + GOLDEN, rng._MURMUR)},
    "a swapping shuffle": {"permutations": swapping},
    "a run of numbers": {"choice": lambda key, n, k: ((rng.bits(key, 1) % n) + torch.arange(k)).remainder(n).sort()[0]},
}
FOUND: dict[str, tuple[Check, ...]] = {
    "a counter without mixing": CHECKS,
    "one round of mixing": (
        fills_bins,
        spreads_a_bit_of_the_key_over_the_draw,
        spreads_a_bit_of_the_key_over_its_child,
        spreads_a_bit_of_the_path_over_the_child,
    ),
    "shifts alone": (has_unrelated_keys_one_bit_apart, has_poisson_birthday_spacings, shuffles_evenly),
    "a linear congruential generator": (has_unrelated_neighbours, has_unrelated_families, has_unrelated_lanes),
    "a lagged Fibonacci generator": (has_poisson_birthday_spacings,),
    "an unfair bit": (has_fair_bits,),
    "a repeated bit": (has_unrelated_bits,),
    "draws that repeat": (has_unrelated_neighbours, has_no_serial_correlation),
    "eight-bit fractions": (fills_bins,),
    "fractions to the power 1.05": (fills_bins, follows_the_uniform_distribution, follows_the_normal_distribution),
    "twelve fractions for a normal": (follows_the_normal_distribution,),
    "a coin of 1.02 p": (tosses_fair_coins,),
    "children on the parent's stream": (has_unrelated_lanes, has_unrelated_generations, keeps_keys_and_draws_apart),
    "children that are draws": (keeps_keys_and_draws_apart,),
    "paths that commute": (spreads_a_bit_of_the_key_over_its_child, keeps_paths_apart),
    "a swapping shuffle": (shuffles_evenly,),
    "a run of numbers": (chooses_evenly,),
}


@pytest.mark.parametrize(
    ("weak", "check"),
    [(weak, check) for weak, checks in FOUND.items() for check in checks],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_weak_generator_is_found(weak, check, monkeypatch):
    for name, part in WEAK[weak].items():
        monkeypatch.setattr(rng, name, part)
    assert check(SEED) < FALSE_ALARM
