import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers.dropblock import DropBlock, exact_gamma, paper_gamma

TABLE = [  # side, block, rate, gamma by the paper, expected share dropped with it, gamma for the rate itself
    (8, 3, 0.10, 0.01975, 0.0947, 0.02092),
    (4, 3, 0.10, 0.04444, 0.0961, 0.04631),
    (14, 7, 0.10, 0.00625, 0.0929, 0.00676),
    (14, 7, 0.25, 0.01562, 0.2095, 0.01940),
    (28, 7, 0.10, 0.00331, 0.0939, 0.00353),
    (7, 7, 0.10, 0.10000, 0.1000, 0.10000),
]


def run(layer: DropBlock, x: Tensor, key: int | Tensor, progress: float | Tensor = 1.0) -> Tensor:
    key = rng.as_tensor(key) if isinstance(key, int) else key
    given = {"key": key, "progress": torch.as_tensor(progress, dtype=torch.float32)}
    out = functional_call(layer, given, (x,))
    assert isinstance(out, Tensor)
    return out


def zeros(layer: DropBlock, shape: tuple[int, ...], key: int, progress: float = 1.0) -> np.ndarray:
    return (run(layer, torch.ones(shape), key, progress) == 0).numpy()


def in_squares(side: int, block: int) -> np.ndarray:
    """In how many squares each cell of a line is, by trying them all."""
    counts = np.zeros(side, dtype=int)
    for first in range(side - block + 1):
        counts[first : first + block] += 1
    return counts


def chances(gamma: float, sides: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Chance of each cell to be dropped: 1 - (1 - gamma)^n."""
    n = np.outer(in_squares(sides[0], block[0]), in_squares(sides[1], block[1]))
    return 1 - (1 - gamma) ** n


def gamma_of(kind, rate: float, sides: tuple[int, int], block: tuple[int, int]) -> float:
    return float(kind(torch.tensor(rate, dtype=torch.float64), sides, block))


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("normalise", ["batch", "example"])
@pytest.mark.parametrize(
    ("sides", "size"),
    [((5, 5), 1), ((6, 6), 2), ((6, 9), 3), ((9, 5), 4), ((4, 9), 7), ((3, 3), 8), ((1, 7), 3), ((12, 2), 5)],
)
def test_the_output_is_that_of_a_slow_loop(sides, size, normalise):
    height, width = sides
    b_h, b_w = min(size, height), min(size, width)
    places = height - b_h + 1, width - b_w + 1
    x = rng.normal(1, 3, 2, *sides, dtype=torch.float64)
    layer = DropBlock(0.4, size, normalise=normalise, schedule="constant").double()
    gamma = torch.tensor(0.4 * height * width / (b_h * b_w * places[0] * places[1]), dtype=torch.float64)
    seeds, kept = rng.coins(7, gamma, 3, 2, *places), np.ones(x.shape)
    for n, c, i, j in itertools.product(range(3), range(2), *map(range, places)):
        if seeds[n, c, i, j]:
            for row, column in itertools.product(range(b_h), range(b_w)):
                kept[n, c, i + row, j + column] = 0
    assert 0 < kept.mean() < 1
    axes = None if normalise == "batch" else (1, 2, 3)
    expected = x.numpy() * kept / kept.mean(axes, keepdims=True)
    assert np.allclose(run(layer, x, 7), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    key=st.integers(0, 2**64 - 1),
    sides=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    size=st.integers(1, 9),
    gamma=st.sampled_from(["paper", "exact"]),
)
def test_every_zero_is_in_a_whole_square_of_zeros(key, sides, size, gamma):
    dropped = zeros(DropBlock(0.3, size, gamma=gamma), (2, 3, *sides), key)
    b_h, b_w = min(size, sides[0]), min(size, sides[1])
    if sides == (1, 1):
        assert not dropped.any()
    for n, c, i, j in np.argwhere(dropped):
        rows = range(max(0, i - b_h + 1), min(i, sides[0] - b_h) + 1)
        columns = range(max(0, j - b_w + 1), min(j, sides[1] - b_w) + 1)
        assert any(dropped[n, c, a : a + b_h, b : b + b_w].all() for a, b in itertools.product(rows, columns))


def test_squares_of_one_pixel_are_dropout():
    """n = 60,000 entries, 5 standard deviations: a false alarm below 6e-7; and no entry tells of its neighbour."""
    dropped = zeros(DropBlock(0.3, 1), (20, 30, 10, 10), 3)
    n = dropped.size
    assert abs(dropped.sum() - 0.3 * n) < 5 * math.sqrt(0.3 * 0.7 * n)
    both = dropped[..., :-1] & dropped[..., 1:]
    assert abs(both.sum() - 0.09 * both.size) < 5 * math.sqrt(both.size * 0.09 * 1.5)
    for kind in (paper_gamma, exact_gamma):
        assert gamma_of(kind, 0.3, (10, 10), (1, 1)) == pytest.approx(0.3, rel=1e-14)


@pytest.mark.parametrize("size", [4, 5, 11])
def test_a_square_as_large_as_the_map_is_dropout_of_channels(size):
    """n = 8,000 maps, 5 standard deviations: a false alarm below 6e-7."""
    dropped = zeros(DropBlock(0.3, size), (80, 100, 4, 4), 5)
    maps = dropped.any((2, 3))
    assert np.array_equal(maps, dropped.all((2, 3)))
    assert abs(maps.sum() - 0.3 * maps.size) < 5 * math.sqrt(0.21 * maps.size)
    pairs = maps[:, ::2] & maps[:, 1::2]  # channels are independent
    assert abs(pairs.sum() - 0.09 * pairs.size) < 5 * math.sqrt(0.09 * 0.91 * pairs.size)
    rows = maps[::2] & maps[1::2]  # and so are examples
    assert abs(rows.sum() - 0.09 * rows.size) < 5 * math.sqrt(0.09 * 0.91 * rows.size)


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize("row", TABLE)
def test_gamma_and_the_share_dropped_are_those_of_the_table(row):
    side, size, rate, gamma, share, exact = row
    sides, block = (side, side), (size, size)
    paper = gamma_of(paper_gamma, rate, sides, block)
    assert paper == pytest.approx(gamma, abs=6e-6)
    assert chances(paper, sides, block).mean() == pytest.approx(share, abs=6e-5)
    solved = gamma_of(exact_gamma, rate, sides, block)
    assert solved == pytest.approx(exact, abs=6e-6)
    assert chances(solved, sides, block).mean() == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("gamma", ["paper", "exact"])
@pytest.mark.parametrize(("sides", "size", "rate"), [((8, 8), 3, 0.1), ((14, 14), 7, 0.25), ((5, 9), 4, 0.6)])
def test_each_cell_is_dropped_as_often_as_it_should(sides, size, rate, gamma):
    """n = 40,000 maps; cells 5.5 and the share 5 standard deviations wide: false alarms below 8e-6 in all."""
    dropped = zeros(DropBlock(rate, size, gamma=gamma), (200, 200, *sides), 9).reshape(-1, *sides)
    block = min(size, sides[0]), min(size, sides[1])
    kind = exact_gamma if gamma == "exact" else paper_gamma
    chance = chances(gamma_of(kind, rate, sides, block), sides, block)
    n = len(dropped)
    assert (abs(dropped.mean(0) - chance) < 5.5 * np.sqrt(chance * (1 - chance) / n)).all()
    per_map = dropped.mean((1, 2))
    assert abs(per_map.mean() - chance.mean()) < 5 * per_map.std() / math.sqrt(n)
    if gamma == "exact":
        assert chance.mean() == pytest.approx(rate, rel=1e-12)


def test_the_centre_is_dropped_far_more_often_than_a_corner():
    chance = chances(gamma_of(paper_gamma, 0.1, (14, 14), (7, 7)), (14, 14), (7, 7))
    assert chance[7, 7] == pytest.approx(0.264, abs=0.001)
    assert chance[0, 0] == chance[-1, 0] == pytest.approx(0.00625, abs=1e-6)
    dropped = zeros(DropBlock(0.1, 7), (100, 100, 14, 14), 2).mean((0, 1))
    assert dropped[7, 7] > 0.24 and dropped[0, 0] < 0.012  # 5 and 7 standard deviations away


@pytest.mark.parametrize(("sides", "size", "block"), [((6, 6), 7, (6, 6)), ((4, 4), 7, (4, 4)), ((4, 9), 7, (4, 7))])
def test_a_block_larger_than_the_map_is_clipped_in_the_formula_too(sides, size, block):
    rate = 0.2
    places = (sides[0] - block[0] + 1) * (sides[1] - block[1] + 1)
    gamma = gamma_of(paper_gamma, rate, sides, block)
    assert gamma == pytest.approx(rate * math.prod(sides) / math.prod(block) / places, rel=1e-14)
    seen = zeros(DropBlock(rate, size), (100, 100, *sides), 4).reshape(-1, *sides).mean((1, 2))
    assert abs(seen.mean() - chances(gamma, sides, block).mean()) < 5 * seen.std() / 100  # a false alarm below 6e-7


@pytest.mark.parametrize("sides", [(2, 2), (7, 7), (8, 5), (28, 28), (3, 40)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_exact_gamma_is_the_root_that_brent_finds(sides, size):
    block = min(size, sides[0]), min(size, sides[1])
    rates = [0.0, 1e-4, 0.1, 0.5, 0.9, 0.99]
    alone = [gamma_of(exact_gamma, rate, sides, block) for rate in rates]
    together = vmap(lambda rate: exact_gamma(rate, sides, block))(torch.tensor(rates, dtype=torch.float64))
    assert together.tolist() == pytest.approx(alone, rel=1e-13)
    assert alone[0] == 0
    for rate, gamma in zip(rates[1:], alone[1:], strict=True):
        root = brentq(lambda g, rate=rate: chances(g, sides, block).mean() - rate, 0, 1, xtol=1e-15, rtol=1e-14)
        assert gamma == pytest.approx(root, rel=1e-10)


@pytest.mark.parametrize("gamma", ["paper", "exact"])
def test_the_rate_grows_with_the_progress_of_the_federation(gamma):
    """Progress in eighths is exact in float32, so that masks are the same bit for bit."""
    x = rng.normal(1, 4, 5, 8, 8)
    linear, always = DropBlock(0.4, 3, gamma=gamma), DropBlock(0.4, 3, gamma=gamma, schedule="constant")
    for progress in (0.125, 0.5, 1.0):
        so_far = DropBlock(0.4 * progress, 3, gamma=gamma, schedule="constant")
        assert torch.equal(run(linear, x, 3, progress), run(so_far, x, 3, 0.3))
        assert torch.equal(run(always, x, 3, progress), run(linear, x, 3, 1.0))
    assert torch.equal(run(linear, x, 3, 0.0), x)


# ---------------------------------------------------------------- scale


@settings(deadline=None, max_examples=30)
@given(key=st.integers(0, 2**64 - 1), drop=st.floats(0.05, 0.6), size=st.integers(1, 5))
def test_a_constant_keeps_its_mean(key, drop, size):
    """Over the batch, or in each example, unless all of it is dropped."""
    ones = torch.ones(4, 3, 6, 5, dtype=torch.float64)
    whole = run(DropBlock(drop, size).double(), ones, key)
    assert whole.mean().item() == pytest.approx(1, rel=1e-12) or not whole.any()
    each = run(DropBlock(drop, size, normalise="example").double(), ones, key)
    left = each.flatten(1).any(1)
    assert each.mean((1, 2, 3))[left].tolist() == pytest.approx([1] * int(left.sum()), rel=1e-12)


@pytest.mark.parametrize("normalise", ["batch", "example"])
def test_where_nothing_is_left_there_are_zeros_and_no_gradient(normalise):
    x = rng.normal(1, 1, 1, 3, 3).requires_grad_()
    key = next(k for k in range(20) if zeros(DropBlock(0.9, 3, normalise=normalise), (1, 1, 3, 3), k).all())
    out = run(DropBlock(0.9, 3, normalise=normalise), x, key)
    out.sum().backward()
    assert x.grad is not None
    assert not out.any() and not x.grad.any()


def test_with_examples_by_themselves_rows_added_to_a_batch_change_no_other_row():
    x = rng.normal(3, 6, 2, 7, 7)
    alone, mixing = DropBlock(0.3, 3, normalise="example"), DropBlock(0.3, 3)
    assert torch.equal(run(alone, x, 4)[:3], run(alone, x[:3], 4))
    assert not alone.mixes_examples and mixing.mixes_examples
    assert not torch.equal(run(mixing, x, 4)[:3], run(mixing, x[:3], 4))
    assert torch.equal(run(mixing, x, 4)[:3] == 0, run(mixing, x[:3], 4) == 0)


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("gamma", ["paper", "exact"])
@pytest.mark.parametrize("normalise", ["batch", "example"])
def test_vmap_gives_each_client_what_it_has_alone(gamma, normalise):
    layer = DropBlock(0.3, 3, gamma=gamma, normalise=normalise)
    x, keys, progress = rng.normal(3, 4, 2, 3, 6, 6), torch.tensor([7, -1, 2**61, 8]), torch.tensor([0.3, 1, 0.5, 0.7])
    together = vmap(lambda *own: run(layer, *own))(x, keys, progress)
    for lane in range(4):
        assert torch.equal(together[lane], run(layer, x[lane], keys[lane], progress[lane]))


def test_in_evaluation_and_on_maps_of_one_pixel_nothing_changes():
    x, pixel = rng.normal(1, 2, 3, 5, 4), rng.normal(2, 4, 3, 1, 1)
    assert torch.equal(run(DropBlock(0.9, 3).eval(), x, 1), x)
    assert torch.equal(run(DropBlock(0.0, 3), x, 1), x)
    assert torch.equal(run(DropBlock(0.9, 3), pixel, 1), pixel)
    assert run(DropBlock(0.5, 3), x.half(), 1).dtype == torch.float16


def test_what_is_out_of_range_is_refused():
    for drop in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"drop must be in \[0, 1\), got"):
            DropBlock(drop, 3)
    with pytest.raises(ValueError, match="block_size must be >= 1, got 0"):
        DropBlock(0.1, 0)
    with pytest.raises(ValueError, match=r"DropBlock needs \(batch, channels, height, width\), got shape \(3, 4\)"):
        DropBlock(0.1, 3)(torch.ones(3, 4))


def test_it_can_be_copied_and_sent():
    layer, x = DropBlock(0.3, 2, gamma="exact"), rng.normal(1, 2, 3, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(run(other, x, 3), run(layer, x, 3)) and other.mixes_examples
    assert not layer.state_dict() and "drop=0.3, block_size=2" in repr(layer)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_with_the_same_seeds_it_is_torchvisions(size, monkeypatch):
    """Odd blocks, which it takes alone; its clipping to the map is its own."""
    ops = pytest.importorskip("torchvision.ops")
    x = rng.normal(1, 3, 4, 9, 8, dtype=torch.float64)
    asked = []

    def bernoulli_(self: Tensor, gamma: float) -> Tensor:
        asked.append(gamma)
        return self.copy_(rng.coins(6, torch.tensor(gamma, dtype=torch.float64), *self.shape))

    monkeypatch.setattr(torch.Tensor, "bernoulli_", bernoulli_)
    theirs = ops.drop_block2d(x, 0.2, size, eps=0.0)
    assert asked == [pytest.approx(gamma_of(paper_gamma, 0.2, (9, 8), (size, size)), rel=1e-12)]
    assert torch.allclose(run(DropBlock(0.2, size).double(), x, 6), theirs, rtol=1e-12)
