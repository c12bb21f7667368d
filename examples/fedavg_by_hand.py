"""FedAvg by hand in a plain loop, on fedsim's data and models only. Run: python examples/fedavg_by_hand.py"""

import copy

import torch
from torch import nn

from fedsim import rng
from fedsim.data.datasets import DATASETS
from fedsim.data.federated import FederatedData, assemble, hold_out
from fedsim.data.splits import SPLITS
from fedsim.models.zoo import MODELS

SEED, CLIENTS, COHORT, ROUNDS, BATCH, LR = 7, 20, 10, 10, 16, 0.1


def federated_digits() -> FederatedData:
    dataset = hold_out(DATASETS["digits"](), 0.2, rng.fold(SEED, "held-out"))
    partition = SPLITS["dirichlet"](dataset.train.labels, CLIENTS, rng.fold(SEED, "split"), alpha=0.3)
    return assemble(dataset, partition, rng.fold(SEED, "feature-noise"))


def train(global_model: nn.Module, data: FederatedData, client: int, key: int) -> nn.Module:
    model, examples = copy.deepcopy(global_model), data.client(client)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in rng.permutation(key, len(examples)).split(BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(examples.inputs[batch]), examples.labels[batch]).backward()
        optimizer.step()
    return model


def main() -> None:
    data = federated_digits()
    with rng.torch_seeded(rng.fold(SEED, "model")):
        model = MODELS["cnn"]((1, 8, 8), 10, channels=[16, 32], kernel=3, hidden=64, norm="group")
    for round in range(1, ROUNDS + 1):
        key = rng.fold(SEED, "round", round)
        cohort = rng.choice(rng.fold(key, "cohort"), CLIENTS, COHORT).tolist()
        trained = [train(model, data, k, rng.fold(key, "client", k)) for k in cohort]
        weights = torch.tensor([len(data.client(k)) for k in cohort], dtype=torch.float32)
        weights /= weights.sum()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(sum(w * m.get_parameter(name) for w, m in zip(weights, trained, strict=True)))
            accuracy = (model(data.test.inputs).argmax(1) == data.test.labels).float().mean()
        print(f"round {round}: accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
