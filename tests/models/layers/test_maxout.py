import pytest
import torch
from torch import nn

from fedsim import rng
from fedsim.models.layers.maxout import Maxout, widen


def test_the_largest_piece_of_each_unit_by_a_slow_loop() -> None:
    x = rng.normal(1, 4, 2, 15)
    got = Maxout(3, -1)(x)
    for index in [(n, t, i) for n in range(4) for t in range(2) for i in range(5)]:
        n, t, i = index
        assert got[index].item() == max(x[n, t, 3 * i + j].item() for j in range(3))
    maps = rng.normal(2, 2, 6, 3, 4)
    pooled = Maxout(2, -3)(maps)
    for n, c, h, w in [(n, c, h, w) for n in range(2) for c in range(3) for h in range(3) for w in range(4)]:
        assert pooled[n, c, h, w].item() == max(maps[n, 2 * c, h, w].item(), maps[n, 2 * c + 1, h, w].item())


def test_equal_pieces_share_the_gradient() -> None:
    x = torch.tensor([[2.0, 2.0, -1.0, 0.5]], requires_grad=True)
    Maxout(2, -1)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.5, 0.5, 0.0, 1.0]]


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_widening_keeps_each_output_as_the_first_piece_of_its_unit(make: object, dtype: torch.dtype) -> None:
    assert callable(make)
    with rng.torch_seeded(1):
        layer = make().to(dtype)
    x = rng.normal(3, 2, *((5,) if isinstance(layer, nn.Linear) else (4, 7, 7)), dtype=dtype)
    before, state = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.weight.requires_grad_(False)
    with rng.torch_seeded(2):
        widen(layer, 3)
    out = layer(x)
    assert torch.allclose(out[:, ::3], before, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor[::3], state[name]) for name, tensor in layer.state_dict().items())
    assert not layer.weight.requires_grad and layer.bias.requires_grad and layer.weight.dtype == dtype
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert width == len(layer.weight) == len(layer.bias) == out.shape[1]


def test_new_pieces_are_drawn_as_torch_draws_a_layer_of_the_same_inputs() -> None:
    """Uniform within 1 / sqrt(in): n = 60,000 weights; 5 standard errors of the variance: false alarms below 6e-7."""
    layer = nn.Linear(300, 100, bias=False)
    with rng.torch_seeded(2):
        widen(layer, 3)
    rows = layer.weight.detach().double().view(100, 3, 300)
    new = rows[:, 1:]
    bound = 300**-0.5
    assert new.abs().max() <= bound
    assert abs(new.square().mean().item() - bound**2 / 3) < 5 * new.square().std().item() / new.numel() ** 0.5
    assert not torch.equal(rows[:, 1], rows[:, 2]) and not torch.equal(rows[:, 0], rows[:, 1])
    again = nn.Linear(300, 100, bias=False)
    with rng.torch_seeded(2):
        widen(again, 3)
    assert torch.equal(again.weight.view(100, 3, 300)[:, 1:], layer.weight.view(100, 3, 300)[:, 1:])
