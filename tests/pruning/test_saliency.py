"""SNIP and GraSP of a federation, against autograd on all its examples in one place, and sorted lists."""

from dataclasses import replace

import pytest
import torch
from federations import CLIENTS, federation, result
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng, wire
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.errors import RunError
from fedsim.federation import Probing, broadcast, job, pruned, start
from fedsim.pruning.pruning import masks_of
from fedsim.pruning.saliency import grasp, snip
from fedsim.training.client import directed

MADE = {"snip": snip, "grasp": grasp}


def everybody(method, sparsity=0.7, *, smooth=False):
    """All clients of 1 to 13 examples in each round, in float64; ``smooth``: tanh for ReLU."""
    made = replace(
        federation("plain", torch.float64), clients_per_round=CLIENTS, pruning=MADE[method](sparsity=sparsity)
    )
    if not smooth:
        return made
    with rng.torch_seeded(4):
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return replace(made, work=replace(made.work, model=model))


def pooled(made):
    """Weights, gradient g and H g of the mean loss over everybody's examples, by autograd."""
    params = {n: t.clone().requires_grad_() for n, t in start(made).params.items()}
    logits = functional_call(made.work.model, params, (made.data.train.inputs,))
    loss = nn.functional.cross_entropy(logits, made.data.train.labels)
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    products = torch.autograd.grad(grads, list(params.values()), grad_outputs=[g.detach() for g in grads])
    weights = {n: t.detach() for n, t in params.items()}
    return weights, *({n: t.detach() for n, t in zip(params, found, strict=True)} for found in (grads, products))


def lowest_gone(scores, sparsity):
    """Masks by one sorted list of (score, layer, entry); the highest of each layer is not in it."""
    flat = {name: score.flatten().tolist() for name, score in scores.items()}
    top = {name: max(range(len(values)), key=values.__getitem__) for name, values in flat.items()}
    order = sorted((v, name, i) for name, values in flat.items() for i, v in enumerate(values) if i != top[name])
    kept = {name: [True] * len(values) for name, values in flat.items()}
    for _, name, i in order[: round(sparsity * sum(map(len, flat.values())))]:
        kept[name][i] = False
    return {name: torch.tensor(mask).reshape(scores[name].shape) for name, mask in kept.items()}


def probing(made, asked):
    """What ``asked`` makes of the probes of the first round."""
    found = []
    reference().drive(job(made), lambda c: found.append(asked(Probing(made, c.run_cohort, start(made), 1))))
    return found[0]


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.93])
def test_snip_is_that_of_all_examples_in_one_place(sparsity):
    made = everybody("snip", sparsity)
    weights, grads, _ = pooled(made)
    expected = lowest_gone({n: (weights[n] * grads[n]).abs() for n in ("0.weight", "2.weight")}, sparsity)
    final, records, states = result(made, reference())
    assert p.same_bits(masks_of(states[1].pruning).kept, expected)
    assert p.same_bits(masks_of(final.pruning).kept, expected) and masks_of(final.pruning).version == 1
    assert all(not final.params[n][~mask].any() and final.params[n][mask].all() for n, mask in expected.items())
    assert [r.sparsity for r in records] == [None, *3 * [pytest.approx(round(sparsity * 48) / 48)]]


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_grasp_is_that_of_all_examples_in_one_place(sparsity, smooth):
    made = everybody("grasp", sparsity, smooth=smooth)
    weights, _, products = pooled(made)
    scores = {n: weights[n] * products[n] for n in ("0.weight", "2.weight")}
    assert any(bool((s < 0).any()) and bool((s > 0).any()) for s in scores.values())
    _, _, states = result(made, reference())
    assert p.same_bits(masks_of(states[1].pruning).kept, lowest_gone(scores, sparsity))


@pytest.mark.parametrize("method", MADE)
def test_the_first_round_begins_with_pruned_weights(method):
    """Masks that the clients are told are not enough: the model that they are sent is the pruned one."""
    made = everybody(method)
    first, found = start(made), []

    def asked(cohorts):
        ask = Probing(made, cohorts.run_cohort, first, 1)
        found.append(pruned(made, first, 1, ask.gradient, ask.product))

    reference().drive(job(made), asked)
    kept = masks_of(found[0].pruning).kept
    assert set(kept) == {"0.weight", "2.weight"} and all(bool(first.params[n][~mask].any()) for n, mask in kept.items())
    for name, tensor in first.params.items():
        expected = tensor * kept[name] if name in kept else tensor
        assert torch.equal(found[0].params[name], expected)


@pytest.mark.parametrize("smooth", [True, False])
def test_hessian_times_a_direction_of_a_federation_is_that_of_all_examples_in_one_place(smooth):
    made = everybody("grasp", smooth=smooth)
    weights, grads, products = pooled(made)
    own, found = probing(made, lambda ask: (ask.gradient(weights), ask.product(weights, grads)))
    assert all(torch.allclose(own[n], g, rtol=1e-12, atol=1e-14) for n, g in grads.items())
    assert found.keys() == products.keys()
    assert float(p.l2_norm(p.sub(found, products)) / p.l2_norm(products)) < 1e-10


def test_probes_of_a_round_have_the_same_batches_and_draws():
    made = federation("dropout")
    weights = start(made).params
    first, again = probing(made, lambda ask: [ask.gradient(weights) for _ in range(2)])
    assert p.same_bits(first, again)
    step = p.scale(first, 1e-4)  # a product is of the function that gradients are of: the same units are dropped
    ahead, product = probing(made, lambda ask: (ask.gradient(p.add(weights, step)), ask.product(weights, step)))
    assert float(p.l2_norm(p.sub(p.sub(ahead, first), product)) / p.l2_norm(product)) < 0.02


@pytest.mark.parametrize(("method", "passes"), [("snip", 1), ("grasp", 2)])
def test_bytes_of_probes_count_dense_in_both_ways(method, passes):
    made = everybody(method)
    dense = replace(made, pruning=None)
    (_, one, two, _), (_, whole, *_) = (result(f, reference())[1] for f in (made, dense))
    _, _, (_, after, *_) = result(made, reference())
    assert one.bytes_up == passes * whole.bytes_up + two.bytes_up
    asked = replace(broadcast(dense, start(made), 1), probe=True)
    along = replace(asked, extra=directed(asked.params))
    probes = [len(wire.encode_broadcast(sent)) for sent in (asked, along)]
    down = [*probes[:passes], len(wire.encode_broadcast(broadcast(made, after, 1)))]
    assert one.bytes_down == CLIENTS * sum(down)
    silent = CLIENTS * len(wire.encode_broadcast(broadcast(made, after, 2), with_masks=False))
    assert two.bytes_down == silent  # no probe in later rounds, and the masks are known


def test_what_ranks_nothing_and_what_goes_too_far_is_refused():
    made = everybody("grasp")
    for t in made.work.model.parameters():
        t.data.zero_()
    for method, message in (("snip", "snip: .* 0 everywhere"), ("grasp", "grasp: .* 0 everywhere")):
        with pytest.raises(RunError, match=f"before the first round: .*{message}"):
            result(replace(made, pruning=MADE[method](sparsity=0.5)), reference())
    with pytest.raises(RunError, match=r"count must be in \[0, 46\]"):
        result(everybody("snip", 0.99), reference())


@pytest.mark.parametrize("method", MADE)
def test_resuming_gives_the_same_bits(method):
    made = everybody(method)
    engine = local(mode="sequential", workers=1)
    final, records, states = result(made, engine)
    again, later, _ = result(made, engine, states[1])
    assert p.same_bits(again.params, final.params) and later == records[2:]
