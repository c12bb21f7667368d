from pathlib import Path

import pytest
import torch

from fedsim.config import build
from fedsim.config.load import load
from fedsim.deploy.joining import participant
from fedsim.errors import ConfigError

CONFIG = """
seed: 3
data: {dataset: digits, clients: 4, split: {name: dirichlet, alpha: 0.5}}
model: {name: mlp, hidden: [8]}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def made(config, **changes):
    given = {"partition": 2, "own_data": False, "states": Path("states"), "say": print, **changes}
    return participant(config, {}, **given)


def test_a_client_holds_its_part_alone(config):
    data = build.federated_data(load(config))
    who = made(config)
    assert torch.equal(who.train.inputs, data.client(2).inputs)
    assert len(who.test) == data.test_partition.sizes()[2] > 0
    assert torch.equal(who.test.inputs, data.test.inputs[data.test_partition.client(2)])


def test_a_client_with_data_of_its_own_holds_all_of_it(config):
    data = build.federated_data(load(config))
    who = made(config, own_data=True, partition=17)
    assert (who.client, len(who.train), len(who.test)) == (17, len(data.train), len(data.test))


@pytest.mark.parametrize(("partition", "rule"), [(4, r"below data\.clients \(4\), got 4"), (-1, ">= 0, got -1")])
def test_there_is_no_such_part(config, partition, rule):
    with pytest.raises(ConfigError, match=f"--partition: must be {rule}"):
        made(config, partition=partition)
