"""Arithmetic on parameter dicts against numpy, and the laws it obeys."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.dropouts import Dropout

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)
FLOATS = st.floats(-1e3, 1e3)


def drawn(shapes, key=0, dtype=torch.float64):
    """A dict with these shapes, mixed signs; names in an order that is not the alphabet's."""
    return {f"w{9 - i}": rng.normal(rng.fold(key, i), *shape, dtype=dtype) for i, shape in enumerate(shapes)}


def arrays(params):
    return {name: tensor.numpy() for name, tensor in params.items()}


A, B = drawn([(2, 3), (), (4,)], key=1), drawn([(2, 3), (), (4,)], key=2)


@given(SHAPES, st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_unflatten_undoes_flatten(shapes, key):
    params = drawn(shapes, key)
    vector = p.flatten(params)
    assert vector.shape == (p.num_entries(params),)
    again = p.unflatten(vector, params)
    assert list(again) == list(params) and p.same_bits(again, params)


def test_flatten_keeps_the_order_of_the_dict():
    params = {"z": torch.tensor([[1.0, -2.0]]), "a": torch.tensor(3.0)}
    assert p.flatten(params).tolist() == [1.0, -2.0, 3.0]


def test_flatten_refuses_mixed_dtypes_and_nothing():
    with pytest.raises(ValueError, match=r"one dtype, got \['torch.float32', 'torch.int64'\]"):
        p.flatten({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"one dtype, got \[\]"):
        p.flatten({})


def test_unflatten_refuses_another_length():
    with pytest.raises(ValueError, match=r"vector must have shape \(11,\), got \(10,\)"):
        p.unflatten(torch.zeros(10), A)


@given(st.lists(st.tuples(st.floats(0.01, 100), FLOATS, FLOATS), min_size=1, max_size=6), st.randoms())
@settings(deadline=None, max_examples=60)
def test_weighted_mean_does_not_depend_on_the_order_of_clients(rows, random):
    shuffled = random.sample(rows, len(rows))

    def mean(rows):
        values = torch.tensor(rows, dtype=torch.float64)
        return p.weighted_mean({"w": values[:, 1:]}, values[:, 0])["w"]

    assert torch.allclose(mean(rows), mean(shuffled), rtol=1e-12, atol=1e-9)


@given(st.lists(st.tuples(st.floats(0.01, 100), FLOATS), min_size=1, max_size=6), FLOATS)
@settings(deadline=None, max_examples=60)
def test_weighted_mean_shifts_with_its_inputs(rows, shift):
    values = torch.tensor(rows, dtype=torch.float64)
    weights, x = values[:, 0], values[:, 1:]
    moved = p.weighted_mean({"w": x + shift}, weights)["w"]
    assert torch.allclose(moved, p.weighted_mean({"w": x}, weights)["w"] + shift, rtol=1e-12, atol=1e-9)


def test_weighted_mean_is_numpys_average():
    stacked, weights = drawn([(3, 2, 2), (3,)]), torch.tensor([1.0, 5.0, 0.0])
    mean = p.weighted_mean(stacked, weights)
    for name, x in stacked.items():
        assert np.allclose(mean[name], np.average(x.numpy(), axis=0, weights=weights.numpy()), atol=1e-15)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.5], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weighted_mean_refuses_weights(weights):
    with pytest.raises(ValueError, match="weights must be finite and >= 0 with a positive sum"):
        p.weighted_mean({"w": torch.zeros(2, 3)}, torch.tensor(weights))


def test_weighted_mean_refuses_integers_and_another_number_of_weights():
    with pytest.raises(ValueError, match=r"steps: a mean needs floating-point tensors, got torch\.int64"):
        p.weighted_mean({"steps": torch.tensor([4, 6])}, torch.ones(2))
    with pytest.raises(ValueError, match=r"w: needs one entry for each of 3 weights, got \(2, 5\)"):
        p.weighted_mean({"w": torch.zeros(2, 5)}, torch.ones(3))


def test_sums_differences_and_multiples_are_numpys():
    a, b = arrays(A), arrays(B)
    for name in A:
        assert np.array_equal(p.add(A, B)[name], a[name] + b[name])
        assert np.array_equal(p.sub(A, B)[name], a[name] - b[name])
        assert np.array_equal(p.scale(A, -1.5)[name], a[name] * -1.5)
        assert np.allclose(p.add_scaled(A, B, -0.3)[name], a[name] - 0.3 * b[name], atol=1e-15)
        assert not p.zeros_like(A)[name].any()


def test_norm_and_product_are_those_of_the_flat_vectors():
    a, b = p.flatten(A).numpy(), p.flatten(B).numpy()
    assert float(p.dot(A, B)) == pytest.approx(np.dot(a, b), abs=1e-12)
    assert float(p.l2_norm(A)) == pytest.approx(np.linalg.norm(a), abs=1e-12)
    half = {"w": torch.full((4096,), 300.0, dtype=torch.float16)}
    assert float(p.l2_norm(half)) == 300.0 * 64  # summed in float64: float16 would overflow


def test_stack_adds_a_leading_axis():
    stacked = p.stack([A, B])
    assert all(torch.equal(stacked[name], torch.stack([A[name], B[name]])) for name in A)
    with pytest.raises(ValueError, match="stack needs at least one dict"):
        p.stack([])


BINARY = [p.check_alike, p.add, p.sub, p.dot, lambda a, b: p.add_scaled(a, b, 2.0), lambda a, b: p.stack([a, b])]


@pytest.mark.parametrize("operation", BINARY)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.zeros(2, 1), "c": torch.zeros(1)}, r"parameter names differ: \['b', 'c'\]"),
        ({"w": torch.zeros(2, 1)}, r"parameter names differ: \['b'\]"),
        ({"w": torch.zeros(1, 2), "b": torch.zeros(1)}, r"w: shapes differ: \(2, 1\) and \(1, 2\)"),
        ({"w": torch.zeros(2, 1), "b": torch.zeros(())}, r"b: shapes differ: \(1,\) and \(\)"),
        (
            {"w": torch.zeros(2, 1), "b": torch.zeros(1, dtype=torch.float64)},
            "b: dtypes differ: torch.float32 and torch.float64",
        ),
    ],
)
def test_dicts_that_differ_are_refused(operation, other, message):
    with pytest.raises(ValueError, match=message):
        operation({"w": torch.zeros(2, 1), "b": torch.zeros(1)}, other)


def test_nothing_is_changed_in_place():
    before = {name: tensor.clone() for name, tensor in A.items()}
    p.add(A, B), p.sub(A, B), p.scale(A, 2.0), p.add_scaled(A, B, 2.0), p.zeros_like(A), p.separate(A["w9"]).zero_()
    assert p.same_bits(A, before)


def test_same_bits_tells_minus_zero_dtype_and_shape_apart():
    one = {"w": torch.tensor([0.0, float("nan")])}
    assert p.same_bits(one, {"w": torch.tensor([0.0, float("nan")])})
    assert not p.same_bits(one, {"w": torch.tensor([-0.0, float("nan")])})
    assert not p.same_bits(one, {"w": one["w"].double()})
    assert not p.same_bits(one, {"w": one["w"][:, None]})
    assert not p.same_bits(one, {"v": one["w"]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_all_finite_sees_one_bad_entry(bad):
    assert p.all_finite(A) and p.all_finite({})
    assert not p.all_finite({**A, "x": torch.tensor([1.0, bad])})


def test_of_copies_parameters_and_persistent_buffers_only():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), Dropout(0.5))
    trainable, buffers = p.of(model)
    assert list(trainable) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(buffers) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    trainable["0.weight"].zero_()
    buffers["1.running_var"].zero_()
    assert model[0].weight.any() and model[1].running_var.all()
    assert not any(tensor.requires_grad for tensor in trainable.values())


def test_separate_is_contiguous_and_shares_nothing():
    whole = torch.arange(6.0).reshape(2, 3)
    part = p.separate(whole.T[1:])
    assert part.is_contiguous() and torch.equal(part, whole.T[1:])
    part.zero_()
    assert whole.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_lanes_are_what_stacking_put_together_and_one_is_a_stack_of_itself():
    many = [{"w": rng.normal(k, 2, 3), "b": torch.tensor(float(-k))} for k in range(4)]
    stacked = p.stack(many)
    assert all(p.same_bits(p.lanes(stacked, k), one) for k, one in enumerate(many))
    assert p.same_bits(p.lanes(stacked, slice(1, 3)), p.stack(many[1:3]))
    assert p.same_bits(p.lanes(stacked, [2, 0]), p.stack([many[2], many[0]]))
    assert p.same_bits(p.as_stack(many[1]), p.stack(many[1:2]))
    p.lanes(stacked, slice(0, 2))["b"].add_(7.0)  # a view
    assert stacked["b"].tolist() == [7.0, 6.0, -2.0, -3.0]
