from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.engines.folding import blocks, join
from fedsim.engines.local.plan import Plan
from fedsim.engines.local.trainer import groups, rows_of, sizes_of, trainer
from fedsim.errors import ClientError, DataError, DivergedError
from fedsim.models.layers.dropouts import Dropout
from fedsim.records import Broadcast, Partition
from fedsim.strategies.strategy import fedavg
from fedsim.training.local_rule import LocalRule
from fedsim.training.optimizers import sgd

KEY = 77
SIZES = (9, 2, 7, 7, 13, 4, 8, 1, 5, 12, 3)


# ---------------------------------------------------------------- groups and rows


def slow_groups(sizes, chunk, one_size):
    """Client after client: into the group before it if there is room, and its size is the same where it must be."""
    found = []
    for i, size in enumerate(sizes):
        if found and len(found[-1]) < chunk and not (one_size and size != sizes[found[-1][0]]):
            found[-1].append(i)
        else:
            found.append([i])
    return [(group[0], group[-1] + 1) for group in found]


@given(st.lists(st.integers(1, 4), max_size=30), st.integers(1, 12), st.booleans())
def test_groups_are_neighbours_no_more_than_a_chunk_and_of_one_size_if_asked(sizes, chunk, one_size):
    assert list(groups(sizes, chunk, one_size)) == slow_groups(sizes, chunk, one_size)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_rows_say_where_the_examples_of_clients_lie(sizes, data):
    offsets = np.array([0, *np.cumsum(sizes)])
    partition = Partition(offsets, rng.permutation(3, sum(sizes)).numpy())
    clients = data.draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, max_size=6))
    own = sizes_of(partition, clients)
    rows = rows_of(partition, clients, own)
    assert own == tuple(sizes[client] for client in clients)
    assert rows.shape == (len(clients), max(own)) and rows.dtype == np.int64
    for row, client, size in zip(rows.tolist(), clients, own, strict=True):
        mine = partition.indices[offsets[client] : offsets[client + 1]].tolist()
        assert row[:size] == mine and set(row[size:]) <= {mine[-1]}


def test_rows_can_be_of_the_first_examples_only():
    partition = Partition(np.array([0, 5, 9]), np.array([8, 1, 6, 3, 0, 2, 7, 5, 4]))
    assert rows_of(partition, [1, 0], (2, 3)).tolist() == [[2, 7, 7], [8, 1, 6]]


# ---------------------------------------------------------------- blocks and chunks


def correct(grads, local, broadcast, state):
    return {name: g - state[name] for name, g in grads.items()}


def finish(local, broadcast, state, steps):
    return {n: state[n] + (local[n] - broadcast.params[n]) / steps for n in state}


def control():
    return replace(fedavg(), local=LocalRule(p.zeros_like, correct, finish))


def batch_norm():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def dropout():
    return nn.Sequential(nn.Linear(5, 6), Dropout(0.3), nn.ReLU(), nn.Linear(6, 3))


def parts_of(job, plan, task, mixes=False, watch=lambda client: None):
    broadcast = Broadcast(*p.of(job.work.model), {}, 1)
    states = {client: {n: 0.1 * rng.normal(client, *t.shape) for n, t in broadcast.params.items()} for client in (0, 4)}
    own = states if job.strategy.local.correct is correct else {}
    return trainer(job, plan, mixes=mixes).train(broadcast, task, own, KEY, watch)


def close(one, other):
    """Up to rounding of float32, for numbers of order one."""
    assert one.keys() == other.keys()
    return all(torch.allclose(one[n], other[n], rtol=1e-5, atol=1e-6) for n in one)


CASES = {"plain": {}, "states": {"strategy": control()}, "dropout": {"model": dropout}, "mixing": {"model": batch_norm}}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", ["vectorised", "fused"])
@pytest.mark.parametrize("sizes", [SIZES, (6, 6, 6, 4, 4, 4, 4, 8)], ids=["unequal", "few sizes"])
def test_several_blocks_in_one_chunk_give_the_parts_of_one_block_at_a_time(job_of, path, case, sizes):
    if case == "mixing":
        if path == "fused":
            pytest.skip("batch norm is no layer of a chain")
        sizes = tuple(4 * -(-size // 4) for size in sizes)  # batches of 4 without a rest
    job = job_of(sizes=sizes, **CASES[case])
    order = tuple(client for block in blocks(job.data.partition.offsets, range(len(sizes))) for client in block)
    task = [order[:2], order[2:3], order[3:]]  # blocks of unequal lengths
    together = parts_of(job, Plan(path, 64), task, case == "mixing")
    alone = [parts_of(job, Plan(path, 64), [block], case == "mixing")[0] for block in task]
    singly = [parts_of(job, Plan("sequential", 1), [block], case == "mixing")[0] for block in task]
    aggregator, broadcast = job.strategy.aggregator, Broadcast(*p.of(job.work.model), {}, 1)
    for one, *others in zip(together, alone, singly, strict=True):
        for other in others:
            assert (one.done, one.skipped, one.bytes_up) == (other.done, other.skipped, other.bytes_up)
            assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
            assert close(aggregator.finish(one.updates), aggregator.finish(other.updates))
            assert close(aggregator.finish(one.buffers) or {}, aggregator.finish(other.buffers) or {})
            assert one.states.keys() == other.states.keys()
            assert all(close(one.states[client], other.states[client]) for client in one.states)
    assert [tuple(client for client, _ in part.done) for part in together] == task
    whole = join(job, broadcast, together, bytes_down=0)
    assert whole.clients == tuple(range(len(sizes))) and whole.num_examples == tuple(sizes)
    assert len(whole.states) == (len(sizes) if case == "states" else 0)


@pytest.mark.parametrize(
    ("chunk", "mixes", "firsts"),
    [(1, False, [0, 3, 1, 2, 4]), (2, False, [0, 1, 4]), (64, False, [0]), (64, True, [0, 1, 4])],
)
def test_the_watch_is_told_the_first_client_of_each_group(job_of, chunk, mixes, firsts):
    job, seen = job_of(sizes=(8, 4, 4, 8, 2)), []
    parts_of(job, Plan("fused", chunk), [(0, 3, 1, 2, 4)], mixes, seen.append)
    assert seen == firsts


# ---------------------------------------------------------------- what goes wrong


class Raising(nn.Module):
    """Raises at a batch of a size that one client alone has."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        if x.shape[0] == 3:
            raise RuntimeError("worn out")
        return self.fc(x)


@pytest.mark.parametrize(
    ("plan", "client", "beside"),
    [
        (Plan("sequential", 1), 3, ""),
        (Plan("vectorised", 2), 3, r" \(or one of the 1 trained beside it\)"),
        (Plan("vectorised", 1), 3, ""),
    ],
)
def test_an_error_names_the_client_or_the_first_of_those_beside_it(job_of, plan, client, beside):
    job = job_of(Raising, sizes=(4, 2, 4, 3))
    with pytest.raises(ClientError, match=rf"^round 1, client {client}: RuntimeError: worn out{beside}$") as caught:
        parts_of(job, plan, [(0, 2, 3, 1)])
    assert (caught.value.round, caught.value.client) == (1, client)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_of_fedsim_is_left_as_it_is(job_of):
    def refuse(local, broadcast, state, steps):
        raise DataError("as it is")

    strategy = replace(fedavg(), local=LocalRule(p.zeros_like, correct, refuse))
    with pytest.raises(DataError, match=r"^as it is$"):
        parts_of(job_of(strategy=strategy), Plan("sequential", 1), [(0, 1)])


@pytest.mark.parametrize("path", ["sequential", "vectorised", "fused"])
def test_divergence_names_its_own_client_wherever_it_stands_in_a_chunk(job_of, path):
    job = job_of(optimizer=sgd(lr=0.1))
    partition, inputs = job.data.partition, job.data.train.inputs
    inputs[partition.indices[partition.offsets[3] : partition.offsets[4]]] *= 1e30
    plan = Plan(path, 1 if path == "sequential" else 6)
    with pytest.raises(DivergedError, match=r"^round 1, client 3: training diverged"):
        parts_of(job, plan, [(4, 0, 2, 3, 5, 1)])
    (part,) = parts_of(replace(job, on_nan="skip"), plan, [(4, 0, 2, 3, 5, 1)])
    assert part.skipped == (3,) and [client for client, _ in part.done] == [4, 0, 2, 5, 1]


def test_a_model_that_is_no_chain_has_no_fused_trainer(job_of):
    with pytest.raises(ValueError, match="not a chain of layers that can be fused"):
        trainer(job_of(batch_norm), Plan("fused", 4), mixes=True)
