import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers.dropconnect import DropConnect, expected_relu
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names, step_keys
from fedsim.models.layers.weights import add_noise, set_law


def layer(p: float, *, per_example: bool = True, moments: bool = False, bias: bool = True) -> nn.Linear:
    with rng.torch_seeded(1):
        made = nn.Linear(6, 4, bias=bias).double()
    set_law(made, DropConnect(p, per_example=per_example, moments=moments))
    return made


def run(model: nn.Module, x: Tensor, key: int | Tensor) -> Tensor:
    out = functional_call(model, step_keys(key_names(model), key), (x,))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_each_example_has_its_own_mask(shape: tuple[int, ...], bias: bool) -> None:
    """A slow loop over examples, outputs and inputs."""
    p, made, x = 0.3, layer(0.3, bias=bias), rng.normal(2, *shape, dtype=torch.float64)
    got, uniform = run(made, x, 9), rng.uniform(rng.fold(9, "law"), 5 * 4 * 6).tolist()
    weight, shifts = made.weight.detach(), made.bias.tolist() if bias else [0.0] * 4
    for n in range(5):
        rows = x[n].reshape(-1, 6)
        for row, values in enumerate(rows):
            for o in range(4):
                total = shifts[o]
                for i in range(6):
                    if uniform[(n * 4 + o) * 6 + i] >= p:
                        total += float(weight[o, i]) / (1 - p) * float(values[i])
                assert got[n].reshape(-1, 4)[row, o].item() == pytest.approx(total, rel=1e-12, abs=1e-13)


def noisy(kind: str, n: int, x: Tensor) -> tuple[Tensor, nn.Linear]:
    """Outputs (n, 4) for one input under n masks, in either form."""
    if kind == "example":
        made = layer(0.3)
        return run(made, x.expand(n, 6), 4), made
    with rng.torch_seeded(1):
        made = nn.Linear(6, 4).double()
    add_noise(made, "dropconnect", Dropout(0.3))
    outs: Tensor = vmap(lambda key: run(made, x[None], key)[0])(torch.arange(n))
    return outs, made


@pytest.mark.parametrize("kind", ["example", "batch"])
def test_mean_and_variance_over_masks(kind: str) -> None:
    """Mean W x + b, variance p / (1 - p) (W * W)(x * x). n = 40,000 masks; eight comparisons by 5 standard errors,
    estimated from the sample: false alarms below 5e-6, key fixed.
    """
    n, x = 40_000, rng.normal(3, 6, dtype=torch.float64)
    out, made = noisy(kind, n, x)
    weight, bias = made.weight.detach(), made.bias.detach()
    variance = 0.3 / 0.7 * weight.square() @ x.square()
    squares = (out.detach() - (weight @ x + bias)).square()
    assert ((out.mean(0) - (weight @ x + bias)).abs() < 5 * (variance / n).sqrt()).all()
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("m", [-7.0, -0.8, 0.0, 0.3, 4.0])
@pytest.mark.parametrize("s", [0.01, 0.5, 3.0])
def test_the_expected_relu_is_that_of_quadrature(m: float, s: float) -> None:
    top = max(m, 0.0) + 12 * s
    expected, _ = integrate.quad(lambda u: u * stats.norm.pdf(u, m, s), 0.0, top, points=[max(m, 0.0)], epsabs=1e-13)
    found = expected_relu(torch.tensor(m, dtype=torch.float64), torch.tensor(s * s, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_without_variance_the_expected_relu_is_relu_with_finite_gradients() -> None:
    mean = torch.tensor([-2.0, 0.0, 1.5, -1e6, 1e6], requires_grad=True)
    variance = torch.zeros(5, requires_grad=True)
    found = expected_relu(mean, variance)
    assert torch.allclose(found, mean.relu(), atol=1e-10)
    found.sum().backward()
    assert mean.grad is not None and torch.isfinite(mean.grad).all()
    assert variance.grad is not None and torch.isfinite(variance.grad).all()


@pytest.mark.parametrize("per_example", [True, False])
def test_evaluation_with_moments_is_the_mean_over_draws_of_the_unit(per_example: bool) -> None:
    """Monte Carlo as in the paper, n = 200,000; twelve comparisons by 5 standard errors: false alarms below 7e-6."""
    made, x = layer(0.4, per_example=per_example, moments=True).eval(), rng.normal(5, 3, 6, dtype=torch.float64)
    weight, bias = made.weight.detach().numpy(), made.bias.detach().numpy()
    drawn, generator, n = made(x).detach().numpy(), np.random.default_rng(0), 200_000
    for row, values in enumerate(x.numpy()):
        mean, variance = weight @ values + bias, 0.4 / 0.6 * (weight**2 @ values**2)
        relus = np.maximum(generator.normal(mean, np.sqrt(variance), (n, 4)), 0.0)
        assert (np.abs(relus.mean(0) - drawn[row]) < 5 * relus.std(0) / math.sqrt(n)).all()
    assert torch.equal(made(x), run(made, x, 8))


def test_evaluation_with_the_mean_is_the_plain_layer() -> None:
    made, x = layer(0.4).eval(), rng.normal(5, 3, 6, dtype=torch.float64)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))
    trained = layer(0.4, per_example=False, moments=True)
    assert torch.equal(trained(x), nn.functional.linear(x, trained.weight, trained.bias))


def test_rows_added_to_a_batch_change_no_other_row_and_vmap_is_a_loop() -> None:
    made, x = layer(0.4), rng.normal(5, 3, 7, 6, dtype=torch.float64)
    assert torch.allclose(run(made, x[0], 2)[:4], run(made, x[0][:4], 2), rtol=1e-14)
    together = vmap(lambda x, key: run(made, x, key))(x, torch.arange(3))
    assert torch.allclose(together, torch.stack([run(made, x[c], c) for c in range(3)]), rtol=1e-13)
