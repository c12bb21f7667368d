"""Penalties against closed forms, finite differences and singular values, on parameters of mixed signs and shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from fedsim import rng
from fedsim.training import penalties as pen
from fedsim.training.objective import Start

SHAPES = {"conv": (3, 2, 2, 2), "bias": (4,), "tall": (5, 3), "wide": (2, 6), "scale": (3,)}


def params(key, scale=1.0):
    return {n: scale * rng.normal(rng.fold(key, n), *s, dtype=torch.float64) for n, s in SHAPES.items()}


LOCAL, ANCHOR = params(1), params(2)
START = Start(ANCHOR, 7)
WEIGHTS = {n: t.numpy().reshape(t.shape[0], -1) for n, t in LOCAL.items() if t.dim() > 1}

# by numpy, entry by entry or by another decomposition
EXPECTED = {
    "l1": (lambda p: pen.l1(p, START, strength=0.3), 0.3 * sum(abs(x) for w in WEIGHTS.values() for x in w.flat)),
    "l2": (lambda p: pen.l2(p, START, strength=0.3), 0.15 * sum(x * x for w in WEIGHTS.values() for x in w.flat)),
    "proximal": (
        lambda p: pen.proximal(p, START, mu=0.3),
        0.15 * sum(((LOCAL[n] - ANCHOR[n]).numpy() ** 2).sum() for n in LOCAL),
    ),
    "group lasso": (
        lambda p: pen.group_lasso(p, START, strength=0.3),
        0.3 * sum(np.sqrt(len(row)) * np.sqrt((row**2).sum()) for w in WEIGHTS.values() for row in w),
    ),
    "orthogonal": (  # sum over singular values: the smaller Gram matrix has their squares as eigenvalues
        lambda p: pen.orthogonal(p, START, strength=0.3),
        0.3 * sum(((np.linalg.svd(w, compute_uv=False) ** 2 - 1) ** 2).sum() for w in WEIGHTS.values()),
    ),
    "slimming": (
        lambda p: pen.slimming(p, START, names=("scale", "bias"), strength=0.3),
        0.3 * (LOCAL["scale"].abs().sum() + LOCAL["bias"].abs().sum()).item(),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_value_is_that_of_the_formula(name):
    penalty, expected = EXPECTED[name]
    assert penalty(LOCAL).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [*EXPECTED, "spectral"])
def test_gradients_are_those_of_finite_differences(name):
    penalty = EXPECTED[name][0] if name in EXPECTED else lambda p: pen.spectral(p, START, strength=0.3)
    at = {n: t.clone() for n, t in LOCAL.items()}
    if name == "spectral":  # with one singular value far above the others, so that the iteration has come to its end
        for tensor in at.values():
            tensor[0] *= 9
    found, step = grad(penalty)(at), 1e-6
    for tensor, moved in [(n, i) for n, t in at.items() for i in range(t.numel())]:
        ends = []
        for sign in (1, -1):
            other = {n: t.clone() for n, t in at.items()}
            other[tensor].view(-1)[moved] += sign * step
            ends.append(penalty(other).item())
        assert found[tensor].view(-1)[moved].item() == pytest.approx(
            (ends[0] - ends[1]) / (2 * step), rel=1e-6, abs=1e-6
        )


def test_the_spectral_norm_is_the_largest_singular_value():
    made = [torch.diag(torch.tensor(values, dtype=torch.float64)) for values in ([3.0, 1.0, 0.5], [0.2, 4.0])]
    turned = [torch.linalg.qr(rng.normal(k, len(m), len(m), dtype=torch.float64)).Q @ m for k, m in enumerate(made)]
    found = pen.spectral({"a": turned[0], "b": turned[1], "c": torch.ones(9)}, {}, strength=2.0)
    assert found.item() == pytest.approx(9.0 + 16.0, rel=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 6))
def test_the_power_iteration_never_exceeds_the_largest_singular_value(key, rows, columns):
    matrix = rng.normal(key, rows, columns, dtype=torch.float64)
    sigma, exact = pen._sigma(matrix).item(), np.linalg.svd(matrix.numpy(), compute_uv=False)[0]
    assert 0.5 * exact <= sigma <= exact * (1 + 1e-9)


@pytest.mark.parametrize("name", ["l1", "group lasso", "spectral", "orthogonal"])
def test_weights_of_zero_have_finite_gradients(name):
    nothing = {n: torch.zeros_like(t) for n, t in LOCAL.items()}
    penalty = EXPECTED[name][0] if name in EXPECTED else lambda p: pen.spectral(p, START, strength=0.3)
    assert all(bool(torch.isfinite(g).all()) for g in grad(penalty)(nothing).values())


@pytest.mark.parametrize("name", [*EXPECTED, "spectral"])
def test_stacked_clients_get_what_each_gets_alone(name):
    penalty = EXPECTED[name][0] if name in EXPECTED else lambda p: pen.spectral(p, START, strength=0.3)
    several = [params(k) for k in (5, 6, 7)]
    stacked = {n: torch.stack([one[n] for one in several]) for n in SHAPES}
    found = vmap(penalty)(stacked)
    assert found.tolist() == pytest.approx([penalty(one).item() for one in several], rel=1e-12)
