"""The contract of engines: which give the same bits as the plain loop, which the same up to rounding, and always again.

``sequential``, ``flower`` and any number of workers do the plain loop's arithmetic in its order: bit-equal. The stacked
paths add up in other orders inside one step. After three rounds of up to eight steps their parameters, which are of
order one, agree to 2e-6 in float32 and 4e-15 in float64: some twenty units in the last place. Two or three were seen.
What amplifies rounding is left out: batch norm over two examples divides their difference by itself.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.flower import flower
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import Federation, job, run, start
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.records import Broadcast, Examples, Partition
from fedsim.strategies.server_rules import ServerRule
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.local_rule import LocalRule
from fedsim.training.optimizers import adam, sgd

CLIENTS, ROUNDS, FEATURES, CLASSES = 24, 3, 5, 3
TOLERANCE = {torch.float32: 2e-6, torch.float64: 4e-15}


def correct(grads, local_params, broadcast, state):
    return {name: g - state[name] + broadcast.extra[name] for name, g in grads.items()}


def finish(local_params, broadcast, state, steps):
    moved = p.sub(broadcast.params, local_params)
    return {n: state[n] - broadcast.extra[n] + moved[n] / (0.1 * steps) for n in state}


def step(params, update, state):
    return p.add(params, update), {n: 0.5 * state[n] - update[n] for n in state}


def control():
    """A state at each client, one at the server, and an extra that every client is sent, as in SCAFFOLD."""
    rule, server = LocalRule(p.zeros_like, correct, finish), ServerRule(p.zeros_like, step, dict)
    return replace(fedavg(), local=rule, server=server)


def federation(case, dtype=torch.float32):
    """Clients of 1 to 13 examples in a random order of ids, or of 8 each."""
    sizes = np.full(CLIENTS, 8) if case == "batch norm" else 1 + rng.permutation(9, CLIENTS).numpy() % 13
    if case == "unequal batch norm":
        sizes = 2 * sizes
    middle = {"dropout": [Dropout(0.3)], "batch norm": [nn.BatchNorm1d(6)], "unequal batch norm": [nn.BatchNorm1d(6)]}
    with rng.torch_seeded(1):
        layers = [nn.Linear(FEATURES, 6), *middle.get(case, []), nn.ReLU(), nn.Linear(6, CLASSES)]
        model = nn.Sequential(*layers).to(dtype)
    n = int(sizes.sum())
    train = Examples(2 * rng.normal(2, n, FEATURES, dtype=dtype), (rng.uniform(3, n) * CLASSES).long())
    test = Examples(rng.normal(4, 30, FEATURES, dtype=dtype), (rng.uniform(5, 30) * CLASSES).long())
    owners = Partition(np.array([0, *np.cumsum(sizes)]), rng.permutation(7, n).numpy())
    nobody = Partition(np.zeros(CLIENTS + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data = FederatedData(train, test, owners, nobody, test, CLASSES, ())
    strategy = control() if case == "states" else fedavg(server_lr=0.9)
    optimizer = {"momentum": sgd(lr=0.1, momentum=0.9, weight_decay=0.01), "adam": adam(lr=0.01)}.get(case, sgd(lr=0.1))
    batch = 4 if case != "unequal batch norm" else 26  # one batch of all: batch norm cannot take one example
    work = LocalWork(model, key_names(model), optimizer, strategy.local, 2, batch)
    return Federation(5, data, work, strategy, ROUNDS, 17, "fixed", 2, "fail")


CASES = ["plain", "dropout", "batch norm", "unequal batch norm", "momentum", "adam", "states"]
CHAINS = [case for case in CASES if "norm" not in case]


def result(made, engine, state=None):
    rounds = []
    final = run(made, state or start(made), engine, lambda one: rounds.append((one.state, one.record)))
    return final, [replace(record, seconds=0.0) for _, record in rounds], [state for state, _ in rounds]


def tensors(state):
    clients = {f"{k}.{n}": t for k, own in state.clients.items() for n, t in own.items()}
    return {**state.params, **{f"b.{n}": t for n, t in state.buffers.items()}, **state.server, **clients}


def assert_same(a, b):
    assert p.same_bits(tensors(a[0]), tensors(b[0]))
    assert a[1] == b[1]


def assert_close(a, b, dtype):
    assert tensors(a[0]).keys() == tensors(b[0]).keys()
    for name, tensor in tensors(a[0]).items():
        other = tensors(b[0])[name]
        assert torch.allclose(tensor, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]), name
    for one, other in zip(a[1], b[1], strict=True):
        for key in ("train_loss", "loss"):
            here, there = getattr(one, key), getattr(other, key)
            assert here is there is None or here == pytest.approx(there, rel=TOLERANCE[dtype])
        assert (one.cohort, one.bytes_up, one.bytes_down) == (other.cohort, other.bytes_up, other.bytes_down)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("case", CASES)
def test_sequential_is_the_plain_loop_bit_for_bit(case):
    made = federation(case)
    assert_same(result(made, local(mode="sequential", workers=1)), result(made, reference()))


@pytest.mark.parametrize("case", CASES)
def test_flower_is_the_plain_loop_bit_for_bit(case):
    made = federation(case)
    found, expected = result(made, flower()), result(made, reference())
    without = [replace(r, bytes_up=0, bytes_down=0) for r in found[1]]  # Flower's envelopes count, too
    assert p.same_bits(tensors(found[0]), tensors(expected[0]))
    assert without == [replace(r, bytes_up=0, bytes_down=0) for r in expected[1]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("mode", "case"), [*(("vectorised", case) for case in CASES), *(("fused", case) for case in CHAINS)]
)
def test_stacked_paths_are_the_plain_loop_up_to_rounding(mode, case, dtype):
    made = federation(case, dtype)
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": 5})
    assert_close(result(made, engine), result(made, reference()), dtype)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("mode", ["vectorised", "fused"])
def test_again_gives_the_same_bits_whatever_ran_before(mode, chunk):
    made, other = federation("dropout"), federation("momentum")
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": chunk})
    first = result(made, engine)
    result(other, local(mode=mode, workers=1).prepared(job(other), {"path": mode, "chunk": 3}))
    torch.rand(3)
    assert_same(result(made, engine), first)


@pytest.mark.parametrize("mode", ["sequential", "vectorised", "fused"])
@pytest.mark.parametrize("case", ["plain", "states"])
def test_resuming_gives_the_same_bits(mode, case):
    made = federation(case)
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": 1 if mode == "sequential" else 4})
    whole = result(made, engine)
    halfway = whole[2][1]  # after round 1
    assert halfway.round == 1
    resumed = result(made, engine, halfway)
    assert p.same_bits(tensors(resumed[0]), tensors(whole[0]))
    assert resumed[1] == whole[1][2:]


@pytest.mark.parametrize("mode", ["sequential", "vectorised", "fused"])
def test_the_order_of_a_cohort_does_not_matter(mode):
    made = federation("dropout")
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": 1 if mode == "sequential" else 4})
    broadcast_of = {}

    def loop(cohorts):
        broadcast = Broadcast(*p.of(made.work.model), {}, 1)
        clients = [3, 20, 7, 11, 0, 15, 9]
        for name, order in (("given", clients), ("reversed", clients[::-1])):
            broadcast_of[name] = cohorts.run_cohort(broadcast, order, {}, 77)

    engine.drive(job(made), loop)
    a, b = broadcast_of["given"], broadcast_of["reversed"]
    assert p.same_bits(a.update, b.update) and a.metrics == b.metrics and a.clients == b.clients


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    ("mode", "case"),
    [("sequential", "states"), ("sequential", "unequal batch norm"), ("vectorised", "dropout"), ("fused", "plain")],
)
def test_workers_change_no_bit(mode, case, workers):
    made = federation(case)
    recorded = {"path": mode, "chunk": 1 if mode == "sequential" else 3}
    one, several = (local(mode=mode, workers=n).prepared(job(made), recorded) for n in (1, workers))
    assert_same(result(made, several), result(made, one))


def test_the_cases_differ_and_training_moves():
    """What the tests above compare is not the same for all cases, nor still at its start."""
    finals = {case: result(federation(case), reference())[0].params["0.weight"] for case in CASES}
    for case, weight in finals.items():
        assert not torch.equal(weight, start(federation(case)).params["0.weight"]), case
    assert len({tuple(weight.flatten().tolist()) for weight in finals.values()}) == len(CASES)
