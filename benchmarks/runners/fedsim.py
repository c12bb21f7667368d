"""The same federation in fedsim, through its Python API. Run: python -m runners.fedsim ..."""

from typing import Any

import numpy as np
import prepared
import torch
from peers import CORES
from torch import Tensor, nn
from workloads import BATCH, LR, WORKLOADS, Workload

from fedsim.config.build import federation
from fedsim.config.load import load
from fedsim.federation import RoundResult, job, run, start
from runners import torch_models
from runners.task import answer, parse


def dataset(*, workload: str) -> tuple[Any, Any, Any, Any]:
    """The workload's examples, for ``data.dataset``."""
    return tuple(prepared.load(WORKLOADS[workload]))


def split(labels: Tensor, num_clients: int) -> list[np.ndarray]:
    """Client after client an equal block, for ``data.split``."""
    return np.split(np.arange(len(labels)), num_clients)


def pfl_cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Pfl's model, for ``model``; fedsim puts its own dropout in the place of torch's."""
    return torch_models.build("pfl-cnn")


def config(workload: Workload, rounds: int, engine: dict[str, Any]) -> dict[str, Any]:
    """The config, as a YAML file would have it."""
    return {
        "name": workload.name,
        "data": {
            "dataset": {"name": "runners.fedsim:dataset", "workload": workload.name},
            "clients": workload.clients,
            "split": {"name": "runners.fedsim:split"},
        },
        "model": {"pfl-cnn": "runners.fedsim:pfl_cnn"}.get(workload.model, workload.model),
        "train": {
            "rounds": rounds + 1,  # fedsim evaluates after the last round, so that one more is run, and not counted
            "eval_every": rounds + 1,
            "clients_per_round": workload.cohort,
            "local_epochs": 1,
            "batch_size": BATCH,
            "optimizer": {"name": "sgd", "lr": LR},
        },
        "engine": engine,
    }


ENGINES: dict[str, dict[str, Any]] = {
    "local": {"name": "local", "workers": CORES},
    "reference": {"name": "reference"},
}


def main() -> None:
    """Time the rounds: ``seconds`` of a round's record."""
    task = parse("fedsim")
    torch.set_num_threads(1)  # as ``fedsim run`` does
    federated, engine = federation(load(config(task.workload, task.total, ENGINES[task.variant])))
    engine = engine.prepared(job(federated), {})  # chooses how to train, and can then say so
    results: list[RoundResult] = []
    run(federated, start(federated), engine, results.append)
    rounds = [result for result in results if 1 <= result.record.round <= task.total]
    accuracy = torch_models.accuracy(trained(federated.work.model, rounds[-1]), prepared.load(task.workload))
    answer(
        task,
        [result.record.seconds for result in rounds],
        accuracy,
        processes=CORES if task.variant == "local" else 1,
        threads=1,
        packages=("fedsim-flower", "torch", "numpy"),
        engine=engine.describe(),
    )


def trained(model: nn.Module, result: RoundResult) -> nn.Module:
    """The model with the parameters that a round left."""
    parameters = result.state.params | result.state.buffers
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    if missing or unexpected:
        raise RuntimeError(f"the state does not fit the model: missing {missing}, unexpected {unexpected}")
    return model


if __name__ == "__main__":
    main()
