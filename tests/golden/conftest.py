"""A small federation in float64, built without the config, so that results can be held to 1e-12."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.data.federated import FederatedData
from fedsim.federation import Federation
from fedsim.models.layers.keyed import key_names
from fedsim.records import Examples, Partition
from fedsim.strategies.strategy import Strategy
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import Optimizer

FEATURES, CLASSES = 4, 3
SIZES = (7, 2, 11)


def _examples(draws: np.random.Generator, n: int) -> Examples:
    inputs = torch.from_numpy(draws.normal(scale=2.0, size=(n, FEATURES)))  # both signs
    return Examples(inputs, torch.from_numpy(draws.integers(0, CLASSES, size=n)))


def softmax_regression() -> nn.Module:
    """Linear layer with weights of both signs."""
    model = nn.Linear(FEATURES, CLASSES).double()
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-0.5, 0.7, FEATURES * CLASSES).reshape(CLASSES, FEATURES))
        model.bias.copy_(torch.tensor([0.3, -0.2, 0.05]))
    return model


@pytest.fixture
def build() -> Callable[..., Federation]:
    """Make a federation of clients with 7, 2 and 11 examples, or other sizes."""

    def made(
        strategy: Strategy,
        optimizer: Optimizer,
        *,
        sizes: tuple[int, ...] = SIZES,
        epochs: int = 1,
        batch_size: int | None = None,
        rounds: int = 1,
        model: nn.Module | None = None,
        seed: int = 5,
    ) -> Federation:
        draws = np.random.default_rng(0)
        train, test = _examples(draws, sum(sizes)), _examples(draws, 6)
        indices = draws.permutation(sum(sizes))
        owners = Partition(np.array([0, *np.cumsum(sizes)]), indices)
        nobody = Partition(np.zeros(len(sizes) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
        data = FederatedData(train, test, owners, nobody, test, CLASSES, ())
        model = softmax_regression() if model is None else model
        work = LocalWork(model, key_names(model), optimizer, strategy.local, epochs, batch_size)
        return Federation(seed, data, work, strategy, rounds, len(sizes), "fixed", 1, "fail")

    return made
