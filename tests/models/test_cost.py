import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim import rng
from fedsim.models.cost import ELSEWHERE, LayerCost, costs, effective_macs, macs
from fedsim.models.fixup import fixup
from fedsim.models.layers.lstm import plain_cells
from fedsim.models.zoo import MODELS

MNIST = (1, 28, 28)


def built(name: str, shape=MNIST, classes: int = 10, **keys) -> nn.Module:
    with rng.torch_seeded(1):
        return MODELS[name](input_shape=shape, num_classes=classes, **keys)


def table(found: list[LayerCost]) -> list[tuple]:
    return [(one.path, one.kind, one.weight_shape, one.parameters, one.macs) for one in found]


def test_the_two_hidden_layers_of_the_fedavg_paper_by_hand() -> None:
    found = costs(built("2nn"), MNIST)
    assert table(found) == [
        ("fc1", "Linear", (200, 784), 784 * 200 + 200, 784 * 200),
        ("fc2", "Linear", (200, 200), 200 * 200 + 200, 200 * 200),
        ("head", "Linear", (10, 200), 200 * 10 + 10, 200 * 10),
    ]
    assert sum(one.parameters for one in found) == 199_210
    assert macs(built("2nn"), MNIST) == 784 * 200 + 200 * 200 + 200 * 10


def test_the_cnn_of_the_fedavg_paper_by_hand() -> None:
    found = costs(built("cnn"), MNIST)
    assert table(found) == [
        ("conv1", "Conv2d", (32, 1, 5, 5), 832, 32 * 25 * 28 * 28),
        ("conv2", "Conv2d", (64, 32, 5, 5), 51_264, 64 * 32 * 25 * 14 * 14),
        ("fc1", "Linear", (512, 3136), 1_606_144, 3136 * 512),
        ("head", "Linear", (10, 512), 5130, 5120),
    ]
    assert sum(one.parameters for one in found) == 1_663_370


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("linear", "char-lstm")])
def test_totals_are_half_of_what_torch_counts_and_all_parameters(name: str, norm: str) -> None:
    shape = (3, 16, 12)
    model = built(name, shape, norm=norm).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    found = costs(model, shape)
    assert 2 * sum(one.macs for one in found) == counter.get_total_flops() == 2 * macs(model, shape)
    assert sum(one.parameters for one in found) == sum(q.numel() for q in model.parameters())
    assert ELSEWHERE not in {one.path for one in found}
    assert all(one.macs == 0 for one in found if "Norm" in one.kind)


@pytest.mark.parametrize("plain", [False, True])
def test_the_character_lstm_by_hand(plain: bool) -> None:
    model = built("char-lstm", (7,), 11, embedding=3, hidden=5, layers=2)
    if plain:
        plain_cells(model.lstm)
    layers = [4 * 5 * (3 + 5), 4 * 5 * (5 + 5)]
    assert table(costs(model, (7,))) == [
        ("embedding", "Embedding", (11, 3), 33, 0),
        ("lstm", "Lstm" if plain else "LSTM", (20, 3), sum(layers) + 4 * 20, 7 * sum(layers)),
        ("head", "Linear", (11, 5), 66, 7 * 55),
    ]


def slowly(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Products that a convolution makes of one example, one by one, with padding; and those with a weight not 0."""
    made = effective = 0
    height, width = conv(x).shape[2:]
    for _ in itertools.product(range(height), range(width)):
        for weight in conv.weight.flatten().tolist():
            made += 1
            effective += weight != 0
    return made, effective


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 2, "groups": 2, "dilation": 2},
        {"kernel_size": 1, "groups": 4, "bias": False},
    ],
)
def test_convolutions_equal_a_slow_count(options) -> None:
    conv, x = nn.Conv2d(4, 8, **options), torch.zeros(1, 4, 6, 5)
    with torch.no_grad():
        conv.weight[rng.uniform(3, *conv.weight.shape) < 0.4] = 0.0
    (found,) = costs(conv, (4, 6, 5))
    assert (found.macs, found.effective_macs) == slowly(conv, x)
    assert 0 < found.effective_macs < found.macs
    with FlopCounterMode(display=False) as counter:
        conv(x)
    assert 2 * found.macs == counter.get_total_flops()


def test_transposed_convolutions_and_recurrent_layers_are_half_of_what_torch_counts() -> None:
    layers = [
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 3)),
        (nn.Conv1d(4, 6, 3, stride=2), (4, 9)),
        (nn.GRU(4, 6, num_layers=2, bidirectional=True, batch_first=True), (9, 4)),
        (nn.LSTM(4, 6, proj_size=3, batch_first=True), (9, 4)),
    ]
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # of oneDNN's LSTM the counter sees nothing
    try:
        for layer, shape in layers:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer(torch.zeros(1, *shape))
            assert [one.path for one in costs(layer, shape)] == [""]
            assert 2 * macs(layer, shape) == counter.get_total_flops()
    finally:
        torch.backends.mkldnn.enabled = before


def test_zeros_take_away_effective_macs_of_every_use_of_the_weight() -> None:
    model = built("cnn", channels=[2, 3], kernel=3, hidden=4)
    with torch.no_grad():
        model.conv2.weight[0] = 0.0
        model.fc1.weight[:, :40] = 0.0
        model.fc1.bias[1] = 0.0
    conv1, conv2, fc1, head = costs(model, MNIST)
    assert conv2.effective_macs == conv2.macs * 2 // 3 == 2 * 2 * 9 * 14 * 14
    assert fc1.effective_macs == fc1.macs - 4 * 40
    assert (conv2.nonzeros, fc1.nonzeros) == (conv2.parameters - 18, fc1.parameters - 161)
    assert effective_macs(model, MNIST) == sum(one.effective_macs for one in (conv1, conv2, fc1, head))
    assert macs(model, MNIST) == macs(built("cnn", channels=[2, 3], kernel=3, hidden=4), MNIST)


class Attention(nn.Module):
    """Products in its own code, a layer called twice, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.first(x))) * self.scale
        return self.head(F.softmax(x @ x.mT, -1) @ x)


def test_calls_count_each_time_shared_weights_once_and_products_of_code_apart() -> None:
    found = costs(Attention(), (4, 6))
    assert table(found) == [
        ("", "Attention", (6,), 6, 0),
        ("first", "Linear", (6, 6), 42, 2 * 4 * 36),
        ("second", "Linear", (6, 6), 0, 4 * 36),
        ("head", "Linear", (3, 6), 21, 4 * 18),
        (ELSEWHERE, "products", (), 0, 2 * 4 * 4 * 6),
    ]
    assert sum(one.parameters for one in found) == sum(q.numel() for q in Attention().parameters())


def test_scalars_of_fixup_and_frozen_parameters_are_parameters() -> None:
    model = built("resnet-8", norm="none")
    fixup(model)
    found = costs(model.requires_grad_(False), MNIST)
    assert sum(one.parameters for one in found) == sum(q.numel() for q in model.parameters())
    assert sum(one.nonzeros for one in found) == sum(int(q.count_nonzero()) for q in model.parameters())
    assert {"FixupBlock", "Shift"} <= {one.kind for one in found}


def test_the_model_and_torchs_switch_stay_as_they_are() -> None:
    model = built("cnn", channels=[2], kernel=3, norm="batch").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    costs(model, MNIST)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    costs(model, MNIST)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    switch = torch.backends.mkldnn.enabled
    try:
        for torch.backends.mkldnn.enabled in (True, False):
            given = torch.backends.mkldnn.enabled
            costs(model, MNIST)
            assert torch.backends.mkldnn.enabled == given
            with pytest.raises(
                ValueError, match=r"^the model cannot be called with an input \(5,\) of torch\.float32: "
            ):
                macs(model, (5,))
            assert torch.backends.mkldnn.enabled == given
    finally:
        torch.backends.mkldnn.enabled = switch


def test_float64_and_given_types_of_input_are_taken() -> None:
    assert macs(built("2nn").double(), MNIST) == macs(built("2nn"), MNIST)
    looked_up = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 3))
    assert macs(looked_up, (4,)) == macs(looked_up, (4,), torch.int32) == 4 * 6
