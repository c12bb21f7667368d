"""The same federation in apple/pfl-research, as its own benchmarks write it: SimulatedBackend and FederatedAveraging.

Run: python -m runners.pfl ..., or with several processes: torchrun --nproc-per-node 2 -m runners.pfl ...
"""

import itertools
import os
import time
from collections.abc import Iterator

import numpy as np
import prepared
import torch
from peers import CORES
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from workloads import BATCH, LR, Workload

from runners import torch_models
from runners.task import answer, parse


class Model(nn.Module):
    """A model with what pfl asks of one: a loss, and metrics of a batch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = torch_models.build(name)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return cross_entropy(self.layers(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Not used in a timed round; pfl evaluates the first round's clients whether one wants it or not."""
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """When training began and when each round ended."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Begin."""
        self.stamps.append(time.perf_counter())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Note the time."""
        self.stamps.append(time.perf_counter())
        return False, Metrics()


def federated(workload: Workload, data: prepared.Data) -> FederatedDataset:
    """Every client's tensors, made once; pfl keeps their batches too, in one order, which spares it the shuffling."""
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    blocks = [prepared.block(workload, client) for client in range(workload.clients)]
    users = [Dataset((x[block], y[block]), user_id=str(client)) for client, block in enumerate(blocks)]

    def cohorts() -> Iterator[int]:
        for number in itertools.count():
            yield from prepared.cohort(workload, number)

    drawn = cohorts()
    return FederatedDataset(users.__getitem__, lambda: next(drawn))


def main() -> None:
    """Time the rounds. With several processes each runs this, and the first answers."""
    task = parse("pfl")
    torch.set_num_threads(CORES if task.variant == "all-threads" else 1)
    np.random.seed(1)  # pfl's processes must draw the same
    data = prepared.load(task.workload)
    module, clock, users = Model(task.workload.model), Clock(), federated(task.workload, data)
    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.total,
            evaluation_frequency=task.total + 1,  # but for the first round, which is never timed
            train_cohort_size=task.workload.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(local_learning_rate=LR, local_num_epochs=1, local_batch_size=BATCH),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
        send_metrics_to_platform=False,  # which prints them
    )
    if os.environ.get("RANK", "0") == "0":
        seconds = np.diff(clock.stamps).tolist()
        accuracy = torch_models.accuracy(module.layers, data)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        threads = torch.get_num_threads()
        answer(task, seconds, accuracy, processes=processes, threads=threads, packages=("pfl", "torch", "numpy"))


if __name__ == "__main__":
    main()
