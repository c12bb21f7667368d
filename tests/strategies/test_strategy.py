"""The parts FedAvg is made of."""

import pytest
import torch

from fedsim.records import Broadcast
from fedsim.strategies import server_rules
from fedsim.strategies.strategy import STRATEGIES, fedavg, weight


def test_fedavg_changes_nothing_on_the_client():
    rule, grads = fedavg().local, {"w": torch.tensor([1.0, -2.0])}
    broadcast = Broadcast({"w": torch.zeros(2)}, {}, {}, 1)
    assert rule.init(broadcast.params) == {}
    assert rule.correct(grads, broadcast.params, broadcast, {}) is grads
    assert rule.finish(broadcast.params, broadcast, {}, 5) == {}


@pytest.mark.parametrize(("lr", "expected"), [(1.0, [2.0, -5.0]), (0.5, [1.5, -3.5]), (2.0, [3.0, -8.0])])
def test_the_server_adds_a_multiple_of_the_update(lr, expected):
    rule, params = server_rules.sgd(lr=lr), {"w": torch.tensor([1.0, -2.0])}
    assert rule.init(params) == {} and rule.extra({}) == {}
    moved, state = rule.step(params, {"w": torch.tensor([1.0, -3.0])}, {})
    assert moved["w"].tolist() == expected and state == {}
    assert params["w"].tolist() == [1.0, -2.0]


def test_weights():
    assert weight("examples", 17) == 17.0 and weight("uniform", 17) == 1.0
    assert fedavg().weighting == "examples"


def test_the_table_names_the_factory():
    assert STRATEGIES["fedavg"] is fedavg
