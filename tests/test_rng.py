"""Keys and draws, bit for bit, against a slow SplitMix64 and published outputs; statistics in test_rng_quality.py."""

import ast
import hashlib
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import fedsim
from fedsim import rng

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


def test_bernoulli_is_a_uniform_draw_below_p():
    u, p = [(d >> 40) / 2**24 for d in slow_splitmix(16, 5)], [0.0, 1.0, 0.3, 0.97, 0.001]
    assert rng.bernoulli(16, torch.tensor(p), 5).tolist() == [a < b for a, b in zip(u, p, strict=True)]
    assert rng.bernoulli(16, 0.5, 5).tolist() == [a < 0.5 for a in u]
    assert rng.bernoulli(16, 1.0, 1000).all() and not rng.bernoulli(16, 0.0, 1000).any()


def test_normal_is_box_muller_of_the_first_and_second_half_of_the_draws():
    draws = slow_splitmix(14, 10)
    u, v = [d / 2**64 for d in draws[:5]], [d / 2**64 for d in draws[5:]]
    expected = [math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b) for a, b in zip(u, v, strict=True)]
    assert np.allclose(rng.normal(14, 5, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- many permutations at once


def slow_permutation(key: int, n: int) -> list[int]:
    """Places in the order of their draws, as signed numbers."""
    draws = [draw - 2**64 if draw >= 2**63 else draw for draw in slow_splitmix(key, n)]
    return sorted(range(n), key=draws.__getitem__)


def key_with_draw(draw: int, place: int) -> int:
    """The key whose draw number ``place`` is ``draw``: SplitMix64 backwards."""

    def unshifted(z: int, by: int) -> int:
        return z ^ (z >> by) ^ (z >> 2 * by)  # enough for by >= 22

    z = unshifted(draw % 2**64, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    z = unshifted(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    return (unshifted(z, 30) - (place + 1) * GOLDEN) % 2**64


@given(st.lists(st.tuples(keys, st.integers(1, 40)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100)
def test_each_row_is_the_slow_permutation_followed_by_zeros(lanes):
    many, sizes = zip(*lanes, strict=True)
    found = rng.permutations(key_tensor(many), torch.tensor(sizes))
    assert found.dtype == torch.int64
    assert found.tolist() == [slow_permutation(k, n) + [0] * (max(sizes) - n) for k, n in lanes]


@pytest.mark.parametrize("sizes", [[1], [1, 1], [600] * 3, [1, 600, 17], [5, 5, 4], [300, 2, 1, 300]])
def test_each_row_is_the_permutation_of_its_key(sizes):
    many = rng.fold_tensor(rng.as_tensor(23), torch.arange(len(sizes)))
    for row, key, n in zip(rng.permutations(many, torch.tensor(sizes)), many, sizes, strict=True):
        assert torch.equal(row[:n], rng.permutation(key, n))
        assert not row[n:].any()


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("draw", [2**63 - 1, 2**63 - 2, -(2**63)])
def test_a_real_draw_as_large_as_the_padding_keeps_its_place(draw, place):
    """Among twenty padded places, so that a sort that is not stable has room to show it."""
    key = key_with_draw(draw, place)
    assert unsigned(rng.bits(key, 5))[place] == draw % 2**64
    found = rng.permutations(key_tensor([key, 1]), torch.tensor([5, 25]))
    assert found[0].tolist() == slow_permutation(key, 5) + [0] * 20


@pytest.mark.parametrize("sizes", [[3, 0], [0], [4, -1, 2]])
def test_permutations_refuse_an_empty_row(sizes):
    with pytest.raises(ValueError, match=f"sizes must be >= 1, got {min(sizes)}"):
        rng.permutations(torch.arange(len(sizes)), torch.tensor(sizes))


def test_draws_change_none_of_the_tensors_they_are_given():
    """Mixing is done in place, on tensors of its own."""
    many, parts, sizes = torch.arange(5) - 2, torch.arange(5) * 7, torch.tensor([3, 1, 4, 1, 5])
    before = [tensor.clone() for tensor in (many, parts, sizes)]
    rng.fold_tensor(many, parts), rng.fold_tensor(many, "a"), rng.fold_tensor(many, 0)
    rng.permutations(many, sizes), rng.permutations(many, torch.full((5,), 4))
    rng.bits(many[0], 1), rng.uniform(many[1], 1), rng.normal(many[2], 1), rng.permutation(many[3], 3)
    assert all(torch.equal(tensor, old) for tensor, old in zip((many, parts, sizes), before, strict=True))


def test_draws_lie_on_the_device_of_their_key():
    """A tensor made on torch's default device, here one without memory, would not mix with the key."""
    many, sizes = torch.arange(3), torch.tensor([2, 4, 3])
    alone = rng.permutations(many, sizes), rng.bits(many[1], 4), rng.fold_tensor(many, "a")
    with torch.device("meta"):
        under = rng.permutations(many, sizes), rng.bits(many[1], 4), rng.fold_tensor(many, "a")
    assert all(torch.equal(a, b) for a, b in zip(alone, under, strict=True))


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
    """Two exceptions: a generator object in ``rng.torch_seeded``, and what the Flower app of a user draws from."""
    root = Path(fedsim.__file__).parent
    found = {str(path.relative_to(root)): global_randomness(path.read_text()) for path in root.rglob("*.py")}
    assert len(found) > 30
    foreign = found.pop("engines/flower/seeding.py")
    assert set(foreign) == {"random"}
    assert {path: what for path, what in found.items() if what} == {"rng.py": ["manual_seed"]}


@pytest.mark.parametrize("n", [0, 1, 7, 1000])
def test_uniforms_are_the_uniform_draws_of_each_key(n):
    keys = torch.stack([rng.as_tensor(key) for key in (0, 1, 2**63 + 5, 2**64 - 1)])
    before = keys.clone()
    assert torch.equal(rng.uniforms(keys, n), torch.stack([rng.uniform(key, n) for key in keys]))
    assert torch.equal(keys, before)
