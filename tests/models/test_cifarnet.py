import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsim import rng
from fedsim.models.cifarnet import m_cifarnet, m_cifarnet_small
from fedsim.models.cost import macs
from fedsim.models.layers.dropouts import Dropout

SIDES, WIDTHS = (30, 30, 15, 15, 15, 8, 8, 8), (64, 64, 128, 128, 128, 192, 192, 192)


def test_sizes_weights_and_multiply_accumulates_are_the_tables() -> None:
    model = m_cifarnet((3, 32, 32), 10).eval()
    assert isinstance(model, nn.Sequential)
    shapes = []
    x = torch.zeros(1, 3, 32, 32)
    for module in model:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(width, side, side) for width, side in zip(WIDTHS, SIDES, strict=True)]
    weights = [9 * before * width for before, width in zip((3, *WIDTHS), WIDTHS, strict=False)]
    assert sum(weights) == 1_291_968
    counted = sum(n * side**2 for n, side in zip(weights, SIDES, strict=True)) + 1_920
    assert macs(model, (3, 32, 32)) == counted == 174_301_824
    assert [path for path, module in model.named_modules() if isinstance(module, Dropout)] == ["dropout3", "dropout6"]


@pytest.mark.parametrize("size", [(8, 8), (11, 8), (28, 28), (13, 16)])
def test_strides_pad_as_tensorflow_does(size: tuple[int, int]) -> None:
    """total = (ceil(n / 2) - 1) * 2 + 3 - n zeros, the smaller half of them first."""
    with rng.torch_seeded(1):
        model = m_cifarnet_small((1, *size), 4)
    pad, conv = model.get_submodule("pad2"), model.get_submodule("conv2")
    assert isinstance(conv, nn.Conv2d)
    x = rng.normal(1, 2, 16, size[0] - 2, size[1] - 2)
    totals = [(-(-n // 2) - 1) * 2 + 3 - n for n in x.shape[2:]]
    (top, bottom), (left, right) = [(total // 2, total - total // 2) for total in totals]
    expected = F.conv2d(F.pad(x, (left, right, top, bottom)), conv.weight, None, 2)
    torch.testing.assert_close(conv(pad(x)), expected)
    assert expected.shape[2:] == tuple(-(-n // 2) for n in x.shape[2:])


def test_images_must_be_large_enough() -> None:
    with pytest.raises(ValueError, match=r"m-cifarnet-small needs images of at least 3 x 3, got shape \(1, 2, 9\)"):
        m_cifarnet_small((1, 2, 9), 3)
    assert m_cifarnet((1, 3, 3), 3).eval()(torch.zeros(1, 1, 3, 3)).shape == (1, 3)
