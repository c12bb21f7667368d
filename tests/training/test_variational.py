import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch.func import vmap

from fedsim import rng
from fedsim.models.layers.variational import log_alphas
from fedsim.training import variational
from fedsim.training.objective import Start
from fedsim.training.variational import bounded_divergence, divergence


def true_divergence(alpha: float) -> float:
    """``-0.5 log alpha + E log |e|, e ~ N(1, alpha)`` by quadrature, over t with ``e = +-t^2``: no pole at e = 0."""

    def integrand(t: float, sign: float) -> float:
        density = math.exp(-((sign * t * t - 1.0) ** 2) / (2 * alpha)) / math.sqrt(2 * math.pi * alpha)
        return 2 * t * math.log(t * t) * density if t else 0.0

    top = math.sqrt(1.0 + 12.0 * math.sqrt(alpha))
    parts = [integrate.quad(integrand, 0.0, top, args=(sign,), points=[1.0], limit=200)[0] for sign in (1.0, -1.0)]
    return -0.5 * math.log(alpha) + sum(parts)


@pytest.mark.parametrize(("formula", "top", "within"), [(bounded_divergence, 1.0, 0.007), (divergence, 10.0, 0.006)])
def test_the_divergences_are_those_of_quadrature_but_for_a_constant(formula: object, top: float, within: float) -> None:
    assert callable(formula)
    alphas = np.geomspace(0.05, top, 40)
    found = formula(torch.tensor(np.log(alphas))).numpy()
    gap = found - np.array([true_divergence(float(alpha)) for alpha in alphas])
    assert gap.max() - gap.min() < 2 * within


def test_beyond_1_the_cubic_is_constant_and_the_other_falls_to_0() -> None:
    log_alpha = torch.tensor([0.0, 0.5, 30.0], requires_grad=True)
    values = bounded_divergence(log_alpha)
    assert values.tolist() == [values[0].item()] * 3
    (slope,) = torch.autograd.grad(values[1:].sum(), log_alpha)
    assert not slope.any()
    far = divergence(torch.tensor([-50.0, 0.0, 5.0, 20.0, 60.0], dtype=torch.float64))
    assert (far.diff() < 0).all() and far[-1].item() == pytest.approx(0.0, abs=1e-12)
    assert far[0].item() == pytest.approx(25.0 + 0.63576, abs=1e-6)


PARAMS = {
    "fc1.weight": rng.normal(1, 3, 4, dtype=torch.float64),
    "fc1.bias": rng.normal(2, 3, dtype=torch.float64),
    "fc1.log_alpha": torch.tensor([-0.3, -2.0, -1.0], dtype=torch.float64),
    "a.conv.weight": rng.normal(3, 2, 1, 3, 3, dtype=torch.float64),
    "a.conv.log_alpha": torch.tensor(-0.4, dtype=torch.float64),
    "head.weight": rng.normal(4, 5, 3, dtype=torch.float64),
}


def test_the_penalty_is_the_sum_over_weights_by_the_clients_examples() -> None:
    total = sum(4 * bounded_divergence(torch.tensor(v)).item() for v in (-0.3, -2.0, -1.0))
    total += 18 * bounded_divergence(torch.tensor(-0.4)).item()
    for n in (37, torch.tensor(37)):
        assert variational.gaussian(PARAMS, Start({}, n), strength=0.5).item() == pytest.approx(
            0.5 * total / 37, rel=1e-6
        )
    by_weight = dict(PARAMS)
    by_weight["fc1.log_alpha"] = PARAMS["fc1.log_alpha"].repeat_interleave(4)
    by_weight["a.conv.log_alpha"] = PARAMS["a.conv.log_alpha"].repeat(18)
    same = [variational.gaussian(one, Start({}, 9), strength=1.0).item() for one in (PARAMS, by_weight)]
    assert same[0] == pytest.approx(same[1], rel=1e-12)


def test_the_sparse_penalty_is_the_sum_over_weights_too() -> None:
    params = {n: t for n, t in PARAMS.items() if "alpha" not in n}
    params["fc1.log_sigma2"] = torch.linspace(-5, 1, 12, dtype=torch.float64)
    weights = zip(params["fc1.weight"].flatten().tolist(), params["fc1.log_sigma2"].tolist(), strict=True)
    total = 0.0
    for w, s in weights:
        log_alpha = s - math.log(w * w + 1e-8)
        gate = 1 / (1 + math.exp(-(1.87320 + 1.48695 * log_alpha)))
        total += 0.63576 - 0.63576 * gate + 0.5 * math.log1p(math.exp(-log_alpha))
    assert variational.sparse(params, Start({}, 20), strength=3.0).item() == pytest.approx(3 * total / 20, rel=1e-12)
    assert log_alphas(params["fc1.weight"], params["fc1.log_sigma2"]).shape == (3, 4)


@pytest.mark.parametrize("name", ["log_alpha", "log_sigma2"])
def test_under_vmap_each_client_has_its_own_parameters_and_size(name: str) -> None:
    penalty = variational.gaussian if name == "log_alpha" else variational.sparse
    stacked = {
        "fc.weight": rng.normal(1, 3, 4, 5, dtype=torch.float64),
        f"fc.{name}": -rng.normal(2, 3, 20, dtype=torch.float64).abs(),
    }
    sizes = torch.tensor([3, 8, 50])
    together = vmap(lambda local, n: penalty(local, Start({}, n), strength=1.0))(stacked, sizes)
    alone = [penalty({n: t[c] for n, t in stacked.items()}, Start({}, int(sizes[c])), strength=1.0) for c in range(3)]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-12)
