"""Small jobs for an engine, built without the config."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from torch import nn

from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Job
from fedsim.models.layers.keyed import key_names
from fedsim.records import Examples, Partition
from fedsim.strategies.strategy import Strategy, fedavg
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import Optimizer, sgd

FEATURES, CLASSES, LENGTH = 5, 3, 6


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.ReLU(), nn.Linear(6, CLASSES))


@pytest.fixture(scope="session")
def job_of() -> Callable[..., Job]:
    """Make a job: unequal clients in a random order of examples; ``tokens`` > 0 gives texts of so many letters."""

    def made(
        model: Callable[[], nn.Module] = _model,
        *,
        sizes: Sequence[int] = (9, 2, 7, 7, 13, 4),
        batch: int | None = 4,
        tokens: int = 0,
        strategy: Strategy | None = None,
        optimizer: Optimizer | None = None,
        cohort: int | None = None,
        tests: int = 30,
        **work: Any,
    ) -> Job:
        def examples(key: int, n: int) -> Examples:
            if tokens:
                texts = (rng.uniform(key, n, LENGTH + 1) * tokens).long()
                return Examples(texts[:, :-1].contiguous(), texts[:, 1:].contiguous())
            return Examples(2 * rng.normal(key, n, FEATURES), (rng.uniform(key + 1, n) * CLASSES).long())

        n, clients, strategy = sum(sizes), len(sizes), strategy or fedavg()
        owners = Partition(np.array([0, *np.cumsum(sizes)]), rng.permutation(7, n).numpy())
        nobody = Partition(np.zeros(clients + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
        test = examples(30, tests)
        data = FederatedData(examples(20, n), test, owners, nobody, test, CLASSES, ())
        with rng.torch_seeded(1):
            built = model()
        own = LocalWork(built, key_names(built), optimizer or sgd(lr=0.1), strategy.local, 2, batch, **work)
        return Job(own, data, strategy, "fail", cohort or clients, 2)

    return made
