"""Layers on whole branches: against loops, a classic autograd.Function, torchvision, timm, and their expectations."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap

from fedsim import rng
from fedsim.models.layers.paths import DropPath, PathDraws, ShakeDrop, StochasticDepth

ENDS = {"alpha": (-1.0, 1.0), "beta": (0.0, 1.0)}
JOINS = [(1, 2), (0, 1, 2), (1, 2), (0, 1, 2)]  # of two blocks of three columns


def at(layer, key, *args):
    """What the layer makes of its inputs with this key."""
    return functional_call(layer, {"key": rng.as_tensor(key)}, args)


def many(layer, n, *args):
    """With n keys: (n, ...)."""
    keys = rng.bits(7, n)
    return vmap(lambda key: functional_call(layer, {"key": key}, args))(keys)


def x_of(*shape, dtype=torch.float64):
    return rng.normal(3, *shape, dtype=dtype)


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("scaling", ["eval", "inverted"])
def test_a_branch_is_there_or_not(mode, scaling):
    layer, x = StochasticDepth(0.3, mode=mode, scaling=scaling), x_of(40, 2, 3)
    y = at(layer, 5, x)
    there = y.flatten(1).any(1)
    factor = 1.0 if scaling == "eval" else 1 / 0.7
    for row, kept, before in zip(y, there, x, strict=True):
        assert torch.allclose(row, before * factor * float(kept))
    assert 0 < there.sum() < 40 if mode == "row" else there.all() or not there.any()


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("scaling", ["eval", "inverted"])
def test_evaluation_is_the_mean_over_draws(mode, scaling):
    """n = 20,000: the share of draws is known to 0.0032; the band is of five of these, 6 in ten million by chance."""
    layer, x = StochasticDepth(0.3, mode=mode, scaling=scaling), x_of(3, 2)
    mean, expected = many(layer, 20_000, x).mean(0), at(layer.eval(), 1, x)
    assert torch.equal(expected, x if scaling == "inverted" else x * 0.7)
    factor = 1.0 if scaling == "eval" else 1 / 0.7
    assert ((mean - expected).abs() <= 5 * factor * math.sqrt(0.3 * 0.7 / 20_000) * x.abs()).all()


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_values_are_those_of_torchvision(mode):
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(1)
    x, layer = x_of(6, 3), StochasticDepth(0.4, mode=mode, scaling="inverted")
    ours = {tuple(row.tolist()) for y in many(layer, 60, x) for row in y}
    theirs = {tuple(row.tolist()) for _ in range(60) for row in ops.stochastic_depth(x, 0.4, mode)}
    assert ours == theirs and len(ours) == 7  # each row, or zeros
    assert torch.equal(ops.stochastic_depth(x, 0.4, mode, training=False), at(layer.eval(), 1, x))


def test_values_are_those_of_timm():
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(1)
    x, layer, theirs = x_of(6, 3), StochasticDepth(0.4, mode="row", scaling="inverted"), layers.DropPath(0.4)
    ours = {tuple(row.tolist()) for y in many(layer, 60, x) for row in y}
    assert ours == {tuple(row.tolist()) for _ in range(60) for row in theirs(x)}


class Shaken(torch.autograd.Function):
    """ShakeDrop as it is usually written: another factor backward."""

    @staticmethod
    def forward(ctx, x, gate, alpha, beta):
        ctx.save_for_backward(gate, beta)
        return (gate + alpha - gate * alpha) * x

    @staticmethod
    def backward(ctx, slope):
        gate, beta = ctx.saved_tensors
        return (gate + beta - gate * beta) * slope, None, None, None


SHAPES = {"batch": (1, 1, 1, 1), "image": (5, 1, 1, 1), "channel": (5, 3, 1, 1), "pixel": (5, 3, 4, 2)}


@pytest.mark.parametrize("level", SHAPES)
def test_shakedrop_is_the_classic_function_with_the_same_draws(level):
    layer, slope, gates = ShakeDrop(0.6, **ENDS, level=level), rng.normal(4, 5, 3, 4, 2, dtype=torch.float64), set()
    for key in range(8):
        gate = (rng.uniform(rng.fold(key, 0)) >= 0.6).double()
        alpha = (2 * rng.uniform(rng.fold(key, 1), *SHAPES[level]) - 1).double()
        beta = rng.uniform(rng.fold(key, 2), *SHAPES[level]).double()
        results = []
        for function in (lambda x, key=key: at(layer, key, x), Shaken.apply):
            x = x_of(5, 3, 4, 2).requires_grad_()
            y = function(x) if not results else function(x, gate, alpha, beta)
            results.append((y.detach(), torch.autograd.grad(y, x, slope)[0]))
        (ours, back), (theirs, back_theirs) = results
        assert torch.allclose(ours, theirs, rtol=1e-12) and torch.allclose(back, back_theirs, rtol=1e-12)
        gates.add(gate.item())
    assert gates == {0.0, 1.0}


@pytest.mark.parametrize("ends", [ENDS, {"alpha": (-0.4, 1.2), "beta": (0.3, 0.5)}])
def test_factors_have_the_means_of_the_paper_and_forward_tells_nothing_of_backward(ends):
    """n = 20,000 factors; bands of five standard errors, taken from the draws."""
    layer, n = ShakeDrop(0.6, **ends, level="batch"), 20_000
    keys, one = rng.bits(9, n), torch.ones(1, dtype=torch.float64)

    def factors(key):
        def f(x):
            return functional_call(layer, {"key": key}, (x,)).sum()

        return f(one), grad(f)(one).sum()

    forward, backward = vmap(factors)(keys)
    for found, (low, high) in ((forward, ends["alpha"]), (backward, ends["beta"])):
        expected = 0.4 + 0.6 * (low + high) / 2
        assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(n)
    assert torch.allclose(at(layer.eval(), 1, one), one * (0.4 + 0.6 * sum(ends["alpha"]) / 2))
    shaken = (forward != 1) | (backward != 1)
    assert shaken.double().mean() == pytest.approx(0.6, abs=5 * math.sqrt(0.24 / n))
    alpha, beta = forward[shaken], backward[shaken]
    assert abs(torch.corrcoef(torch.stack([alpha, beta]))[0, 1]) < 5 / math.sqrt(len(alpha))
    assert alpha.min() >= ends["alpha"][0] and alpha.max() <= ends["alpha"][1]
    assert alpha.std().item() == pytest.approx((ends["alpha"][1] - ends["alpha"][0]) / math.sqrt(12), rel=0.02)


def loop(layer, key, rows):
    """The weights of DropPath, one row and one join after another, with plain numbers."""
    (p, share, _), found = layer.draws, [[] for _ in layer.joins]
    alone, column = (rng.uniform(rng.fold(key, part), rows).tolist() for part in (0, 1))
    for j, join in enumerate(layer.joins):
        own = rng.fold(key, 2, j)
        u = rng.uniform(rng.fold(own, 0), rows, len(join)).tolist()
        forced = rng.uniform(rng.fold(own, 1), rows).tolist()
        for row in range(rows):
            chosen = math.floor(column[row] * layer.columns)
            kept = [i for i, value in enumerate(u[row]) if value >= p] or [math.floor(forced[row] * len(join))]
            if alone[row] < share:
                kept = [join.index(chosen)] if chosen in join else list(range(len(join)))
            found[j].append([1 / len(kept) if i in kept else 0.0 for i in range(len(join))])
    return [torch.tensor(weights, dtype=torch.float64) for weights in found]


@given(
    st.floats(0, 0.95), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["batch", "row"]), st.integers(0, 2**64 - 1)
)
@settings(deadline=None, max_examples=60)
def test_joins_keep_one_input_at_least_and_are_those_of_a_slow_loop(p, share, mode, key):
    layer = DropPath(3, JOINS, PathDraws(p, share, mode))
    found = at(layer, key, torch.zeros(4, 2, dtype=torch.float64))
    for weights, expected in zip(found, loop(layer, key, 4 if mode == "row" else 1), strict=True):
        assert torch.allclose(weights, expected, rtol=1e-12)
        assert torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_global_draw_is_one_column_at_all_joins_that_it_comes_to(mode):
    """n = 3,000 draws of three columns: each share is known to 0.0086; the band is of five of these."""
    layer = DropPath(3, JOINS, PathDraws(0.3, 1.0, mode))
    keys, x = rng.bits(2, 1500), torch.zeros(2, 1)
    found = vmap(lambda key: functional_call(layer, {"key": key}, (x,)))(keys)
    whole = [weights.flatten(0, 1) for weights in found]
    column = whole[1].argmax(1)
    assert torch.equal(whole[1], nn.functional.one_hot(column, 3).float()) and torch.equal(whole[1], whole[3])
    for weights in (whole[0], whole[2]):
        own = torch.cat([weights.new_full((3, 1), 0), torch.eye(3)[:, 1:]], 1)[column][:, 1:]
        own[column == 0] = 0.5
        assert torch.equal(weights, own)
    shares = torch.bincount(column, minlength=3) / len(column)
    assert (shares - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / len(column))


def test_shares_of_local_and_global_and_of_dropped_inputs():
    """n = 20,000 draws, bands of five standard errors."""
    n, x = 20_000, torch.zeros(1, 1)
    found = many(DropPath(2, [(0, 1)], PathDraws(0.4, 0.25, "batch")), n, x)[0].reshape(n, 2)
    both, one = 0.75 * 0.6**2, 1 - 0.75 * 0.6**2
    assert abs((found[:, 0] == 0.5).float().mean() - both) < 5 * math.sqrt(both * one / n)
    assert abs((found[:, 0] == 1).float().mean() - one / 2) < 5 * math.sqrt(one / 4 / n)


LAYERS = {
    "depth": StochasticDepth(0.5, mode="row"),
    "depth of a batch": StochasticDepth(0.5),
    "shake": ShakeDrop(0.5, **ENDS),
    "shake channels": ShakeDrop(0.5, **ENDS, level="channel"),
    "shake pixels": ShakeDrop(0.5, **ENDS, level="pixel"),
    "droppath": DropPath(3, JOINS, PathDraws(0.4, 0.5, "row")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_at_the_end_change_no_other_row(name):
    for key in range(4):
        few, more = (at(LAYERS[name], key, x_of(9, 4, 3)[:n]) for n in (5, 9))
        few, more = ([few], [more]) if isinstance(few, torch.Tensor) else (few, more)
        assert all(torch.equal(a, b[:5]) for a, b in zip(few, more, strict=True))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays_and_layers_survive_copies(name, dtype):
    x = x_of(5, 4, 3).to(dtype)
    here = at(LAYERS[name], 3, x)
    for other in (copy.deepcopy(LAYERS[name]), pickle.loads(pickle.dumps(LAYERS[name]))):
        there = at(other, 3, x)
        for a, b in zip([*here], [*there], strict=True):
            assert torch.equal(a, b) and a.dtype == dtype
    assert "0.5" in repr(LAYERS[name])


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "droppath"])
def test_gradients_side_by_side_are_gradients_one_by_one(name):
    x, keys = x_of(3, 5, 4, 2), rng.bits(1, 3)

    def loss(x, key):
        return (functional_call(LAYERS[name], {"key": key}, (x,)) ** 3).sum()

    found = vmap(grad(loss))(x, keys)
    for c in range(3):
        assert torch.allclose(found[c], grad(loss)(x[c], keys[c]), rtol=1e-12)
