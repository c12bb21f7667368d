"""Early stopping against a loop written out by hand, with losses that rise and fall again."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import PLAINLY, federation, result, tensors
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import job
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.records import Broadcast, Examples
from fedsim.strategies.local_rules import plain
from fedsim.training import stopping as s
from fedsim.training.client import LocalWork, batches, gradient, layer_inputs, train_client
from fedsim.training.optimizers import sgd
from fedsim.training.steps import step_of
from fedsim.training.stopping import Stopping

DATA = Examples(rng.normal(1, 23, 4, dtype=torch.float64) * 2, (rng.uniform(2, 23) * 3).long())


def work(stopping, *, epochs=12, lr=0.8):
    with rng.torch_seeded(3):
        layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), Dropout(0.2), nn.Linear(8, 3)]
        model = nn.Sequential(*layers).double()
    rule = plain()._replace(finish=lambda local, broadcast, state, steps: {"steps": torch.tensor(steps)})
    return LocalWork(model, key_names(model), sgd(lr=lr), rule, epochs, 5, stopping=stopping)


def broadcast_of(job):
    return Broadcast(*p.of(job.model), {}, 1)


def held(data, client, validation):
    count = math.floor(validation * len(data))
    order = rng.permutation(rng.fold(client, "held out"), len(data)).tolist()
    return sorted(order[count:]), sorted(order[:count]) or list(range(len(data)))


def by_hand(job, client, key):
    """Every epoch's loss, parameters, buffers and steps; then what is to come of them."""
    stopping, broadcast = job.stopping, broadcast_of(job)
    own, judged = held(DATA, client, stopping.validation)
    trained = DATA.take(torch.tensor(own))
    params, buffers = broadcast.params, {name: b.clone() for name, b in broadcast.buffers.items()}
    history, steps = [], 0
    every = [*batches(len(own), 5, job.local_epochs, key)]
    per_epoch = len(every) // job.local_epochs
    for epoch in range(job.local_epochs):
        for indices in every[epoch * per_epoch : (epoch + 1) * per_epoch]:
            job.model.train()
            layer_keys = layer_inputs(job, rng.fold(key, "step", steps), 1)
            grads, _ = gradient(job, params, buffers, trained.take(indices), layer_keys)
            params = {name: w - 0.8 * grads[name] for name, w in params.items()}
            steps += 1
        job.model.eval()
        logits = functional_call(job.model, {**params, **buffers}, (DATA.inputs[judged],))
        loss = F.cross_entropy(logits, DATA.labels[judged]).item()
        history.append((loss, params, {name: b.clone() for name, b in buffers.items()}, steps))
    best, done = 0, 1
    for epoch in range(1, job.local_epochs):
        done = epoch + 1
        if history[epoch][0] < history[best][0] - stopping.min_delta:
            best = epoch
        if epoch - best == stopping.patience:
            break
    return history, best, done


SETTINGS = [
    Stopping(1, 0.0, 0.3),
    Stopping(2, 0.0, 0.3),
    Stopping(2, 0.05, 0.3),
    Stopping(3, 0.1, 0.0),
    Stopping(11, 0.0, 0.2),
    Stopping(100, 10.0, 0.2),
]


@pytest.mark.parametrize("stopping", SETTINGS)
@pytest.mark.parametrize("client", [0, 7])
def test_it_stops_and_restores_as_a_loop_by_hand_does(stopping, client):
    made = work(stopping)
    history, best, done = by_hand(made, client, 9)
    found = train_client(made, broadcast_of(made), client, DATA, state={}, key=9)
    _, params, buffers, steps = history[best]
    for name, start in broadcast_of(made).params.items():
        torch.testing.assert_close(start + found.update[name], params[name], rtol=1e-12, atol=1e-13)
    for name, buffer in buffers.items():
        torch.testing.assert_close(found.buffers[name], buffer, rtol=1e-12, atol=1e-13)
    assert found.metrics["epochs"] == done and found.state["steps"].item() == steps
    assert found.num_examples == 23
    assert made.model.training


def test_the_cases_above_are_not_all_alike():
    """Some stop early, some run to the end; the best is the first epoch, the last, or one between."""
    seen = {
        (done < 12, best)
        for stopping in SETTINGS
        for client in (0, 7)
        for _, best, done in [by_hand(work(stopping), client, 9)]
    }
    assert {early for early, _ in seen} == {True, False}
    assert len({best for _, best in seen}) >= 3


def test_train_loss_is_of_all_epochs_done():
    made = work(Stopping(2, 0.0, 0.0), epochs=6)
    found = train_client(made, broadcast_of(made), 0, DATA, state={}, key=9)
    epochs = int(found.metrics["epochs"])
    without = train_client(
        replace(made, stopping=None, local_epochs=epochs), broadcast_of(made), 0, DATA, state={}, key=9
    )
    assert found.metrics["train_loss"] == without.metrics["train_loss"]
    assert "epochs" not in without.metrics


@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 2**40))
def test_what_is_held_out_and_what_is_trained_on_is_everything_once(n, validation, client):
    data = Examples(torch.arange(n, dtype=torch.float32)[:, None], torch.arange(n))
    trained, judged = s.parted(validation, data, client)
    if int(validation * n) == 0:  # too few: all are trained on, and judged by
        assert trained is judged is data
        return
    assert len(judged) == int(validation * n) and len(trained) >= 1
    assert sorted([*trained.labels.tolist(), *judged.labels.tolist()]) == list(range(n))
    assert torch.equal(trained.inputs[:, 0].long(), trained.labels)


def test_held_out_are_the_same_examples_in_every_round_and_others_for_each_client():
    data = Examples(torch.arange(40.0)[:, None], torch.arange(40))
    first, again, other = (s.parted(0.5, data, client).judged.labels.tolist() for client in (3, 3, 4))
    assert first == again != other
    assert first != list(range(20))  # nor the first ones, for they may be sorted by label
    assert s.parted(0.0, data, 3).trained is data


def test_held_out_examples_are_never_trained_on():
    """Garbage among them changes which epoch is the best, but no step before it."""
    made = work(Stopping(1, 0.0, 0.3), epochs=2)
    _, judged = held(DATA, 5, 0.3)
    inputs = DATA.inputs.clone()
    inputs[judged] = 1e3
    one, other = (
        train_client(made, broadcast_of(made), 5, d, state={}, key=9) for d in (DATA, Examples(inputs, DATA.labels))
    )
    assert one.metrics["train_loss"] == other.metrics["train_loss"]


def test_a_loss_that_is_nan_never_improves(monkeypatch):
    losses = iter([2.0, math.nan, 1.5, math.nan, math.nan, 0.1])
    monkeypatch.setattr(s, "score", lambda *_: type("S", (), {"mean": lambda self: (next(losses), 0.0)})())
    best = None
    for epoch in range(1, 6):
        best = s.after_epoch(Stopping(9), best, nn.Linear(1, 1), s.Reached({}, {}, epoch, epoch), DATA)
    assert (best.loss, best.reached.epochs, best.since) == (1.5, 3, 2)


def test_an_improvement_of_exactly_min_delta_is_none(monkeypatch):
    losses = iter([1.0, 0.75, 0.5])
    monkeypatch.setattr(s, "score", lambda *_: type("S", (), {"mean": lambda self: (next(losses), 0.0)})())
    best = None
    for epoch in range(1, 4):
        best = s.after_epoch(Stopping(9, 0.25), best, nn.Linear(1, 1), s.Reached({}, {}, epoch, epoch), DATA)
    assert best.reached.epochs == 3 and best.loss == 0.5  # 0.5 < 1 - 0.25; 0.75 was not below it


@pytest.mark.parametrize("case", PLAINLY)
def test_local_takes_the_plain_loop_and_gives_its_bits(case, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = federation(case)
    engine = local(mode="auto", workers=1).prepared(job(made), {})
    assert engine.choices.plan.plan.path == "sequential" and [*engine.choices.plan.speeds] == ["sequential, 1 client"]
    (final, records, _), (expected, others, _) = result(made, engine), result(made, reference())
    assert p.same_bits(tensors(final), tensors(expected)) and records == others
    assert all(1 <= one.epochs <= 6 for one in records[1:]) and records[0].epochs is None
    assert result(federation("plain"), reference())[1][1].epochs is None


def test_who_stops_after_different_epochs_is_averaged_by_examples():
    made = federation("stopping")
    cohort = result(made, reference())[1][1].cohort
    sizes = made.data.partition.sizes()
    done = []
    for client in cohort:
        key = rng.fold(5, "round", 1, "client", client)
        broadcast = Broadcast(
            *p.of(made.work.model), made.strategy.server.extra(p.zeros_like(p.of(made.work.model)[0])), 1
        )
        state = made.strategy.local.init(broadcast.params)
        found = train_client(made.work, broadcast, client, made.data.client(client), state=state, key=key)
        assert found.num_examples == sizes[client]
        done.append(found.metrics["epochs"])
    assert len(set(done)) > 1
    expected = np.average(done, weights=sizes[list(cohort)])
    assert result(made, reference())[1][1].epochs == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fused"}, "mode fused: with train.early_stopping each client trains by itself"),
        ({"mode": "vectorised"}, "cannot be vectorised over clients: with train.early_stopping each client trains"),
    ],
)
def test_stacked_paths_refuse(options, message, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = federation("stopping")
    with pytest.raises(ValueError, match=message):
        local(workers=1, **options).prepared(job(made), {})
    with pytest.raises(ValueError, match=f"in the plain loop, not {options['mode']}"):
        step_of(made.work, options["mode"])


def test_nor_is_it_compiled(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = federation("stopping")
    engine = replace(local(mode="sequential", workers=1), compile=True)
    with pytest.raises(ValueError, match=r"^compile: with train.early_stopping"):
        engine.prepared(job(made), {})
    with pytest.raises(ValueError, match="not compiled"):
        step_of(made.work, "sequential", compiled=True)
