import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedsim import params, rng
from fedsim.models.layers.fbs import Gate, GatedConv2d, count, gate, saliency, winners

DTYPES = [torch.float32, torch.float64]


def conv_of(norm: nn.Module | None, density: float = 0.5, dtype: torch.dtype = torch.float64) -> GatedConv2d:
    """3 to 7 channels, with predictors large enough to close some gates and to tell examples apart."""
    with rng.torch_seeded(1):
        conv = nn.Conv2d(3, 7, 3, stride=2, padding=1)
        gate(conv, norm)
    assert isinstance(conv, GatedConv2d)
    with torch.no_grad():
        conv.gate.phi.copy_(5.0 * rng.normal(2, 3, 7))
        conv.gate.rho.copy_(rng.normal(3, 7))
        conv.beta.copy_(rng.normal(4, 7))
        conv.density.fill_(density)
    return conv.to(dtype)


def images(n: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return rng.normal(9, n, 3, 5, 6, dtype=torch.float64).to(dtype)


@torch.no_grad()
def slowly(conv: GatedConv2d, x: Tensor, normed: Tensor, k: int) -> Tensor:
    """Example by example, channel by channel, in Python; ``normed`` are the normalised convolutions."""
    result = torch.zeros_like(normed)
    for b in range(len(x)):
        means = [sum(abs(v) for v in channel.flatten().tolist()) / channel.numel() for channel in x[b]]
        g = []
        for j in range(conv.out_channels):
            total = sum(means[i] * float(conv.gate.phi[i, j]) for i in range(len(means)))
            g.append(max(0.0, total + float(conv.gate.rho[j])))
        for j in sorted(range(len(g)), key=lambda j: (-g[j], j))[:k]:
            result[b, j] = g[j] * (normed[b, j] + conv.beta[j])
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("density", "k"), [(0.1, 1), (0.3, 3), (0.5, 4), (5 / 7, 5), (1.0, 7)])
def test_it_is_the_slow_loop(dtype: torch.dtype, density: float, k: int) -> None:
    conv, x = conv_of(None, density, dtype), images(dtype=dtype)
    y = conv(x)
    expected = slowly(conv, x, F.conv2d(x, conv.weight, None, 2, 1), k)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)
    open_channels = (y != 0).flatten(2).any(-1).sum(-1)
    assert int(open_channels.max()) <= k


def test_batch_norm_is_of_whole_convolutions_and_inside_the_gate() -> None:
    conv, x = conv_of(nn.BatchNorm2d(7)), images()
    raw = F.conv2d(x, conv.weight, None, 2, 1)
    assert len({tuple(row) for row in (conv(x) != 0).flatten(2).any(-1).tolist()}) > 1  # examples differ
    conv = conv_of(nn.BatchNorm2d(7))
    mean, variance = raw.mean((0, 2, 3), keepdim=True), raw.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(conv(x), slowly(conv, x, (raw - mean) / (variance + 1e-5).sqrt(), 4))
    norm = conv.norm
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * mean.flatten())
    running = (raw - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    conv.eval()
    torch.testing.assert_close(conv(x), slowly(conv, x, running, 4))
    assert torch.equal(conv(x), conv(x))


def test_group_norm_takes_each_example_alone() -> None:
    conv, x = conv_of(nn.GroupNorm(1, 7)), images()
    torch.testing.assert_close(conv(x), torch.cat([conv(one[None]) for one in x]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_open_gates_of_one_are_plain_batch_norm(dtype: torch.dtype) -> None:
    conv, plain = conv_of(nn.BatchNorm2d(7), 1.0, dtype), nn.BatchNorm2d(7).to(dtype)
    with torch.no_grad():
        conv.gate.phi.zero_()
        conv.gate.rho.fill_(1.0)
        plain.bias.copy_(conv.beta)
    x = images(dtype=dtype)
    torch.testing.assert_close(conv(x), plain(F.conv2d(x, conv.weight, None, 2, 1)))


def test_what_it_starts_from() -> None:
    with rng.torch_seeded(5):
        conv, bare = nn.Conv2d(40, 50, 3), nn.Conv2d(2, 3, 3)
        weight, bias = conv.weight.detach().clone(), bare.bias
        assert bias is not None
        gate(conv, nn.BatchNorm2d(50))
        gate(bare, None)
    assert isinstance(conv, GatedConv2d) and isinstance(bare, GatedConv2d)
    assert torch.equal(conv.weight, weight) and conv.bias is None
    assert {name for name, _ in conv.named_parameters()} == {"weight", "gate.phi", "gate.rho", "beta"}
    assert torch.equal(conv.gate.rho, torch.ones(50)) and torch.equal(conv.beta, torch.full((50,), 0.1))
    assert torch.equal(bare.beta, bias)
    phi = conv.gate.phi.detach()
    assert float(phi.abs().max()) <= 0.1 and abs(float(phi.mean())) < 0.005
    assert 0.040 < float(phi.std()) < 0.048  # 0.05, cut at two of it, is 0.044
    assert "density" in conv.state_dict() and float(conv.density) == 1.0


def test_saliency_is_of_magnitudes() -> None:
    x = torch.tensor([[[[1.0, -1.0]], [[-3.0, 0.0]]]])
    assert saliency(x).tolist() == [[1.0, 1.5]]
    assert float(Gate(2, 3)(saliency(x)).detach().min()) >= 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1, max_size=9), st.integers(1, 100))
def test_winners_are_the_largest_and_the_first_of_equals(values: list[float], percent: int) -> None:
    k = math.ceil(round(percent * len(values) / 100, 6))
    expected = sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:k])
    for dtype in DTYPES:
        found = winners(torch.tensor([values]).to(dtype), torch.tensor(percent / 100))
        assert found[0].nonzero().flatten().tolist() == expected


def test_of_many_equal_gates_the_first_win() -> None:
    found = winners(torch.tensor([[1.0] * 300 + [2.0] + [1.0] * 300]), torch.tensor(0.5))
    assert found[0].nonzero().flatten().tolist() == [*range(300), 300]


def test_counts_are_exact_where_floats_are_not() -> None:
    for channels in (1, 7, 10, 64, 100, 192, 512):
        for percent in range(1, 101):
            exact = -(-percent * channels // 100)
            for dtype in DTYPES:
                assert int(count(torch.tensor(percent / 100, dtype=dtype), channels)) == exact


def test_gradients_are_finite_differences_of_the_kept_ones() -> None:
    conv, x = conv_of(nn.GroupNorm(1, 7)), images(3)
    trainable = params.of(conv)[0]
    target = rng.normal(11, *conv(x).shape, dtype=torch.float64)

    def loss(values: dict[str, Tensor]) -> Tensor:
        returned: Tensor = functional_call(conv, values, (x,))
        return (F.relu(returned) * target).sum()

    found = grad(loss)(trainable)
    for name, tensor in trainable.items():
        for index in range(0, tensor.numel(), 5):
            step = torch.zeros_like(tensor).view(-1)
            step[index] = 1e-6
            ends = [loss({**trainable, name: tensor + sign * step.view_as(tensor)}) for sign in (1, -1)]
            assert float(found[name].view(-1)[index]) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-6)
    assert bool((found["gate.phi"] != 0).any())


def test_vmap_over_clients_with_densities_of_their_own_is_the_loop() -> None:
    conv = conv_of(nn.BatchNorm2d(7))
    trainable, buffers = params.of(conv)
    state = {**trainable, **buffers}
    clients = {
        n: torch.stack([t + 0.1 * i * rng.normal(i, *t.shape).to(t) if n in trainable else t for i in range(3)])
        for n, t in state.items()
    }
    clients["density"] = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    x = rng.normal(4, 3, 5, 3, 5, 6, dtype=torch.float64)

    def loss(own: dict[str, Tensor], rest: dict[str, Tensor], inputs: Tensor) -> Tensor:
        returned: Tensor = functional_call(conv, {**own, **{n: t.clone() for n, t in rest.items()}}, (inputs,))
        return F.relu(returned).square().sum()

    own, rest = ({n: clients[n] for n in part} for part in (trainable, buffers))
    mapped = vmap(grad(loss))(own, rest, x)
    for i in range(3):
        alone = grad(loss)(params.lanes(own, i), params.lanes(rest, i), x[i])
        for name, tensor in alone.items():
            torch.testing.assert_close(mapped[name][i], tensor)
