"""Schedules against torch.optim.lr_scheduler, and against values written out by hand."""

import inspect
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler as theirs

from fedsim.training.schedules import SCHEDULES, constant, cosine, exponential, linear, step, unchanged

NEEDED = {"step": {"every": 3, "gamma": 0.5}, "exponential": {"gamma": 0.8}}


def factors(schedule, rounds):
    return [schedule(round) for round in range(1, rounds + 1)]


def of_torch(make, rounds, warmup, lr=0.3):
    """Factors of a torch scheduler after a linear warm-up that would reach 1 in the round after it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    if warmup:
        rising = theirs.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        scheduler = theirs.SequentialLR(optimizer, [rising, scheduler], milestones=[warmup])
    found = []
    for _ in range(rounds):
        found.append(scheduler.get_last_lr()[0] / lr)
        optimizer.step()
        scheduler.step()
    return found


@st.composite
def lengths(draw):
    rounds = draw(st.integers(1, 60))
    return rounds, draw(st.integers(0, min(rounds - 1, 12)))


@given(lengths(), st.floats(0, 1), st.integers(1, 20), st.floats(0.05, 1))
@settings(deadline=None, max_examples=40)
def test_every_schedule_is_that_of_torch(length, floor, every, gamma):
    rounds, warmup = length
    n = rounds - warmup
    pairs = [
        (constant(rounds, warmup=warmup), lambda o: theirs.ConstantLR(o, factor=1.0)),
        (cosine(rounds, floor=floor, warmup=warmup), lambda o: theirs.CosineAnnealingLR(o, n, eta_min=0.3 * floor)),
        (linear(rounds, floor=floor, warmup=warmup), lambda o: theirs.LinearLR(o, 1.0, floor, total_iters=n)),
        (step(rounds, every=every, gamma=gamma, warmup=warmup), lambda o: theirs.StepLR(o, every, gamma)),
        (exponential(rounds, gamma=gamma, warmup=warmup), lambda o: theirs.ExponentialLR(o, gamma)),
    ]
    for ours, make in pairs:
        assert factors(ours, rounds) == pytest.approx(of_torch(make, rounds, warmup), rel=1e-10, abs=1e-12)


def test_schedules_have_the_values_of_their_formulas():
    third, half = 1 / 3, 0.5
    assert factors(constant(5, warmup=2), 5) == pytest.approx([third, 2 * third, 1, 1, 1], abs=1e-15)
    assert factors(linear(4), 4) == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-15)
    assert factors(linear(4, floor=0.2), 4) == pytest.approx([1, 0.8, 0.6, 0.4], abs=1e-15)
    root = 2**0.5 / 4
    assert factors(cosine(4), 4) == pytest.approx([1, half + root, half, half - root], abs=1e-15)
    assert factors(cosine(7, floor=0.5, warmup=1), 7) == pytest.approx(
        [half, 1, 0.75 + 3**0.5 / 8, 0.875, 0.75, 0.625, 0.75 - 3**0.5 / 8], abs=1e-15
    )
    assert factors(step(6, every=2), 6) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01], abs=1e-15)
    assert factors(exponential(4, gamma=0.5, warmup=1), 4) == [half, 1, half, 0.25]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_schedule_rises_to_1_in_the_round_after_its_warm_up_and_never_rises_again(name, warmup):
    found = factors(SCHEDULES[name](20, warmup=warmup, **NEEDED.get(name, {})), 20)
    assert found[:warmup] == sorted(found[:warmup]) and all(0 < factor < 1 for factor in found[:warmup])
    assert found[warmup] == 1
    assert found[warmup:] == sorted(found[warmup:], reverse=True) and found[-1] > 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_warm_up_must_end_before_the_run(name):
    make = SCHEDULES[name]
    with pytest.raises(ValueError, match=r"^warmup must be < rounds \(5\), got 5$"):
        make(5, warmup=5, **NEEDED.get(name, {}))
    assert make(5, warmup=4, **NEEDED.get(name, {}))(5) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_survives_pickling_and_gives_plain_numbers(name):
    schedule = SCHEDULES[name](9, warmup=2, **NEEDED.get(name, {}))
    assert factors(pickle.loads(pickle.dumps(schedule)), 9) == factors(schedule, 9)
    assert {type(factor) for factor in factors(schedule, 9)} == {float}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_yaml_key_is_keyword_only(name):
    first, *rest = inspect.signature(SCHEDULES[name]).parameters.values()
    assert first.name == "rounds" and {parameter.kind for parameter in rest} == {inspect.Parameter.KEYWORD_ONLY}


def test_cosine_and_linear_follow_a_new_total():
    for make in (cosine, linear):
        short, long = factors(make(4), 4), factors(make(8), 8)
        assert long[::2] == pytest.approx(short, abs=1e-15)


def test_without_a_schedule_nothing_changes():
    assert factors(unchanged, 3) == factors(constant(3), 3) == [1.0, 1.0, 1.0]
