"""SGD against torch.optim.SGD, step for step, and against the recurrence written with numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.training.optimizers import sgd

SHAPES = {"w": (3, 2), "b": (2,), "s": ()}


def drawn(key):
    return {name: rng.normal(rng.fold(key, name), *shape, dtype=torch.float64) for name, shape in SHAPES.items()}


@given(
    st.floats(0.01, 2.0), st.sampled_from([0.0, 0.5, 0.95]), st.sampled_from([0.0, 0.1]), st.booleans(), st.integers(0)
)
@settings(deadline=None, max_examples=60)
def test_five_steps_are_those_of_torch(lr, momentum, weight_decay, nesterov, key):
    nesterov = nesterov and momentum > 0
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    ours, params = sgd(**options), drawn(key)
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in params.items()}
    optimizer, state = torch.optim.SGD(theirs.values(), **options), ours.init(params)
    for step in range(5):
        grads = drawn(rng.fold(key, step))
        for name, parameter in theirs.items():
            parameter.grad = grads[name].clone()
        optimizer.step()
        params, state = ours.step(params, grads, state)
        for name, parameter in theirs.items():
            assert torch.allclose(params[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_momentum_and_decay_follow_the_recurrence_of_the_docstring():
    optimizer, params = sgd(lr=0.1, momentum=0.9, weight_decay=0.2), drawn(1)
    w, v, state = params["w"].numpy(), np.zeros((3, 2)), optimizer.init(params)
    for step in range(3):
        grads = drawn(step + 2)
        v = 0.9 * v + (grads["w"].numpy() + 0.2 * w)
        w = w - 0.1 * v
        params, state = optimizer.step(params, grads, state)
    assert np.abs(params["w"].numpy() - w).max() < 1e-14 and np.abs(state["w"].numpy() - v).max() < 1e-14


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_nothing_is_changed_in_place(options):
    optimizer, params, grads = sgd(**options), drawn(1), drawn(2)
    state = optimizer.init(params)
    _, state = optimizer.step(params, grads, state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    optimizer.step(params, grads, state)
    assert p.same_bits(params, drawn(1)) and p.same_bits(grads, drawn(2)) and p.same_bits(state, before)


def test_no_momentum_keeps_no_state():
    assert sgd().init(drawn(1)) == {}
    assert sgd(momentum=0.5).init(drawn(1)).keys() == SHAPES.keys()


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov needs momentum > 0, got momentum 0"):
        sgd(nesterov=True)
