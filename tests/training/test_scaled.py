"""Steps of some parameters times a factor, against torch's parameter groups and in place against pure."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.training.optimizers import OPTIMIZERS, sgd
from fedsim.training.scaled import scaled

SHAPES = {"w": (37,), "s": (1,), "b": (3, 5), "c": ()}
FACTORS = {"s": 0.1, "b": 3.0, "c": 0.0}
SCHEDULE = (1.0, 0.5, 0.0, 1.7, 0.3)
CASES = [
    ("sgd", {"lr": 0.3}),
    ("sgd", {"lr": 0.3, "weight_decay": 0.2}),
    ("sgd", {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.2}),
    ("sgd", {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    ("adam", {"lr": 0.2, "weight_decay": 0.1}),
    ("adamw", {"lr": 0.2, "weight_decay": 0.1}),
]
THEIRS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def drawn(key, dtype=torch.float64, lead=()):
    return {name: rng.normal(rng.fold(key, name), *lead, *shape, dtype=dtype) for name, shape in SHAPES.items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(p.same_bits(a[part], b[part]) for part in a)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_factor_is_a_factor_on_the_step_size_as_a_parameter_group_of_torch_has_it(name, options):
    ours, params = scaled(OPTIMIZERS[name](**options), FACTORS), drawn(1)
    own = {n: torch.nn.Parameter(tensor.clone()) for n, tensor in params.items()}
    theirs = THEIRS[name]([{"params": [w], "at": n} for n, w in own.items()], **options)
    state = ours.init(params)
    for t, factor in enumerate(SCHEDULE, 1):
        grads = drawn(t + 1)
        for group in theirs.param_groups:
            group["lr"] = options["lr"] * factor * FACTORS.get(group["at"], 1.0)
        for n, w in own.items():
            w.grad = grads[n]
        theirs.step()
        params, state = ours.step(params, grads, state, t, factor)
        assert all(torch.allclose(params[n], w.detach(), rtol=1e-12, atol=1e-13) for n, w in own.items())


@given(st.sampled_from(CASES), st.integers(0), st.sampled_from([torch.float32, torch.float64]), st.booleans())
@settings(deadline=None, max_examples=40)
def test_in_place_gives_the_same_bits(case, key, dtype, stacked):
    name, options = case
    optimizer, pure = scaled(OPTIMIZERS[name](**options), FACTORS), drawn(key, dtype, (3,) * stacked)
    changed, state = {n: t.clone() for n, t in pure.items()}, optimizer.init(pure)
    held, tensors = optimizer.init(changed), list(changed.values())
    for t, factor in enumerate(SCHEDULE, 1):
        grads = drawn(rng.fold(key, t), dtype, (3,) * stacked)
        pure, state = optimizer.step(pure, grads, state, t, factor)
        assert optimizer.step_(changed, grads, held, t, factor) is None
        assert p.same_bits(changed, pure) and same_state(held, state)
    assert all(a is b for a, b in zip(tensors, changed.values(), strict=True))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_others_are_stepped_bit_for_bit_as_before(name, options):
    plain, params, grads = OPTIMIZERS[name](**options), drawn(1), drawn(2)
    expected, _ = plain.step(params, grads, plain.init(params), 1, 0.7)
    found, _ = scaled(plain, FACTORS).step(params, grads, plain.init(params), 1, 0.7)
    assert torch.equal(found["w"], expected["w"]) and torch.equal(found["c"], params["c"])
    assert not torch.equal(found["s"], expected["s"])
    assert p.same_bits(params, drawn(1))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_clients_stacked_are_clients_one_by_one(name, options):
    optimizer, stacked = scaled(OPTIMIZERS[name](**options), FACTORS), drawn(1, torch.float32, (3,))
    alone = [{n: t[k].clone() for n, t in stacked.items()} for k in range(3)]
    held, states = optimizer.init(stacked), [optimizer.init(one) for one in alone]
    for t, factor in enumerate(SCHEDULE, 1):
        grads = drawn(t + 1, torch.float32, (3,))
        optimizer.step_(stacked, grads, held, t, factor)
        for k in range(3):
            own = {n: g[k] for n, g in grads.items()}
            alone[k], states[k] = optimizer.step(alone[k], own, states[k], t, factor)
    assert p.same_bits(stacked, p.stack(alone))


def test_it_is_not_folded_unless_there_is_nothing_to_do():
    plain = sgd(lr=0.1)
    assert plain.folded is not None and scaled(plain, {"a": 0.1}).folded is None
    assert scaled(plain, {}) is plain


def test_it_survives_pickling_and_names_that_are_not_there_do_not_matter():
    optimizer, params, grads = scaled(sgd(lr=0.1), {"s": 0.5, "gone": 0.1}), drawn(1), drawn(2)
    again = pickle.loads(pickle.dumps(optimizer))
    results = [o.step(params, grads, o.init(params), 1, 1.0)[0] for o in (optimizer, again)]
    assert p.same_bits(*results)
    optimizer.step_(params, grads, {}, 1, 1.0)
    assert p.same_bits(params, results[0])


@pytest.mark.parametrize("factor", [-0.1, float("nan")])
def test_a_factor_below_0_is_refused(factor):
    with pytest.raises(ValueError, match=r"factors must be >= 0, got w: (-0.1|nan)"):
        scaled(sgd(), {"w": factor})
