"""How single results become a cohort's: weights, metrics, counters, and what happens to a result that is not finite."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import params as p
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Job, client_key, collect
from fedsim.errors import DivergedError
from fedsim.records import Broadcast, ClientUpdate, Examples, Partition
from fedsim.rng import fold
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import sgd

NAN, INF = float("nan"), float("inf")
BROADCAST = Broadcast({"w": torch.zeros(2)}, {"mean": torch.ones(1), "count": torch.tensor(41)}, {}, 3)


def job(on_nan="fail", **options):
    nothing = Examples(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    nobody = Partition(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data, strategy = FederatedData(nothing, nothing, nobody, nobody, nothing, 2, ()), fedavg(**options)
    return Job(LocalWork(nn.Linear(1, 1), (), sgd(), strategy.local, 1, None), data, strategy, on_nan)


def update(client, w, *, n, loss=1.0, mean=0.0, state=None):
    buffers = {"mean": torch.tensor([mean]), "count": torch.tensor(99)}
    return ClientUpdate(client, {"w": torch.tensor(w)}, buffers, n, {"train_loss": loss}, state or {})


def collected(the_job, updates):
    return collect(the_job, BROADCAST, iter(updates), bytes_up=lambda: 17, bytes_down=19)


TWO = [update(2, [1.0, -4.0], n=1, loss=3.0, mean=8.0), update(5, [-3.0, 2.0], n=3, loss=-1.0, mean=-4.0)]


def test_updates_buffers_and_metrics_are_weighted_by_examples():
    result = collected(job(), TWO)
    assert result.update["w"].tolist() == [(1 - 9) / 4, (-4 + 6) / 4]
    assert result.buffers["mean"].tolist() == [(8 - 12) / 4]
    assert result.buffers["count"].item() == 41 and list(result.buffers) == ["mean", "count"]
    assert result.metrics == {"train_loss": (3 - 3) / 4}
    assert (result.clients, result.num_examples, result.skipped) == ((2, 5), (1, 3), ())
    assert (result.bytes_up, result.bytes_down) == (17, 19)


def test_uniform_weighting_holds_for_updates_and_buffers_but_not_for_metrics():
    result = collected(job(weighting="uniform"), TWO)
    assert result.update["w"].tolist() == [-1.0, -1.0] and result.buffers["mean"].tolist() == [2.0]
    assert result.metrics == {"train_loss": 0.0}


BAD = {
    "the update w is not finite": update(4, [1.0, NAN], n=2),
    "the update w is not finite ": update(4, [1.0, -INF], n=2),
    "train_loss is nan": update(4, [1.0, 1.0], n=2, loss=NAN),
    "train_loss is inf": update(4, [1.0, 1.0], n=2, loss=INF),
    "the buffer mean is not finite": update(4, [1.0, 1.0], n=2, mean=INF),
    "the state c is not finite": replace(update(4, [1.0, 1.0], n=2), state={"c": torch.tensor(NAN)}),
}


@pytest.mark.parametrize(("what", "bad"), BAD.items(), ids=BAD)
def test_a_result_that_is_not_finite_fails_the_round_by_name(what, bad):
    rule = rf"round 3, client 4: training diverged: {what.strip()} \(lower train.optimizer.lr"
    with pytest.raises(DivergedError, match=rule) as e:
        collected(job(), [TWO[0], bad, TWO[1]])
    assert (e.value.round, e.value.client) == (3, 4)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_skipped_result_leaves_no_trace_but_its_name(bad):
    bad = replace(bad, state={"c": torch.tensor(NAN)})
    result, without = collected(job("skip"), [TWO[0], bad, TWO[1]]), collected(job(), TWO)
    assert result.skipped == (4,)
    assert torch.equal(result.update["w"], without.update["w"])
    assert torch.equal(result.buffers["mean"], without.buffers["mean"])
    assert replace(result, skipped=(), update=None, buffers=None) == replace(without, update=None, buffers=None)


@pytest.mark.parametrize("updates", [[], [BAD["train_loss is nan"]]], ids=["nobody", "all skipped"])
def test_without_any_contribution_there_is_no_update(updates):
    result = collected(job("skip"), updates)
    assert result.update is None and result.buffers is None
    assert (result.clients, result.metrics, result.states) == ((), {}, {})


def test_only_clients_that_keep_a_state_are_listed():
    kept = update(5, [1.0, 1.0], n=1, state={"c": torch.ones(2)})
    assert collected(job(), [TWO[0], kept]).states.keys() == {5}


def test_updates_are_taken_one_at_a_time():
    """The fold asks for the next update only when it is done with the last: memory holds one at a time."""
    alive = []

    def results():
        for client in range(5):
            one = update(client, [1.0, 1.0], n=1)
            alive.append(one.update)
            yield one
            one.update["w"].fill_(NAN)  # whoever still needs it would show

    assert collected(job(), results()).update["w"].tolist() == [1.0, 1.0]
    assert len(alive) == 5


def test_the_key_of_a_client_is_below_that_of_the_round():
    assert client_key(77, 5) == fold(77, "client", 5)


def test_buffers_that_nobody_moves_stay_bit_for_bit_even_infinite_ones_and_negative_zeros():
    mask = {"mask": torch.tensor([-INF, -0.0, 1.0]), "count": torch.tensor(3)}
    start = Broadcast({"w": torch.zeros(2)}, mask, {}, 3)
    results = [replace(u, buffers={n: b.clone() for n, b in mask.items()}) for u in TWO]
    result = collect(job(), start, results, bytes_up=lambda: 0, bytes_down=0)
    assert p.same_bits(result.buffers, mask)
