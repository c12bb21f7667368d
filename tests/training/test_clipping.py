"""Clipping against torch's own, alone, after a strategy's correction, and under vmap."""

from dataclasses import replace

import pytest
import torch
from federations import control, federation
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap

from fedsim import params as p
from fedsim import rng
from fedsim.records import Broadcast
from fedsim.training.client import batches, corrected, gradient, train_client
from fedsim.training.clipping import clipped
from fedsim.training.steps import step_of

SHAPES = {"a": (3, 4), "b": (4,), "c": ()}


def grads_of(seed, dtype=torch.float64, scale=1.0):
    return {name: scale * rng.normal(rng.fold(seed, name), *shape, dtype=dtype) for name, shape in SHAPES.items()}


def torchs(grads, max_norm):
    leaves = [nn.Parameter(torch.zeros_like(grad)) for grad in grads.values()]
    for leaf, grad in zip(leaves, grads.values(), strict=True):
        leaf.grad = grad.clone()
    nn.utils.clip_grad_norm_(leaves, max_norm)
    return {name: leaf.grad for name, leaf in zip(grads, leaves, strict=True)}


@given(
    st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(1e-4, 1e2), st.sampled_from([torch.float32, torch.float64])
)
def test_it_is_torchs_bit_for_bit(seed, max_norm, scale, dtype):
    grads = grads_of(seed, dtype, scale)
    assert p.same_bits(clipped(grads, max_norm), torchs(grads, max_norm))


def test_the_norm_is_that_of_all_together():
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[-4.0]])}
    short = clipped(grads, 2.5)
    assert torch.allclose(short["a"], torch.tensor([1.5, 0.0])) and torch.allclose(short["b"], torch.tensor([[-2.0]]))
    assert clipped(grads, None) is grads
    assert p.same_bits(clipped(grads, 5.1), grads)
    zero = p.zeros_like(grads)
    assert p.same_bits(clipped(zero, 1.0), zero)


def test_mapped_over_clients_each_has_its_own_norm():
    scales = [0.01, 1.0, 40.0]
    several = [grads_of(seed, scale=scale) for seed, scale in enumerate(scales)]
    found = vmap(lambda grads: clipped(grads, 2.0))(p.stack(several))
    for lane, grads in enumerate(several):
        for name, expected in torchs(grads, 2.0).items():
            torch.testing.assert_close(found[name][lane], expected, rtol=1e-14, atol=0)
    assert p.same_bits(p.lanes(found, 0), several[0])  # the short one is left alone


def by_torch(made, client, max_norm, key):
    """Local training with torch's optimizer and clipping, on what the strategy makes of the gradients."""
    work = made.work
    broadcast = Broadcast(*p.of(work.model), {}, 1)
    data = made.data.client(client)
    leaves = {name: nn.Parameter(tensor.clone()) for name, tensor in broadcast.params.items()}
    optimizer = torch.optim.SGD([*leaves.values()], lr=0.1)
    clips = 0
    for indices in batches(len(data), work.batch_size, work.local_epochs, key):
        local = {name: leaf.detach() for name, leaf in leaves.items()}
        grads, _ = gradient(work, local, {}, data.take(indices), {})
        for name, grad in tripled(grads, local, broadcast, {}).items():
            leaves[name].grad = grad
        clips += bool(nn.utils.clip_grad_norm_([*leaves.values()], max_norm) > max_norm)
        optimizer.step()
    return broadcast, {name: leaf.detach() for name, leaf in leaves.items()}, clips


def tripled(grads, local, broadcast, state):
    return {name: 3 * grad for name, grad in grads.items()}


def test_training_clips_what_the_strategy_makes_of_gradients():
    made = federation("plain", torch.float64)
    work = replace(made.work, rule=made.work.rule._replace(correct=tripled), max_grad_norm=2.5)
    sizes = made.data.partition.sizes()
    client = int(sizes.argmax())
    broadcast, expected, clips = by_torch(made, client, 2.5, 6)
    assert 0 < clips < len([*batches(int(sizes[client]), 4, 2, 6)])  # some are longer, some are not
    found = train_client(work, broadcast, client, made.data.client(client), state={}, key=6)
    for name, tensor in expected.items():
        torch.testing.assert_close(broadcast.params[name] + found.update[name], tensor, rtol=1e-13, atol=1e-15)


def test_with_the_states_of_a_strategy_too():
    made = federation("states", torch.float64)
    work = replace(made.work, max_grad_norm=0.5)
    params = p.of(work.model)[0]
    grads, state = ({n: rng.normal(rng.fold(s, n), *t.shape, dtype=t.dtype) for n, t in params.items()} for s in (1, 2))
    broadcast = Broadcast(params, {}, p.scale(state, 0.3), 1)
    expected = torchs(control().local.correct(grads, params, broadcast, state), 0.5)
    assert p.same_bits(corrected(work, grads, params, broadcast, state, remains={}), expected)
    assert p.l2_norm(expected).item() == pytest.approx(0.5, rel=1e-5)


def test_fused_steps_do_not_fold_the_update_into_their_products():
    """Then they would never see a whole gradient."""
    work = federation("plain").work
    assert step_of(work, "fused").take.func.__name__ == "_folded"
    assert step_of(replace(work, max_grad_norm=1.0), "fused").take.func.__name__ == "_by_gradient"
