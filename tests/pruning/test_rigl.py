"""RigL against a loop over single weights, alone and in a federation whose examples are in one place."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from federations import CLIENTS, federation, result, tensors
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import job
from fedsim.pruning import masks
from fedsim.pruning.criteria import erdos_renyi
from fedsim.pruning.pruning import Moment, masks_of, with_masks
from fedsim.pruning.rigl import rigl
from fedsim.records import Examples

SHAPES = {"conv": (6, 3, 2, 2), "fc": (9, 8), "bias": (9,), "head": (4, 9)}


def weights(key):
    return {n: rng.normal(rng.fold(key, n), *shape, dtype=torch.float64) for n, shape in SHAPES.items()}


def moment(round, rounds, params, memory, probe=None, *, key=3):
    def never(*at):
        raise AssertionError("asked for a gradient")

    nothing = Examples(torch.zeros(0), torch.zeros(0))
    model, asked = torch.nn.Identity(), probe or never
    return Moment(round, rounds, params, {}, memory, key, asked, never, never, model, (1,), lambda _: nothing)


def moved(params, grads, kept, share):
    """One move of one layer, in lists: new mask, and which entries are new in it."""
    w, g, mask = (t.flatten().tolist() for t in (params, grads, kept))
    count = min(round(share * sum(mask)), sum(mask) - 1)
    held = sorted((abs(w[i]), i) for i in range(len(w)) if mask[i])
    stay = {i for _, i in held[count:]}
    rest = sorted((-abs(g[i]), i) for i in range(len(w)) if i not in stay)
    now = stay | {i for _, i in rest[:count]}
    return torch.tensor([i in now for i in range(len(w))]).reshape(params.shape)


def pooled(made, at):
    """The gradient of the mean loss over everybody's examples."""
    params = {n: t.clone().requires_grad_() for n, t in at.items()}
    logits = functional_call(made.work.model, params, (made.data.train.inputs,))
    loss = torch.nn.functional.cross_entropy(logits, made.data.train.labels)
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


def share_after(done, end, share):
    return share * math.cos(math.pi * done / end / 2) ** 2  # half-angle form of half a cosine


@pytest.mark.parametrize(("init", "sparsity"), [("erdos-renyi", 0.8), ("erdos-renyi", 0.4), ("uniform", 0.9)])
def test_first_masks_have_the_densities_asked_for_and_are_random(init, sparsity):
    rule, params = rigl(sparsity=sparsity, init=init), weights(1)
    first, again, other = (rule.before(moment(1, 9, params, {}, key=key)) for key in (3, 3, 4))
    kept = masks_of(first.memory).kept
    sizes = {n: math.prod(s) for n, s in SHAPES.items() if n != "bias"}
    density = erdos_renyi({n: SHAPES[n] for n in sizes}, sparsity) if init != "uniform" else {}
    assert masks.counts(kept) == {
        n: size - round((1 - density.get(n, 1 - sparsity)) * size) for n, size in sizes.items()
    }
    assert abs(1 - masks.remaining(kept) - sparsity) < 1.5 / sum(sizes.values())
    assert p.same_bits(kept, masks_of(again.memory).kept) and not p.same_bits(kept, masks_of(other.memory).kept)
    assert p.same_bits(first.params, masks.applied(params, kept)) and masks_of(first.memory).version == 1


@pytest.mark.parametrize("done", [5, 10, 15])
def test_a_move_is_that_of_a_loop(done):
    rounds, rule, grads = 24, rigl(sparsity=0.6, every=5, share=0.5, until=0.75), weights(2)
    first = rule.before(moment(1, rounds, weights(1), {}))
    kept, asked = masks_of(first.memory).kept, []
    change = rule.before(moment(done + 1, rounds, first.params, first.memory, lambda at: asked.append(at) or grads))
    found = masks_of(change.memory)
    share = share_after(done, 18, 0.5)
    assert p.same_bits(found.kept, {n: moved(first.params[n], grads[n], m, share) for n, m in kept.items()})
    assert masks.counts(found.kept) == masks.counts(kept) and found.version == 2
    assert len(asked) == 1 and p.same_bits(asked[0], first.params)
    for name, mask in found.kept.items():
        assert (mask & ~kept[name]).any()
        assert not change.params[name][mask & ~kept[name]].any()  # what grows starts at 0
        assert torch.equal(change.params[name], torch.where(mask & kept[name], first.params[name], 0.0))
    assert torch.equal(change.params["bias"], first.params["bias"])


def test_nothing_is_asked_nor_moves_between_moves_after_the_last_and_without_a_share():
    rule, params = rigl(every=5, until=0.75), weights(1)
    memory = rule.before(moment(1, 24, params, {})).memory
    assert not any(rule.before(moment(r, 24, params, memory)) for r in range(2, 25) if r not in (6, 11, 16))
    assert not any(rigl(share=0.0, every=1).before(moment(r, 24, params, memory)) for r in range(2, 25))


def test_masks_that_do_not_change_are_no_new_version():
    params = weights(1)
    memory = with_masks({}, masks.ones(params, masks.prunable(params)))
    assert rigl(every=1).before(moment(2, 9, params, memory, lambda at: weights(2))) is None


def test_every_move_in_a_federation_is_that_of_all_examples_in_one_place():
    made = replace(federation("rigl", torch.float64), clients_per_round=CLIENTS)
    _, records, states = result(made, reference())
    for before, after in itertools.pairwise(states[1:]):
        grads = pooled(made, before.params)
        kept, share = masks_of(before.pruning).kept, share_after(before.round, made.rounds, 0.5)
        expected = {n: moved(before.params[n], grads[n], mask, share) for n, mask in kept.items()}
        assert p.same_bits(masks_of(after.pruning).kept, expected) and not p.same_bits(kept, expected)
        assert all(not after.params[n][~mask].any() for n, mask in expected.items())
    assert [masks_of(state.pruning).version for state in states[1:]] == [1, 2, 3]
    assert records[0].sparsity is None and {record.sparsity for record in records[1:]} == {0.5}
    assert len({tuple(record.remaining.items()) for record in records[1:]}) == 1
    assert records[2].bytes_up > 1.5 * records[1].bytes_up  # a dense gradient beside half of an update


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("mode", ["sequential", "vectorised", "fused"])
def test_resuming_between_moves_gives_the_same_bits(mode, after):
    made = federation("rigl")
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": 1 if mode == "sequential" else 4})
    final, records, states = result(made, engine)
    again, later, _ = result(made, engine, states[after])
    assert p.same_bits(tensors(again), tensors(final)) and later == records[after + 1 :]
