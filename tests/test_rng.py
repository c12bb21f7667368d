"""Keys and draws against a slow SplitMix64, published outputs, and the distributions they claim.

Statistical tests have fixed keys; each says how many draws it takes, and fails a perfect generator with a probability
of at most 1e-6 over the choice of keys.
"""

import ast
import hashlib
import itertools
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.func import vmap

import fedsim
from fedsim import rng

FALSE_ALARM = 1e-6
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
keys = st.integers(0, MASK)
parts = st.one_of(st.integers(-(2**70), 2**70), st.text(max_size=8))


# ---------------------------------------------------------------- the slow way


def slow_splitmix(seed: int, count: int) -> list[int]:
    """The generator as published: a state that grows by GOLDEN, mixed on the way out."""
    state, out = seed, []
    for _ in range(count):
        state = (state + GOLDEN) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def slow_murmur(z: int) -> int:
    """MurmurHash3's fmix64."""
    z = ((z ^ (z >> 33)) * 0xFF51AFD7ED558CCD) % 2**64
    z = ((z ^ (z >> 33)) * 0xC4CEB9FE1A85EC53) % 2**64
    return z ^ (z >> 33)


def slow_fold(key: int, *path: int | str) -> int:
    for part in path:
        if isinstance(part, str):
            (word,) = struct.unpack("<Q", hashlib.blake2b(part.encode(), digest_size=8).digest())
        else:
            word = part % 2**64
        key = slow_murmur((key % 2**64) ^ slow_murmur((word + GOLDEN) % 2**64))
    return key % 2**64


def unsigned(tensor: torch.Tensor) -> list[int]:
    return [int(value) % 2**64 for value in tensor.reshape(-1)]


def key_tensor(values: list[int]) -> torch.Tensor:
    return torch.stack([rng.as_tensor(value) for value in values])


def test_draws_are_the_published_outputs_of_splitmix64():
    """Seed 1234567, Rosetta Code, "Pseudo-random numbers/Splitmix64"; the slow generator is held to them too."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert slow_splitmix(1234567, 5) == published
    assert unsigned(rng.bits(1234567, 5)) == published


def test_keys_are_folded_with_the_published_finaliser_of_murmur3():
    """fmix64(1), as given in many ports of MurmurHash3; fold(0, a) is fmix64 applied twice to a + GOLDEN."""
    assert slow_murmur(1) == 0xB456BCFC34C2CB2C
    assert rng.fold(0, (1 - GOLDEN) % 2**64) == slow_murmur(0xB456BCFC34C2CB2C)


def test_a_folded_key_never_changes_between_versions():
    """Run folders hold seeds, not draws: another value here would break every resume."""
    assert rng.fold(7, "round", 3, "client", 17, "step", 40) == 18061366378867632815
    assert rng.fold(-1) == MASK


@given(keys, st.integers(1, 20))
@settings(deadline=None, max_examples=50)
def test_bits_are_those_of_the_slow_generator(key, count):
    assert unsigned(rng.bits(key, count)) == slow_splitmix(key, count)


@given(st.integers(-(2**70), 2**70), st.lists(parts, max_size=4))
@settings(deadline=None, max_examples=100)
def test_fold_is_the_slow_fold(key, path):
    assert rng.fold(key, *path) == slow_fold(key, *path)


@given(keys, parts)
@settings(deadline=None, max_examples=100)
def test_fold_in_tensor_arithmetic_gives_the_same_key(key, part):
    folded = rng.fold_tensor(rng.as_tensor(key), part)
    assert unsigned(folded) == [rng.fold(key, part)]
    if isinstance(part, int):
        assert torch.equal(rng.fold_tensor(rng.as_tensor(key), rng.as_tensor(part)), folded)


def test_fold_tensor_broadcasts_keys_against_parts():
    many, numbers = [3, 2**63 + 5, MASK], [0, -1, 17, 2**40]
    folded = rng.fold_tensor(key_tensor(many)[:, None], torch.tensor(numbers)[None, :])
    assert unsigned(folded) == [slow_fold(k, n) for k in many for n in numbers]


def test_order_and_kind_of_path_elements_matter():
    paths = [("a", "b"), ("b", "a"), ("ab",), ("a", 1), ("a", "1"), (1, "a"), ("a",), ("",), (0,), ()]
    assert len({rng.fold(5, *path) for path in paths}) == len(paths)


# ---------------------------------------------------------------- shapes, types, lanes


@given(keys, st.lists(st.integers(0, 5), max_size=3))
@settings(deadline=None, max_examples=50)
def test_element_i_is_draw_i_whatever_the_shape(key, shape):
    n = math.prod(shape)
    assert torch.equal(rng.bits(key, *shape), rng.bits(key, n + 3)[:n].reshape(shape))


@given(keys)
@settings(deadline=None, max_examples=50)
def test_uniform_is_the_top_bits_of_each_draw(key):
    draws = slow_splitmix(key, 7)
    assert rng.uniform(key, 7).tolist() == [(d >> 40) / 2**24 for d in draws]
    assert rng.uniform(key, 7, dtype=torch.float64).tolist() == [(d >> 11) / 2**53 for d in draws]


def test_uniform_refuses_other_dtypes():
    with pytest.raises(ValueError, match=r"dtype must be float32 or float64, got torch\.float16"):
        rng.uniform(1, 2, dtype=torch.float16)


@pytest.mark.parametrize("size", [1, 3, 8, 17, 64, 101])
@pytest.mark.parametrize(
    "draw",
    [
        rng.bits,
        rng.uniform,
        rng.normal,
        lambda key, n: rng.uniform(key, n, dtype=torch.float64),
        lambda key, n: rng.normal(key, n, dtype=torch.float64),
        lambda key, n: rng.bernoulli(key, 0.3, n),
        rng.permutation,
        lambda key, n: rng.choice(key, n, (n + 1) // 2),
    ],
    ids=["bits", "uniform", "normal", "uniform64", "normal64", "bernoulli", "permutation", "choice"],
)
def test_a_lane_of_vmap_draws_what_it_would_draw_alone(draw, size):
    many = [rng.fold(size, lane) for lane in range(13)]
    together = vmap(lambda key: draw(key, size))(key_tensor(many))
    for lane, key in enumerate(many):
        assert torch.equal(together[lane], draw(key, size))
        assert torch.equal(together[lane], draw(rng.as_tensor(key), size))


def test_permutation_and_choice_hold_each_number_once():
    assert sorted(rng.permutation(3, 1000).tolist()) == list(range(1000))
    chosen = rng.choice(3, 1000, 400).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == 400 and set(chosen) <= set(range(1000))
    assert rng.permutation(3, 0).tolist() == [] and rng.choice(3, 5, 0).tolist() == []
    assert rng.choice(3, 5, 5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("k", [-1, 6])
def test_choice_refuses_more_than_there_are(k):
    with pytest.raises(ValueError, match=rf"k must be in \[0, 5\], got {k}"):
        rng.choice(1, 5, k)


# ---------------------------------------------------------------- distributions


def test_uniform_draws_fill_bins_evenly():
    """Chi-squared over 256 bins, n = 2^18 draws of one key."""
    counts = np.bincount((rng.uniform(11, 2**18) * 256).long().numpy(), minlength=256)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_uniform_draws_follow_the_uniform_distribution():
    """Kolmogorov-Smirnov, n = 100,000, both dtypes."""
    for dtype in (torch.float32, torch.float64):
        assert stats.kstest(rng.uniform(12, 100_000, dtype=dtype).double().numpy(), "uniform").pvalue > FALSE_ALARM / 2


def test_normal_draws_follow_the_normal_distribution():
    """Kolmogorov-Smirnov, n = 100,000, both dtypes; moments and the tail beyond 3 by exact tests."""
    for dtype in (torch.float32, torch.float64):
        z = rng.normal(13, 100_000, dtype=dtype).double().numpy()
        assert stats.kstest(z, "norm").pvalue > FALSE_ALARM / 8
        beyond = int((np.abs(z) > 3).sum())
        assert stats.binomtest(beyond, len(z), 2 * stats.norm.sf(3)).pvalue > FALSE_ALARM / 8
        squares = float((z**2).sum())
        assert FALSE_ALARM / 16 < stats.chi2.cdf(squares, len(z)) < 1 - FALSE_ALARM / 16


def test_normal_is_box_muller_of_the_first_and_second_half_of_the_draws():
    draws = slow_splitmix(14, 10)
    u, v = [d / 2**64 for d in draws[:5]], [d / 2**64 for d in draws[5:]]
    expected = [math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b) for a, b in zip(u, v, strict=True)]
    assert np.allclose(rng.normal(14, 5, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


def test_every_bit_of_a_draw_is_fair():
    """Binomial test of each of 64 bits, n = 2^16 draws, 1e-6 over all bits together."""
    draws = rng.bits(15, 2**16)
    for position in range(64):
        ones = int(((draws >> position) & 1).sum())
        assert stats.binomtest(ones, 2**16, 0.5).pvalue > FALSE_ALARM / 64


def test_bernoulli_is_true_with_its_probability():
    """Exact binomial test, n = 50,000 for each of four probabilities; 0 and 1 are certain."""
    p = torch.tensor([0.0, 0.001, 0.3, 0.97, 1.0])
    hits = vmap(lambda key: rng.bernoulli(key, p, 5))(key_tensor([rng.fold(16, i) for i in range(50_000)])).sum(0)
    assert hits[0] == 0 and hits[4] == 50_000
    for hit, probability in zip(hits[1:4].tolist(), p[1:4].tolist(), strict=True):
        assert stats.binomtest(hit, 50_000, probability).pvalue > FALSE_ALARM / 3


def correlation_p(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(stats.pearsonr(a.numpy(), b.numpy()).pvalue)


def family(kind: str, n: int) -> torch.Tensor:
    """n keys that stand next to each other in some way."""
    if kind == "consecutive integers":
        return torch.arange(n)
    parent = rng.as_tensor(rng.fold(17, "round", 1))
    return rng.fold_tensor(parent, torch.arange(n)) if kind == "children" else rng.fold_tensor(torch.arange(n), "x")


@pytest.mark.parametrize("kind", ["consecutive integers", "children", "children of consecutive parents"])
def test_neighbouring_keys_give_unrelated_draws(kind):
    """Pearson correlation of the first draw of key i with that of key i + 1, n = 50,000; serial chi-squared 16 x 16."""
    u = vmap(lambda key: rng.uniform(key, 2, dtype=torch.float64))(family(kind, 50_001))
    assert correlation_p(u[:-1, 0], u[1:, 0]) > FALSE_ALARM / 3
    assert correlation_p(u[:-1, 1], u[1:, 0]) > FALSE_ALARM / 3  # overlapping streams would show here
    cells = (u[0:-1:2, 0] * 16).long() * 16 + (u[1::2, 0] * 16).long()
    assert stats.chisquare(np.bincount(cells.numpy(), minlength=256)).pvalue > FALSE_ALARM / 3


@pytest.mark.parametrize("lag", [1, 2, 8])
def test_neighbouring_counters_give_unrelated_draws(lag):
    """Pearson correlation at a lag, n = 50,000."""
    u = rng.uniform(18, 50_000 + lag, dtype=torch.float64)
    assert correlation_p(u[:-lag], u[lag:]) > FALSE_ALARM


def test_parent_and_child_give_unrelated_draws():
    """Pearson correlation between the draws of a key and of its child, n = 50,000."""
    parent, child = (rng.uniform(key, 50_000, dtype=torch.float64) for key in (19, rng.fold(19, 0)))
    assert correlation_p(parent, child) > FALSE_ALARM


def test_one_flipped_bit_of_a_key_flips_half_of_its_childs_bits():
    """Binomial test for each input bit, n = 500 keys x 64 output bits; 1e-6 over all input bits together."""
    many = rng.bits(20, 500)
    plain = rng.fold_tensor(many, "child")
    for position in range(64):
        flipped = rng.fold_tensor(many ^ rng.as_tensor(1 << position), "child")
        changed = sum(bin(value).count("1") for value in unsigned(plain ^ flipped))
        assert stats.binomtest(changed, 500 * 64, 0.5).pvalue > FALSE_ALARM / 64


def test_all_orders_of_four_are_equally_likely():
    """Chi-squared over the 24 orders, n = 24,000 keys."""
    orders = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    drawn = vmap(lambda key: rng.permutation(key, 4))(family("children", 24_000)).tolist()
    counts = np.bincount([orders[tuple(order)] for order in drawn], minlength=24)
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_all_pairs_of_six_are_equally_likely_to_be_chosen():
    """Chi-squared over the 15 pairs, n = 15,000 keys."""
    pairs = {pair: i for i, pair in enumerate(itertools.combinations(range(6), 2))}
    drawn = vmap(lambda key: rng.choice(key, 6, 2))(family("children", 15_000)).tolist()
    assert stats.chisquare(np.bincount([pairs[tuple(pair)] for pair in drawn], minlength=15)).pvalue > FALSE_ALARM


def test_each_number_is_chosen_with_probability_k_over_n():
    """Exact binomial test for each of 20 numbers, n = 20,000 keys; 1e-6 over all together."""
    drawn = vmap(lambda key: rng.choice(key, 20, 7))(family("children", 20_000))
    for count in np.bincount(drawn.reshape(-1).numpy(), minlength=20):
        assert stats.binomtest(int(count), 20_000, 7 / 20).pvalue > FALSE_ALARM / 20


# ---------------------------------------------------------------- torch's global generator


def test_torch_seeded_repeats_and_leaves_no_trace():
    before = torch.get_rng_state()
    with rng.torch_seeded(rng.fold(1, "a")):
        first = torch.rand(5)
    with rng.torch_seeded(rng.fold(1, "a")):
        again = torch.rand(5)
    with rng.torch_seeded(rng.fold(1, "b")):
        other = torch.rand(5)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_torch_seeded_puts_the_state_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), rng.torch_seeded(3):
        torch.rand(5)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


FORBIDDEN_MODULES = {"random", "numpy.random"}
FORBIDDEN_CALLS = {
    *(f"{alias}.random" for alias in ("np", "numpy")),
    *(f"torch.{name}" for name in ("manual_seed", "seed", "rand", "randn", "randint", "randperm", "rand_like")),
    *(f"torch.{name}" for name in ("randn_like", "randint_like", "bernoulli", "multinomial", "normal", "poisson")),
    *(f"torch.{module}.manual_seed" for module in ("random", "cuda", "mps")),
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def global_randomness(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            found += sorted(names & (FORBIDDEN_MODULES | FORBIDDEN_CALLS))
        elif isinstance(node, ast.Attribute) and (dotted(node) in FORBIDDEN_CALLS or node.attr == "manual_seed"):
            found.append(node.attr)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import random",
        "from random import shuffle",
        "from numpy import random",
        "import numpy.random as r",
        "np.random.rand()",
        "torch.randn(2)",
        "torch.Generator().manual_seed(1)",
        "torch.cuda.manual_seed(1)",
    ],
)
def test_the_search_for_global_randomness_finds(source):
    assert global_randomness(source)


def test_nothing_in_fedsim_draws_from_a_global_generator():
    """Seeding a generator object in ``rng.torch_seeded`` is the one exception."""
    root = Path(fedsim.__file__).parent
    found = {str(path.relative_to(root)): global_randomness(path.read_text()) for path in root.rglob("*.py")}
    assert len(found) > 30
    assert {path: what for path, what in found.items() if what} == {"rng.py": ["manual_seed"]}
