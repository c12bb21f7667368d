"""What every regulariser must keep, whatever it does: the whole table, alone on each of its models and in pairs."""

import copy
import itertools
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import CASES, MODELS, TRIALS
from federations import result
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import Federation
from fedsim.models.layers.keyed import key_names, mixes_examples, progress_names
from fedsim.models.zoo import check_model
from fedsim.records import Examples, Partition
from fedsim.strategies.strategy import fedavg
from fedsim.training import regularizers as r
from fedsim.training.client import LocalWork, gradient, layer_inputs, objective_at
from fedsim.training.evaluate import score
from fedsim.training.objective import PLAIN, Start
from fedsim.training.optimizers import sgd

PAIRS = [(a, b) for a, b in itertools.combinations(CASES, 2)]


def bound(model, *names, dtype=torch.float64):
    """The work of a client with these regularisers at their options, on a small model."""
    built = MODELS[model].build(dtype=dtype)
    objective = r.bind(built, [r.REGULARIZERS[name](**CASES[name].options) for name in names], key=5)
    built = built.to(dtype)
    return LocalWork(
        built,
        key_names(built),
        sgd(lr=0.05),
        fedavg().local,
        local_epochs=1,
        batch_size=4,
        objective=objective,
        progress_names=progress_names(built),
        rounds=2,
    )


def test_the_table_is_whole():
    assert set(CASES) == set(r.REGULARIZERS)


def at(work, batch, params, *, key=11, round=1):
    buffers = {name: b.clone() for name, b in p.of(work.model)[1].items()}
    work.model.train()
    anchor = {name: tensor + 0.1 for name, tensor in p.of(work.model)[0].items()}
    return objective_at(work, params, buffers, batch, layer_inputs(work, key, round), start=Start(anchor, 13))[0]


def moved(params, seed=8):
    """Parameters off the initial ones, where biases are not zero and nothing is symmetric."""
    return {n: t + 0.05 * rng.normal(rng.fold(seed, n), *t.shape, dtype=t.dtype) for n, t in params.items()}


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_gradients_are_those_of_finite_differences_with_the_draws_fixed(name, model):
    work = bound(model, name)
    batch, params = MODELS[model].batch(5), moved(p.of(work.model)[0])
    leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
    grads = torch.autograd.grad(at(work, batch, leaves), [*leaves.values()], allow_unused=True, materialize_grads=True)
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    if CASES[name].detached:
        pytest.skip(CASES[name].detached)
    for seed in range(3):
        along = {n: rng.normal(rng.fold(seed, n), *t.shape, dtype=t.dtype) for n, t in params.items()}
        slope = sum(float((g * along[n]).sum()) for n, g in zip(leaves, grads, strict=True))
        h = 1e-7
        up, down = (at(work, batch, {n: t + s * h * along[n] for n, t in params.items()}).item() for s in (1, -1))
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=2e-5, abs=2e-6)


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_it_changes_what_is_minimised(name, model):
    work, plain = bound(model, name), bound(model)
    batch = MODELS[model].batch(5)
    assert at(work, batch, p.of(work.model)[0]).item() != at(plain, batch, p.of(plain.model)[0]).item()


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_evaluation_draws_nothing(name, model):
    work, batch = bound(model, name), MODELS[model].batch(5)
    params, buffers = p.of(work.model)
    work.model.eval()
    keys = [layer_inputs(work, key, 1) for key in (1, 2)]
    first, second = (functional_call(work.model, {**params, **buffers, **own}, (batch.inputs,)) for own in keys)
    assert torch.equal(first, second)
    assert score(work.model, params, buffers, batch).loss.shape == (5,)


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_draws_follow_the_key_of_the_step(name, model):
    work, batch = bound(model, name), MODELS[model].batch(5)
    params = p.of(work.model)[0]
    first, again, other = (at(work, batch, params, key=key).item() for key in (1, 1, 2))
    assert first == again
    assert (first != other) == CASES[name].draws
    assert bool(work.key_names) == CASES[name].draws


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_of_strength_0_nothing_is_left(name, model):
    if CASES[name].off is None:
        pytest.skip("it has no strength")
    plain, built = MODELS[model].build(), MODELS[model].build()
    assert r.bind(built, [r.REGULARIZERS[name](**CASES[name].off)]) == PLAIN
    assert str(built) == str(plain) and p.same_bits(built.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_it_trains_with_its_defaults(name, model):
    built = MODELS[model].build()
    objective = r.bind(built, [r.REGULARIZERS[name]()], key=5)
    work = replace(bound(model), model=built.double(), objective=objective, key_names=key_names(built))
    work = replace(work, progress_names=progress_names(built))
    batch = MODELS[model].batch(6)
    assert np.isfinite(at(work, batch, p.of(built)[0], round=2).item())


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_model_and_objective_can_be_copied_and_sent(name, model):
    work, batch = bound(model, name), MODELS[model].batch(5)
    here = at(work, batch, p.of(work.model)[0]).item()
    for other in (copy.deepcopy(work), pickle.loads(pickle.dumps(work))):
        assert at(other, batch, p.of(other.model)[0]).item() == here


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_no_parameter_is_renamed(name, model):
    before, after = (p.of(one)[0] for one in (MODELS[model].build(), bound(model, name).model))
    assert before.keys() <= after.keys()


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_rows_that_count_nothing_change_nothing(name, model):
    """A short client is padded where clients stand side by side."""
    work = bound(model, name)
    if mixes_examples(work.model) or "bn" in model:
        pytest.skip("it mixes the examples of a batch, and says so: only clients of one size stand side by side")
    batch, params = MODELS[model].batch(5), p.of(work.model)[0]
    nothing = torch.full_like(batch.labels[:2], -100)
    padded = Examples(torch.cat([batch.inputs, batch.inputs[:2].flip(0)]), torch.cat([batch.labels, nothing]))
    assert at(work, padded, params).item() == pytest.approx(at(work, batch, params).item(), rel=1e-12)


def federation(work, model):
    """Clients of unequal sizes, or of equal ones where examples are mixed."""
    sizes = [8, 8, 8, 8] if mixes_examples(work.model) or "bn" in model else [9, 3, 6, 2]
    train, test = MODELS[model].batch(sum(sizes)), MODELS[model].batch(7, seed=40)
    owners = Partition(np.array([0, *np.cumsum(sizes)]), np.arange(sum(sizes)))
    nobody = Partition(np.zeros(len(sizes) + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data = FederatedData(train, test, owners, nobody, test, 7 if MODELS[model].tokens else 3, ())
    return Federation(5, data, work, fedavg(), 2, len(sizes), "fixed", 1, "fail")


def final(made, engine):
    state, records, _ = result(made, engine)
    return {**state.params, **state.buffers}, [(one.train_loss, one.loss) for one in records]


@pytest.mark.parametrize(("name", "model"), TRIALS)
def test_engines_agree(name, model):
    """The plain loop, and clients side by side under vmap: the same up to rounding of float64."""
    made = federation(bound(model, name), model)
    expected, losses = final(made, reference())
    mode = "vectorised" if CASES[name].vectorised else "sequential"
    found, told = final(made, local(mode=mode, workers=1))
    assert all(torch.allclose(t, found[n], rtol=1e-9, atol=1e-11) for n, t in expected.items())
    assert np.allclose(np.array(losses, dtype=float), np.array(told, dtype=float), rtol=1e-9, equal_nan=True)
    if CASES[name].draws:
        other, _ = final(replace(made, seed=6), reference())
        assert not all(torch.allclose(t, other[n]) for n, t in expected.items())


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_in_pairs(one, other):
    """Each with every other once, on a model where both have a place."""
    shared = [
        model for model in (*CASES[one].models, *CASES[other].models) if _takes(model, one) and _takes(model, other)
    ]
    if not shared:
        pytest.skip("no small model has a place for both")
    model = shared[0]
    if other in CASES[one].apart or one in CASES[other].apart:
        with pytest.raises(ValueError, match=r"already|both"):
            bound(model, one, other)
        return
    work, reverse = bound(model, one, other), bound(model, other, one)
    check_model(
        work.model, MODELS[model].shape, 7 if MODELS[model].tokens else 3, MODELS[model].batch(1).inputs[0], name=one
    )
    batch, params = MODELS[model].batch(5), p.of(work.model)[0]
    _, buffers = p.of(work.model)
    work.model.train()
    grads, loss = gradient(work, params, {n: b.clone() for n, b in buffers.items()}, batch, layer_inputs(work, 1, 1))
    assert all(bool(torch.isfinite(g).all()) for g in grads.values()) and bool(torch.isfinite(loss))
    assert p.of(reverse.model)[0].keys() == params.keys()


def _takes(model, name):
    try:
        bound(model, name)
    except ValueError:
        return False
    return True
