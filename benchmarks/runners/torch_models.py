"""The models in torch, for all runners that train torch modules, and their accuracy."""

import torch
from prepared import Data
from torch import nn


def build(model: str) -> nn.Module:
    """A model by name, with torch's own initialisation, the same in every process."""
    torch.manual_seed(1)
    return nn.Sequential(*_LAYERS[model]())


def _two_nn() -> list[nn.Module]:
    return [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)]


def _linear() -> list[nn.Module]:
    return [nn.Linear(784, 10)]


def _cnn() -> list[nn.Module]:
    """The CNN of McMahan et al. 2017 (arXiv:1602.05629), 1,663,370 parameters."""
    first = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return [*first, *second, nn.Flatten(), nn.Linear(7 * 7 * 64, 512), nn.ReLU(), nn.Linear(512, 10)]


def _pfl_cnn() -> list[nn.Module]:
    """The CNN of pfl-research's image benchmark (Granqvist et al. 2024, arXiv:2404.06430), for 3 x 32 x 32."""
    convolutions = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    return [*convolutions, nn.Flatten(), nn.Linear(14 * 14 * 64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]


_LAYERS = {"2nn": _two_nn, "linear": _linear, "cnn": _cnn, "pfl-cnn": _pfl_cnn}


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test examples that the model gets right."""
    model.eval()
    batches = zip(torch.from_numpy(data.x_test).split(500), torch.from_numpy(data.y_test).split(500), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(data.y_test)
