"""Flower's own strategies run unmodified on the in-process grid, with a small model that really learns."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as s
from torch import nn

from fedsim import rng
from fedsim.engines.flower.arrays import lazy_arrays
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import quick_collections, quiet_log, task_identity
from fedsim.engines.flower.seeding import seeded

CLIENTS, ROUNDS = 8, 6
WEIGHTS = rng.normal(1, 4, 2)


def data(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """5 to 40 examples of one rule, on inputs that lie somewhere else for each client."""
    inputs = rng.normal(rng.fold(2, client), 5 * (client + 1), 4) + rng.normal(rng.fold(3, client), 4)
    return inputs, (inputs @ WEIGHTS).argmax(1)


def model() -> nn.Module:
    with rng.torch_seeded(5):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def client_app(mods: list[Any]) -> ClientApp:
    app = ClientApp()

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        net, (inputs, labels) = model(), data(int(context.node_config["partition-id"]))
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        before = nn.functional.cross_entropy(net(inputs), labels).item()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(labels), "train_loss": before})
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        net, (inputs, labels) = model(), data(int(context.node_config["partition-id"]))
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        correct = (net(inputs).argmax(1) == labels).float().mean().item()
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": correct})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@dataclass(frozen=True)
class Case:
    """A strategy and the mods that it wants at its clients."""

    make: Callable[[], s.Strategy]
    mods: tuple[Any, ...] = ()


CASES = {
    "FedAvg": Case(s.FedAvg),
    "FedAvg, half": Case(lambda: s.FedAvg(fraction_train=0.5, fraction_evaluate=0.25)),
    "FedAvgM": Case(lambda: s.FedAvgM(server_momentum=0.5)),
    "FedProx": Case(lambda: s.FedProx(proximal_mu=0.1)),
    "FedAdam": Case(lambda: s.FedAdam(eta=0.1, tau=0.01)),
    "FedAdagrad": Case(lambda: s.FedAdagrad(eta=0.1, tau=0.01)),
    "FedYogi": Case(lambda: s.FedYogi(eta=0.1, tau=0.01)),
    "FedMedian": Case(s.FedMedian),
    "FedTrimmedAvg": Case(lambda: s.FedTrimmedAvg(beta=0.2)),
    "Krum": Case(lambda: s.Krum(num_malicious_nodes=1)),
    "MultiKrum": Case(lambda: s.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=5)),
    "Bulyan": Case(lambda: s.Bulyan(num_malicious_nodes=1)),
    "QFedAvg": Case(lambda: s.QFedAvg(client_learning_rate=0.5, q=0.1)),
    "server-side fixed": Case(lambda: s.DifferentialPrivacyServerSideFixedClipping(s.FedAvg(), 0.01, 5.0, CLIENTS)),
    "server-side adaptive": Case(
        lambda: s.DifferentialPrivacyServerSideAdaptiveClipping(s.FedAvg(), 0.01, CLIENTS, initial_clipping_norm=5.0)
    ),
    "client-side fixed": Case(
        lambda: s.DifferentialPrivacyClientSideFixedClipping(s.FedAvg(), 0.01, 5.0, CLIENTS), (fixedclipping_mod,)
    ),
    "client-side adaptive": Case(
        lambda: s.DifferentialPrivacyClientSideAdaptiveClipping(s.FedAvg(), 0.01, CLIENTS, initial_clipping_norm=5.0),
        (adaptiveclipping_mod,),
    ),
}
DRAWS = ("FedAvg, half", "server-side fixed", "client-side adaptive")


def result(case: Case, seed: int = 1, rounds: int = ROUNDS) -> s.Result:
    grid = InProcessGrid(client_app(list(case.mods)), CLIENTS)
    with task_identity(), quiet_log(), quick_collections(), lazy_arrays(), seeded(seed):
        return case.make().start(grid, ArrayRecord(model().state_dict()), num_rounds=rounds)


def bits(found: s.Result) -> dict[str, bytes]:
    return {name: array.data for name, array in found.arrays.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_strategy_learns_and_repeats_bit_for_bit(name: str) -> None:
    first, again = result(CASES[name]), result(CASES[name])
    accuracies = [float(first.evaluate_metrics_clientapp[r]["accuracy"]) for r in range(1, ROUNDS + 1)]  # type: ignore[arg-type]
    assert accuracies[-1] > 0.75, accuracies
    losses = [float(first.train_metrics_clientapp[r]["train_loss"]) for r in range(1, ROUNDS + 1)]  # type: ignore[arg-type]
    assert losses[-1] < losses[0]
    assert bits(first) == bits(again)
    assert first.train_metrics_clientapp == again.train_metrics_clientapp
    assert first.evaluate_metrics_clientapp == again.evaluate_metrics_clientapp


@pytest.mark.parametrize("name", DRAWS)
def test_another_seed_gives_another_result_where_a_strategy_draws(name: str) -> None:
    assert bits(result(CASES[name], rounds=2)) != bits(result(CASES[name], seed=2, rounds=2))


def test_fedavg_is_the_mean_weighted_by_examples() -> None:
    expected = {name: np.zeros(t.shape) for name, t in model().state_dict().items()}
    for client in range(CLIENTS):
        grid = InProcessGrid(client_app([]), CLIENTS)
        content = {"arrays": ArrayRecord(model().state_dict()), "config": ConfigRecord({"server-round": 1})}
        with task_identity():
            (reply,) = grid.send_and_receive([Message(RecordDict(content), grid.nodes[client], "train")])
        for name, array in reply.content.array_records["arrays"].items():
            expected[name] += array.numpy().astype(np.float64) * 5 * (client + 1) / sum(range(5, 45, 5))
    found = result(CASES["FedAvg"], rounds=1)
    for name, values in expected.items():
        np.testing.assert_allclose(found.arrays[name].numpy(), values, rtol=0, atol=1e-6)


def test_lazy_arrays_change_no_bit_of_a_result() -> None:
    grid = InProcessGrid(client_app([]), CLIENTS)
    with task_identity(), quiet_log(), seeded(1):  # Flower samples in a random order, in which it then adds up
        stock = s.FedAvg().start(grid, ArrayRecord(model().state_dict()), num_rounds=2)
    assert bits(stock) == bits(result(CASES["FedAvg"], rounds=2))


def test_seeding_puts_the_global_generators_back() -> None:
    def draws() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with seeded(3):
        first = draws()
    with pytest.raises(KeyError), seeded(3):
        assert draws() == first
        raise KeyError
    with seeded(4):
        assert all(a != b for a, b in zip(draws(), first, strict=True))
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])
    with seeded(None):
        assert random.getstate() == states[0]


@pytest.mark.parametrize("name", ["FedAvg", "Krum", "FedAdam"])
def test_a_strategy_goes_on_without_a_client_that_fails(name: str) -> None:
    def failing(message: Message, context: Context, call: Any) -> Message:
        if context.node_config["partition-id"] == 3:
            raise OSError("no disk")
        return call(message, context)  # type: ignore[no-any-return]

    found = result(Case(CASES[name].make, (failing,)), rounds=3)
    assert sorted(found.train_metrics_clientapp) == [1, 2, 3]
    assert all(np.isfinite(array.numpy()).all() for array in found.arrays.values())
