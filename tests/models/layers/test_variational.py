import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers.keyed import key_names, step_keys
from fedsim.models.layers.variational import (
    GaussianDropout,
    SparseDropout,
    beside,
    bounded,
    first_log_sigma2,
    kept,
    log_alphas,
)
from fedsim.models.layers.weights import set_law

INPUTS = {"linear": (5, 6), "conv": (5, 2, 4, 4)}


def layer(kind: str, values: Tensor | None = None) -> nn.Linear | nn.Conv2d:
    """With log alpha of each unit -0.5, -1, ..., unless values are given; sparse with log sigma^2 from -6 to -1."""
    with rng.torch_seeded(1):
        made = {"linear": lambda: nn.Linear(6, 3), "conv": lambda: nn.Conv2d(2, 3, 3, padding=1)}[kind]().double()
    assert isinstance(made, nn.Linear | nn.Conv2d)
    values = torch.tensor([-0.5, -1.0, -1.5]) if values is None else values
    set_law(made, GaussianDropout())
    made.register_parameter("log_alpha", nn.Parameter(values.double()))
    return made


def sparse(kind: str) -> nn.Linear | nn.Conv2d:
    made = layer(kind)
    del made.log_alpha
    made.law = SparseDropout()
    count = made.weight.numel()
    made.register_parameter("log_sigma2", nn.Parameter(torch.linspace(-6, -1, count, dtype=torch.float64)))
    return made


def run(model: nn.Module, x: Tensor, key: int | Tensor) -> Tensor:
    out = functional_call(model, step_keys(key_names(model), key), (x,))
    assert isinstance(out, Tensor)
    return out


def moments(kind: str, made: nn.Linear | nn.Conv2d, variances: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each output, over patches laid out as rows."""
    rows = made.weight.detach().flatten(1)
    patches = x[:, :, None] if kind == "linear" else F.unfold(x, 3, padding=1)  # (batch, in, places)
    mean = torch.einsum("oi,nip->nop", rows, patches) + made.bias.detach()[:, None]
    variance = torch.einsum("oi,nip->nop", variances.reshape(rows.shape), patches**2)
    shape = (len(x), 3) if kind == "linear" else (len(x), 3, 4, 4)
    return mean.reshape(shape), variance.reshape(shape)


def of_units(made: nn.Linear | nn.Conv2d) -> Tensor:
    rows = made.weight.detach().flatten(1)
    return torch.tensor([[math.exp(-0.5)], [math.exp(-1.0)], [math.exp(-1.5)]], dtype=torch.float64) * rows**2


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("form", ["gaussian", "sparse"])
def test_outputs_are_their_mean_and_as_many_deviations_as_the_noise_says(kind: str, form: str) -> None:
    made, x = (layer if form == "gaussian" else sparse)(kind), rng.normal(2, *INPUTS[kind], dtype=torch.float64)
    variances = of_units(made) if form == "gaussian" else torch.exp(made.log_sigma2.detach())
    mean, variance = moments(kind, made, variances, x)
    noise = rng.noise(rng.fold(8, "law"), *mean.shape).double()
    torch.testing.assert_close(run(made, x, 8), mean + (variance + 1e-8).sqrt() * noise, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", INPUTS)
def test_mean_and_variance_are_those_of_noise_on_each_weight(kind: str) -> None:
    """The trick against what it stands for: weights w ~ N(theta, alpha theta^2) drawn one by one. n = 20,000 of each;
    the outputs of two examples, at most 96 x 2 comparisons by 5 standard errors: false alarms below 2e-4, key fixed.
    """
    n, made, x = 20_000, layer(kind), rng.normal(2, *INPUTS[kind], dtype=torch.float64)[:2]
    local = vmap(lambda key: run(made, x, key))(torch.arange(n)).detach()
    weight = made.weight.detach()
    deviations = of_units(made).sqrt().reshape(weight.shape)
    drawn = weight + deviations * rng.normal(5, n, *weight.shape, dtype=torch.float64)
    plain = vmap(lambda w: made.affine(x, w, made.bias))(drawn).detach()  # type: ignore[union-attr]
    error = ((local.var(0) + plain.var(0)) / n).sqrt()
    assert ((local.mean(0) - plain.mean(0)).abs() < 5 * error).all()
    squares = [(one - one.mean(0)).square() for one in (local, plain)]
    error = ((squares[0].var(0) + squares[1].var(0)) / n).sqrt()
    assert ((squares[0].mean(0) - squares[1].mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize("kind", INPUTS)
def test_an_alpha_of_a_layer_or_unit_is_that_of_each_of_its_weights(kind: str) -> None:
    x, entries = rng.normal(2, *INPUTS[kind], dtype=torch.float64), 6 if kind == "linear" else 18
    whole, units, weights = torch.tensor(-0.7), torch.tensor([-0.7, -0.2, -3.0]), torch.linspace(-3, 0, 3 * entries)
    same = run(layer(kind, torch.full((3 * entries,), -0.7)), x, 4)
    assert torch.allclose(run(layer(kind, whole), x, 4), same, rtol=1e-12)
    by_unit = run(layer(kind, units), x, 4)
    assert torch.allclose(by_unit, run(layer(kind, units.repeat_interleave(entries)), x, 4), rtol=1e-12)
    assert not torch.allclose(run(layer(kind, weights), x, 4), by_unit, rtol=1e-3)
    assert beside(weights, layer(kind).weight).shape == layer(kind).weight.shape


def test_alpha_is_at_most_1_and_can_come_back() -> None:
    log_alpha = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    bounded(log_alpha).sum().backward()
    assert bounded(log_alpha).tolist() == [-2.0, 0.0, 0.0]
    assert log_alpha.grad is not None and log_alpha.grad.tolist() == [1.0, 1.0, 1.0]
    x = rng.normal(2, 5, 6, dtype=torch.float64)
    assert torch.equal(run(layer("linear", torch.tensor(9.0)), x, 1), run(layer("linear", torch.tensor(0.0)), x, 1))


@pytest.mark.parametrize("make", [layer, sparse])
def test_an_input_of_zeros_has_finite_gradients(make: object) -> None:
    assert callable(make)
    made = make("linear")
    leaves = [p.detach().clone().requires_grad_() for p in made.parameters()]
    state = dict(zip([n for n, _ in made.named_parameters()], leaves, strict=True))
    x = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    out = functional_call(made, {**state, **step_keys(key_names(made), 1)}, (x,))
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), [x, *leaves]))


def test_evaluation_has_no_noise_and_sparse_leaves_out_what_is_noise() -> None:
    x = rng.normal(2, 5, 6, dtype=torch.float64)
    made, other = layer("linear").eval(), sparse("linear").eval()
    assert torch.equal(run(made, x, 1), F.linear(x, made.weight, made.bias))
    weight, log_sigma2 = other.weight.detach(), other.log_sigma2.detach()
    mask = torch.zeros(18, dtype=torch.bool)
    for i, (w, s) in enumerate(zip(weight.flatten().tolist(), log_sigma2.tolist(), strict=True)):
        mask[i] = s - math.log(w**2 + 1e-8) < 3.0
    assert mask.any() and not mask.all()
    assert torch.equal(kept(weight, log_sigma2), mask.reshape(3, 6))
    assert torch.equal(run(other, x, 1), F.linear(x, weight * mask.reshape(3, 6), other.bias))
    assert kept(weight, log_sigma2, threshold=100.0).all()


def test_first_variances_give_every_weight_the_same_alpha() -> None:
    weight = rng.normal(3, 4, 5, dtype=torch.float64)
    weight[1, 2] = 0.0
    first = first_log_sigma2(weight, 0.25)
    assert first.shape == (20,)
    assert torch.allclose(log_alphas(weight, first).exp(), torch.full((4, 5), 0.25, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("make", [layer, sparse])
def test_rows_added_to_a_batch_change_no_other_row_and_vmap_is_a_loop(kind: str, make: object) -> None:
    assert callable(make)
    made, x = make(kind), rng.normal(5, 3, *INPUTS[kind], dtype=torch.float64)
    assert torch.allclose(run(made, x[0], 2)[:3], run(made, x[0][:3], 2), rtol=1e-12)
    together = vmap(lambda x, key: run(made, x, key))(x, torch.arange(3))
    assert torch.allclose(together, torch.stack([run(made, x[c], c) for c in range(3)]), rtol=1e-12)
