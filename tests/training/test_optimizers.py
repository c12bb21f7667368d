"""Optimizers against torch.optim, step for step, against recurrences in numpy, and in place against pure."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.training.optimizers import OPTIMIZERS, Folded, Optimizer, adam, adamw, in_place, sgd

SHAPES = {"w": (3, 2), "b": (2,), "s": ()}
LARGE = {"conv": (5, 3, 3, 3), "odd": (37,), "wide": (7, 53), "s": ()}  # with and without a rest after whole vectors
FACTORS = (1.0, 0.5, 0.0, 0.3, 1.7, 1.0, 0.01)

rates, decays = st.floats(0.01, 2.0), st.sampled_from([0.0, 0.1, 0.7])
sgds = st.fixed_dictionaries(
    {"lr": rates, "momentum": st.sampled_from([0.0, 0.5, 0.95]), "weight_decay": decays, "nesterov": st.booleans()}
).map(lambda options: {**options, "nesterov": options["nesterov"] and options["momentum"] > 0})
adams = st.fixed_dictionaries(
    {
        "lr": rates,
        "beta1": st.sampled_from([0.0, 0.3, 0.9]),
        "beta2": st.sampled_from([0.0, 0.6, 0.999]),
        "eps": st.sampled_from([1e-8, 0.1]),
        "weight_decay": decays,
    }
)
cases = st.one_of(
    st.tuples(st.just("sgd"), sgds), st.tuples(st.just("adam"), adams), st.tuples(st.just("adamw"), adams)
)
SOME = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adam", {"weight_decay": 0.1}),
    ("adamw", {}),
]


def drawn(key, shapes=SHAPES, dtype=torch.float64):
    return {name: rng.normal(rng.fold(key, name), *shape, dtype=dtype) for name, shape in shapes.items()}


def cloned(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(p.same_bits(a[part], b[part]) for part in a)


def of_torch(name, options):
    """The optimizer of torch of the same name and options, without parameters."""
    if name == "sgd":
        return partial(torch.optim.SGD, **options)
    betas = options["beta1"], options["beta2"]
    rest = {key: value for key, value in options.items() if not key.startswith("beta")}
    return partial({"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name], betas=betas, **rest)


@given(cases, st.integers(0))
@settings(deadline=None, max_examples=80)
def test_seven_steps_are_those_of_torch_whatever_the_schedule(case, key):
    name, options = case
    ours, params = OPTIMIZERS[name](**options), drawn(key)
    theirs = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in params.items()}
    optimizer, state = of_torch(name, options)(theirs.values()), ours.init(params)
    for t, factor in enumerate(FACTORS, 1):
        grads = drawn(rng.fold(key, t))
        for name, parameter in theirs.items():
            parameter.grad = grads[name].clone()
        optimizer.param_groups[0]["lr"] = options["lr"] * factor
        optimizer.step()
        params, state = ours.step(params, grads, state, t, factor)
        for name, parameter in theirs.items():
            assert torch.allclose(params[name], parameter.detach(), rtol=1e-12, atol=1e-12)


def test_momentum_and_decay_follow_the_recurrence_of_the_docstring():
    optimizer, params = sgd(lr=0.1, momentum=0.9, weight_decay=0.2), drawn(1)
    w, v, state = params["w"].numpy(), np.zeros((3, 2)), optimizer.init(params)
    for t, factor in enumerate(FACTORS, 1):
        grads = drawn(t + 1)
        v = 0.9 * v + (grads["w"].numpy() + 0.2 * w)
        w = w - 0.1 * factor * v
        params, state = optimizer.step(params, grads, state, t, factor)
    assert np.abs(params["w"].numpy() - w).max() < 1e-14
    assert np.abs(state["momentum"]["w"].numpy() - v).max() < 1e-14


@pytest.mark.parametrize(("make", "through"), [(adam, 1), (adamw, 0)])
def test_adam_follows_the_formula_with_the_moments_written_out_as_sums(make, through):
    """Moments as sums over all gradients so far, not as recurrences; decay through the gradient, or beside it."""
    lr, beta1, beta2, eps, decay = 0.05, 0.8, 0.95, 1e-3, 0.3
    optimizer = make(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    params = drawn(1)
    w, state, seen = params["w"].numpy(), optimizer.init(params), []
    for t, factor in enumerate(FACTORS, 1):
        grads = drawn(t + 1)
        seen.append(grads["w"].numpy() + through * decay * w)
        first = sum((1 - beta1) * beta1 ** (t - i) * g for i, g in enumerate(seen, 1)) / (1 - beta1**t)
        second = sum((1 - beta2) * beta2 ** (t - i) * g**2 for i, g in enumerate(seen, 1)) / (1 - beta2**t)
        w = w - lr * factor * (first / (np.sqrt(second) + eps) + (1 - through) * decay * w)
        params, state = optimizer.step(params, grads, state, t, factor)
    assert np.abs(params["w"].numpy() - w).max() < 1e-13


def test_the_first_step_of_adam_is_lr_towards_minus_the_sign_of_the_gradient():
    params, grads = drawn(1), drawn(2)
    stepped, _ = adam(lr=0.2, eps=1e-300).step(params, grads, adam().init(params), 1, 0.5)
    for name, tensor in stepped.items():
        assert torch.allclose(tensor, params[name] - 0.1 * grads[name].sign(), rtol=0, atol=1e-14)


@given(cases, st.integers(0), st.sampled_from([torch.float32, torch.float64]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_in_place_gives_the_same_bits(case, key, dtype, transposed):
    name, options = case
    optimizer, pure = OPTIMIZERS[name](**options), drawn(key, LARGE, dtype)
    if transposed:
        pure["wide"] = pure["wide"].T
    changed, state = cloned(pure), optimizer.init(pure)
    held = optimizer.init(changed)
    tensors = [*changed.values(), *(tensor for part in held.values() for tensor in part.values())]
    for t, factor in enumerate(FACTORS, 1):
        grads = drawn(rng.fold(key, t), LARGE, dtype)
        grads = {**grads, "wide": grads["wide"].reshape(pure["wide"].shape)}
        pure, state = optimizer.step(pure, grads, state, t, factor)
        assert optimizer.step_(changed, dict(reversed(grads.items())), held, t, factor) is None
        assert p.same_bits(changed, pure) and same_state(held, state)
    after = [*changed.values(), *(tensor for part in held.values() for tensor in part.values())]
    assert all(a is b for a, b in zip(tensors, after, strict=True))


@pytest.mark.parametrize(("name", "options"), SOME)
def test_clients_stacked_are_clients_one_by_one(name, options):
    optimizer = OPTIMIZERS[name](**options)
    locals_ = [drawn(k, LARGE, torch.float32) for k in range(3)]
    stacked, states = p.stack(locals_), [optimizer.init(local) for local in locals_]
    changed = cloned(stacked)
    state, held = optimizer.init(stacked), optimizer.init(changed)
    for t, factor in enumerate(FACTORS, 1):
        grads = [drawn(rng.fold(9, t, k), LARGE, torch.float32) for k in range(3)]
        for k in range(3):
            locals_[k], states[k] = optimizer.step(locals_[k], grads[k], states[k], t, factor)
        stacked, state = optimizer.step(stacked, p.stack(grads), state, t, factor)
        optimizer.step_(changed, p.stack(grads), held, t, factor)
    assert p.same_bits(stacked, changed)
    assert p.same_bits(stacked, p.stack(locals_))
    assert all(p.same_bits(state[part], p.stack([own[part] for own in states])) for part in state)


@pytest.mark.parametrize(("name", "options"), SOME)
def test_in_place_on_the_first_clients_leaves_the_others_alone(name, options):
    optimizer, params = OPTIMIZERS[name](**options), {n: torch.stack([t, t + 1, t + 2]) for n, t in drawn(1).items()}
    before, state = cloned(params), optimizer.init(params)
    first = {n: t[:2] for n, t in params.items()}
    grads = {n: torch.ones_like(t) for n, t in first.items()}
    optimizer.step_(first, grads, {part: {n: t[:2] for n, t in own.items()} for part, own in state.items()}, 1, 1.0)
    assert all(bool((params[n][:2] != before[n][:2]).all()) for n in params)
    assert all(torch.equal(params[n][2], before[n][2]) for n in params)
    assert all(bool((t[:2] != 0).all()) and not bool(t[2].any()) for own in state.values() for t in own.values())


@pytest.mark.parametrize(("name", "options"), SOME)
def test_a_step_changes_nothing_in_place(name, options):
    optimizer, params, grads = OPTIMIZERS[name](**options), drawn(1), drawn(2)
    _, state = optimizer.step(params, grads, optimizer.init(params), 1, 1.0)
    before = {part: cloned(own) for part, own in state.items()}
    optimizer.step(params, grads, state, 2, 1.0)
    assert p.same_bits(params, drawn(1)) and p.same_bits(grads, drawn(2)) and same_state(state, before)


@pytest.mark.parametrize(("name", "options"), SOME)
def test_in_place_takes_gradients_that_share_memory_or_are_expanded(name, options):
    """Autograd hands out one tensor for both terms of a sum, vmap an expanded one for a parameter that is not used."""
    optimizer, one = OPTIMIZERS[name](**options), torch.tensor([1.0, -2.0, 0.5])
    params = {"a": torch.ones(3), "b": -torch.ones(3), "c": torch.ones(4, 3)}
    grads = {"a": one, "b": one, "c": one.expand(4, 3)}
    state = optimizer.init(params)
    expected, _ = optimizer.step(params, {n: g.clone() for n, g in grads.items()}, state, 1, 1.0)
    optimizer.step_(params, grads, state, 1, 1.0)
    assert p.same_bits(params, expected)


@pytest.mark.parametrize(("name", "options"), SOME)
def test_an_optimizer_survives_pickling(name, options):
    optimizer, params, grads = OPTIMIZERS[name](**options), drawn(1), drawn(2)
    again = pickle.loads(pickle.dumps(optimizer))
    results = [o.step(params, grads, o.init(params), 1, 1.0)[0] for o in (optimizer, again)]
    assert p.same_bits(*results) and again.folded == optimizer.folded


def test_the_state_is_named_by_what_it_is():
    params = drawn(1)
    assert sgd().init(params) == {}
    assert sgd(momentum=0.5).init(params).keys() == {"momentum"}
    assert adam().init(params).keys() == adamw().init(params).keys() == {"mean", "square"}
    for optimizer in (sgd(momentum=0.5), adam(), adamw()):
        assert all(p.same_bits(part, p.zeros_like(params)) for part in optimizer.init(params).values())


def test_plain_sgd_says_how_it_is_folded_and_others_are_not():
    optimizer, params, grads = sgd(lr=0.3, weight_decay=0.2), drawn(1), drawn(2)
    assert optimizer.folded == Folded(lr=0.3, weight_decay=0.2)
    stepped, _ = optimizer.step(params, grads, {}, 1, 0.5)
    for name, tensor in stepped.items():
        assert torch.allclose(tensor, (1 - 0.15 * 0.2) * params[name] - 0.15 * grads[name], rtol=0, atol=1e-15)
    assert [o.folded for o in (sgd(momentum=0.1), adam(), adamw(weight_decay=0.0))] == [None, None, None]


def test_a_pure_step_becomes_one_in_place_even_if_it_hands_on_what_it_was_given():
    def step(params, grads, state, t, factor):
        """Two heavy balls: the last two sets of parameters move on by one place."""
        moved = {n: w + state["old"][n] - state["older"][n] - factor * t * grads[n] for n, w in params.items()}
        return moved, {"old": params, "older": state["old"]}

    optimizer = Optimizer(lambda w: {"old": p.zeros_like(w), "older": p.zeros_like(w)}, step, in_place(step))
    pure, changed = drawn(1), drawn(1)
    state, held = optimizer.init(pure), optimizer.init(changed)
    for t in range(1, 5):
        pure, state = optimizer.step(pure, drawn(t + 1), state, t, 0.5)
        optimizer.step_(changed, drawn(t + 1), held, t, 0.5)
        assert p.same_bits(changed, pure) and same_state(held, state)
    assert optimizer.folded is None


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov needs momentum > 0, got momentum 0"):
        sgd(nesterov=True)
