"""The plain loop: bytes are those of the messages, order of the cohort and the process's past do not matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng, wire
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Job, client_key
from fedsim.engines.reference import Loop, Reference, reference
from fedsim.errors import ClientError
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.records import Broadcast, Examples, Partition
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork, train_client
from fedsim.training.local_rule import LocalRule
from fedsim.training.optimizers import sgd

SIZES = (5, 1, 9, 3)
KEY = rng.fold(1, "round", 2)


def counting():
    """A rule whose state counts the client's steps, from 100."""
    return LocalRule(
        lambda params: {"steps": torch.tensor([100.0])},
        lambda grads, local, broadcast, state: grads,
        lambda local, broadcast, state, steps: {"steps": state["steps"] + steps},
    )


@pytest.fixture
def job():
    with rng.torch_seeded(2):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), Dropout(0.4), nn.Linear(6, 3))
    n = sum(SIZES)
    data = Examples(rng.normal(3, n, 4) * 2, (rng.uniform(4, n) * 3).long())
    owners = Partition(np.array([0, *np.cumsum(SIZES)]), rng.permutation(5, n).numpy())
    strategy = replace(fedavg(), local=counting())
    work = LocalWork(model, key_names(model), sgd(lr=0.2, momentum=0.9), strategy.local, 2, None)
    return Job(work, FederatedData(data, data, owners, owners, data, 3, ()), strategy, "fail", 2, 1)


def broadcast_of(job):
    return Broadcast(*p.of(job.work.model), {}, 2)


COHORT = [0, 2, 3]


def test_it_is_train_client_for_each_and_counts_the_bytes_of_their_messages(job):
    broadcast = broadcast_of(job)
    result = Loop(job).run_cohort(broadcast, COHORT, {2: {"steps": torch.tensor([7.0])}}, KEY)
    states = {0: 100.0, 2: 7.0, 3: 100.0}
    updates = [
        train_client(
            job.work,
            broadcast,
            client,
            job.data.client(client),
            state={"steps": torch.tensor([steps])},
            key=client_key(KEY, client),
        )
        for client, steps in states.items()
    ]
    assert result.bytes_up == sum(len(wire.encode_update(update)) for update in updates)
    assert result.bytes_down == 3 * len(wire.encode_broadcast(broadcast))
    assert {k: s["steps"].item() for k, s in result.states.items()} == {0: 102.0, 2: 9.0, 3: 102.0}
    assert result.num_examples == (5, 9, 3)
    mean = sum(update.update["0.weight"].double() * update.num_examples for update in updates) / 17
    assert torch.allclose(result.update["0.weight"].double(), mean, atol=1e-6)


def same(a, b):
    assert p.same_bits(a.update, b.update) and p.same_bits(a.buffers, b.buffers)
    assert all(p.same_bits(a.states[k], b.states[k]) for k in a.states)
    empty = {"update": None, "buffers": None, "states": {}}
    assert replace(a, **empty) == replace(b, **empty)


@pytest.mark.parametrize("order", [[3, 0, 2], [2, 3, 0], [3, 2, 0]])
def test_the_order_in_which_the_cohort_is_given_does_not_matter(job, order):
    broadcast = broadcast_of(job)
    same(Loop(job).run_cohort(broadcast, COHORT, {}, KEY), Loop(job).run_cohort(broadcast, order, {}, KEY))


def test_neither_the_past_nor_torchs_global_generator_matters_nor_changes(job):
    broadcast = broadcast_of(job)
    first = Loop(job).run_cohort(broadcast, COHORT, {}, KEY)
    Loop(job).run_cohort(broadcast, [2], {}, KEY + 1)
    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        before = torch.get_rng_state()
        again = Loop(job).run_cohort(broadcast, COHORT, {}, KEY)
        Loop(job).evaluate(broadcast, job.data.test)
        assert torch.equal(torch.get_rng_state(), before)
    same(first, again)


def test_another_round_key_gives_another_result(job):
    broadcast = broadcast_of(job)
    one, two = (Loop(job).run_cohort(broadcast, COHORT, {}, key) for key in (KEY, KEY + 1))
    assert not p.same_bits(one.update, two.update)


def test_a_client_that_breaks_is_named(job):
    """Batch norm cannot train on the one example of client 1."""
    with pytest.raises(ClientError, match="round 2, client 1: ValueError: Expected more than 1 value") as error:
        Loop(job).run_cohort(broadcast_of(job), [0, 1], {}, KEY)
    assert error.value.__cause__ is not None


def test_an_empty_cohort_sends_nothing(job):
    result = Loop(job).run_cohort(broadcast_of(job), [], {}, KEY)
    assert (result.update, result.bytes_up, result.bytes_down) == (None, 0, 0)


def test_the_engine_hands_its_loop_over_once(job):
    given = []
    reference().drive(job, given.append)
    assert given == [Loop(job)] and reference() == Reference()
    assert reference().describe()["name"] == "reference"
