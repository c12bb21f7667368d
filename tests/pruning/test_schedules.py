"""Schedules against the paper's labels, masks that were really pruned, exact fractions and torch's own schedule."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.models import zoo
from fedsim.pruning import criteria, masks, schedules

# Frankle, Carbin 2019: percent of the weights that remain after so many prunings, as printed in the paper
LABELS = {
    "lenet-300-100": ((1, 28, 28), {3: 51.3, 7: 21.1, 9: 13.5, 15: 3.6, 16: 2.9}),
    "conv-2": ((3, 32, 32), {11: 8.8, 14: 4.6}),
    "conv-4": ((3, 32, 32), {11: 11.1, 12: 9.2}),
}


def lottery(model):
    """Shapes, sizes and rates of a model's weights."""
    params = p.of(zoo.MODELS[model](LABELS[model][0], 10))[0]
    shapes = {name: tuple(params[name].shape) for name in masks.prunable(params)}
    rates = schedules.by_kind(shapes, "head.weight", convolution=0.1, dense=0.2)
    return shapes, {name: math.prod(shape) for name, shape in shapes.items()}, rates


@pytest.mark.parametrize("model", LABELS)
def test_the_formula_gives_the_papers_labels(model):
    _, sizes, rates = lottery(model)
    labels = LABELS[model][1]
    assert {r: round(100 * schedules.remaining_after(sizes, rates, r), 1) for r in labels} == labels


@pytest.mark.parametrize("model", LABELS)
def test_masks_that_were_pruned_so_many_times_have_the_papers_labels(model):
    shapes, _, rates = lottery(model)
    labels, found = LABELS[model][1], {}
    scores = {name: rng.uniform(rng.fold(1, name), *shape) for name, shape in shapes.items()}
    kept = masks.ones(scores, scores)
    for times in range(1, max(labels) + 1):
        kept = criteria.lowest(scores, kept, criteria.layerwise(kept, rates))
        found[times] = round(100 * masks.remaining(kept), 1)
    assert {r: found[r] for r in labels} == labels


def test_rates_go_by_the_kind_of_layer():
    shapes = {"conv": (4, 2, 3, 3), "fc": (5, 6), "head": (3, 5)}
    assert schedules.by_kind(shapes, "head", convolution=0.1, dense=0.2) == {"conv": 0.1, "fc": 0.2, "head": 0.1}
    explicit = schedules.by_kind(shapes, "head", convolution=0.15, dense=0.0, output=0.3)
    assert explicit == {"conv": 0.15, "fc": 0.0, "head": 0.3}
    with pytest.raises(ValueError, match="head: no weight is called last; there are conv, fc, head"):
        schedules.by_kind(shapes, "last", convolution=0.1, dense=0.2)
    with pytest.raises(ValueError, match=r"dense must be in \[0, 1\], got 20"):
        schedules.by_kind(shapes, "head", convolution=0.1, dense=20, output=0.1)


@given(st.lists(st.tuples(st.integers(1, 1000), st.fractions(0, 1)), min_size=1, max_size=4), st.integers(0, 20))
def test_what_remains_is_that_of_exact_fractions(layers, times):
    left = [Fraction(size) for size, _ in layers]
    for _ in range(times):
        left = [part - rate * part for part, (_, rate) in zip(left, layers, strict=True)]
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    rates = {str(i): float(rate) for i, (_, rate) in enumerate(layers)}
    expected = float(sum(left) / sum(sizes.values()))
    assert schedules.remaining_after(sizes, rates, times) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_layers_without_a_rate_stay_whole_and_wrong_ones_are_named():
    assert schedules.remaining_after({"conv": 30, "fc": 10}, {"conv": 0.5}, 2) == (7.5 + 10) / 40
    for sizes, rates, times, message in [
        ({"a": 1}, {"b": 0.1}, 1, "b: no such layer; there are a"),
        ({"a": 1}, {"a": 1.1}, 1, r"a: rate must be in \[0, 1\], got 1.1"),
        ({"a": 1}, {"a": 0.1}, -1, "times must be >= 0, got -1"),
        ({}, {}, 1, "no weights"),
    ]:
        with pytest.raises(ValueError, match=message):
            schedules.remaining_after(sizes, rates, times)


rounds = st.integers(-5, 60)


@given(rounds, st.integers(0, 20), st.integers(0, 30), st.fractions(0, 1), st.fractions(0, 1))
def test_cubic_is_that_of_exact_fractions_and_never_falls(now, start, length, final, part):
    initial = final * part
    if now >= start + length:
        expected = final
    elif now <= start:
        expected = initial
    else:  # (final - s) goes with the cube of what is left of the way
        expected = final - (final - initial) * Fraction(start + length - now, length) ** 3
    ask = {"start": start, "end": start + length, "final": float(final), "initial": float(initial)}
    found = schedules.cubic(now, **ask)
    assert found == pytest.approx(float(expected), abs=1e-12)
    assert schedules.cubic(now + 1, **ask) >= found - 1e-12


def test_cubic_has_done_seven_eighths_half_way():
    assert [schedules.cubic(r, 10, 20, 0.8) for r in (1, 10, 15, 20, 99)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])
    assert schedules.cubic(4, 5, 5, 0.8) == 0 and schedules.cubic(5, 5, 5, 0.8) == 0.8
    for change, message in [
        ({"final": 1.2}, r"final must be in \[0, 1\], got 1.2"),
        ({"initial": 0.9}, r"initial must be in \[0, final\], that is 0.8, got 0.9"),
        ({"start": 30}, "start must be <= end, that is 20, got 30"),
    ]:
        with pytest.raises(ValueError, match=message):
            schedules.cubic(**{"round": 12, "start": 10, "end": 20, "final": 0.8, **change})


def test_cosine_is_torchs_annealing_and_then_nothing():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 17)
    for now in range(17):
        assert schedules.cosine(now, 17, 0.3) == pytest.approx(annealing.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        annealing.step()
    assert [schedules.cosine(now, 17, 0.3) for now in (17, 18, 100)] == [0, 0, 0]
    for arguments in [(1, 0, 0.3), (-1, 5, 0.3), (1, 5, 1.3)]:
        with pytest.raises(ValueError, match=r"needs round|start_share must"):
            schedules.cosine(*arguments)
