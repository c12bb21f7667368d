"""A small federation in which everything an engine could lose on the way matters."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import OnNan
from fedsim.federation import Federation
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.records import Broadcast, Examples, Params, Partition
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.local_rule import LocalRule
from fedsim.training.optimizers import sgd

SIZES = (6, 14, 2, 8, 7, 3, 11)  # no last batch of one example, which batch norm refuses


def drifting() -> LocalRule:
    """A rule with a state of several dtypes and shapes, which changes the gradients of the next round."""

    def init(params: Params) -> Params:
        return {"rounds": torch.zeros((), dtype=torch.int64), "drift": torch.zeros(3, 1, dtype=torch.float64)}

    def correct(grads: Params, local: Params, broadcast: Broadcast, state: Params) -> Params:
        factor = 1.0 + 0.1 * float(state["rounds"]) + 0.01 * float(state["drift"].sum())
        return p.scale(grads, factor)

    def finish(local: Params, broadcast: Broadcast, state: Params, num_steps: int) -> Params:
        moved = p.l2_norm(p.sub(local, broadcast.params))
        return {"rounds": state["rounds"] + 1, "drift": state["drift"] + moved * torch.tensor([[1.0], [-2.0], [0.5]])}

    return LocalRule(init, correct, finish)


def examples(key: int, n: int) -> Examples:
    inputs = rng.normal(rng.fold(key, "x"), n, 4)
    return Examples(inputs, (inputs[:, 0] - inputs[:, 1] > 0).long())


@pytest.fixture
def federation() -> Callable[..., Federation]:
    """Momentum, unequal clients, batch norm, keyed dropout, client state; ``broken`` clients hold infinite inputs."""

    def make(broken: tuple[int, ...] = (), on_nan: OnNan = "fail", rounds: int = 3, times: int = 1) -> Federation:
        sizes = SIZES * times
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), Dropout(0.3), nn.Linear(6, 2))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.5 * rng.normal(rng.fold(3, name), *parameter.shape))
        n = sum(sizes)
        partition = Partition(np.concatenate([[0], np.cumsum(sizes)]), rng.permutation(4, n).numpy())
        train, test = examples(1, n), examples(2, 20)
        for client in broken:
            train.inputs[torch.from_numpy(partition.client(client))] = torch.inf
        owners = Partition(np.linspace(0, 20, len(sizes) + 1).astype(np.int64), np.arange(20))
        data = FederatedData(train, test, partition, owners, test, 2, ("no", "yes"))
        work = LocalWork(model, key_names(model), sgd(lr=0.1, momentum=0.9), drifting(), local_epochs=2, batch_size=4)
        strategy = replace(fedavg(server_lr=0.7), local=drifting())
        return Federation(7, data, work, strategy, rounds, 5 * times, "fixed", 1, on_nan)

    return make
