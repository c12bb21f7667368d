import functools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import federation, result, tensors
from scipy.special import log_softmax
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.engines.reference import reference
from fedsim.training import regularizers as r
from fedsim.training.client import gradient
from fedsim.training.losses import cross_entropy, smoothed_cross_entropy
from fedsim.training.objective import PLAIN, Objective, Start
from fedsim.training.optimizers import sgd

MODEL = nn.Sequential(nn.Linear(3, 2))


def test_the_smoothed_loss_is_the_cross_entropy_against_a_smoothed_target():
    logits, labels = rng.normal(1, 5, 4, dtype=torch.float64), torch.tensor([3, 0, -100, 2, 1])
    kept = [0, 1, 3, 4]
    targets = 0.7 * np.eye(4)[labels[kept]] + 0.3 / 4
    expected = -(targets * log_softmax(logits.numpy()[kept], axis=1)).sum(1).mean()
    assert smoothed_cross_entropy(logits, labels, epsilon=0.3).item() == pytest.approx(expected, rel=1e-12)
    assert smoothed_cross_entropy(logits, labels, epsilon=0.0).item() == cross_entropy(logits, labels).item()


@pytest.mark.parametrize("name", ["l1", "l2", "group-lasso", "orthogonal", "spectral", "proximal", "label-smoothing"])
def test_strength_0_is_the_plain_model_bit_for_bit(name):
    key = {"proximal": "mu", "label-smoothing": "epsilon"}.get(name, "strength")
    assert r.REGULARIZERS[name](**{key: 0.0}).bind(MODEL, PLAIN) == PLAIN
    assert not r.REGULARIZERS[name]().bind(MODEL, PLAIN).plain


def test_slimming_finds_the_scales_of_batch_norm_that_are_trained():
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False), nn.GroupNorm(1, 2)]
    model = nn.Sequential(*layers, nn.BatchNorm1d(4))
    model[4].requires_grad_(False)
    (penalty,) = r.bn_slimming(strength=0.5).bind(model, PLAIN).penalties
    params = {"1.weight": torch.tensor([1.0, -3.0]), "4.weight": torch.ones(4), "3.weight": torch.ones(2)}
    assert penalty(params, Start({}, 1)).item() == 2.0
    assert r.bn_slimming(strength=0.0).bind(model, PLAIN) == PLAIN


def test_slimming_needs_batch_norm():
    with pytest.raises(ValueError, match=r"needs batch norm; cnn, .* have it with norm: batch"):
        r.bn_slimming().bind(MODEL, PLAIN)


def test_regularisers_add_up_in_any_order():
    one, other = r.l1(strength=0.1), r.label_smoothing(epsilon=0.1)
    a = other.bind(MODEL, one.bind(MODEL, PLAIN))
    b = one.bind(MODEL, other.bind(MODEL, PLAIN))
    assert len(a.penalties) == len(b.penalties) == 1 and a.told() == b.told()
    assert a.told() == ["fedsim.training.losses.smoothed_cross_entropy", "fedsim.training.penalties.l1"]


def test_l2_on_all_weights_is_weight_decay():
    """Without biases, ridge and the optimizer's weight decay are the same step."""
    made = federation("plain", torch.float64)
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    work = replace(made.work, model=model)
    ridge = replace(work, objective=r.l2(strength=0.05).bind(model, PLAIN))
    decay = replace(work, optimizer=sgd(lr=0.1, weight_decay=0.05))
    a, b = (tensors(result(replace(made, work=own), reference())[0]) for own in (ridge, decay))
    assert all(torch.allclose(t, b[name], rtol=1e-12, atol=1e-14) for name, t in a.items())


def test_proximal_is_fedprox():
    """The same as a local rule that adds mu (w - w_global) to each gradient."""
    made = federation("plain", torch.float64)

    def correct(mu, grads, local, broadcast, state):
        return {name: g + mu * (local[name] - broadcast.params[name]) for name, g in grads.items()}

    prox = replace(made.work, objective=r.proximal(mu=0.7).bind(made.work.model, PLAIN))
    rule = replace(made.work, rule=made.work.rule._replace(correct=partial(correct, 0.7)))
    a, b = (tensors(result(replace(made, work=own), reference())[0]) for own in (prox, rule))
    assert all(torch.allclose(t, b[name], rtol=1e-12, atol=1e-14) for name, t in a.items())
    plain = tensors(result(made, reference())[0])
    assert not all(torch.allclose(t, plain[name], rtol=1e-3) for name, t in a.items())


def test_a_step_goes_down_the_whole_objective():
    """By autograd on the formula, at parameters that are not those the client started from."""
    made = federation("plain", torch.float64)
    several = (r.label_smoothing(epsilon=0.3), r.proximal(mu=0.4), r.l2(strength=0.2))
    objective = functools.reduce(lambda found, one: one.bind(made.work.model, found), several, PLAIN)
    anchor = p.of(made.work.model)[0]
    local = {name: tensor + 0.1 * rng.normal(rng.fold(1, name), *tensor.shape) for name, tensor in anchor.items()}
    batch = made.data.client(0)
    grads, loss = gradient(replace(made.work, objective=objective), local, {}, batch, {}, start=Start(anchor, 8))
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in local.items()}
    smoothed = F.cross_entropy(
        functional_call(made.work.model, leaves, (batch.inputs,)), batch.labels, label_smoothing=0.3
    )
    whole = smoothed + 0.2 * sum((leaves[n] - anchor[n]).square().sum() for n in anchor)
    whole = whole + 0.1 * sum(leaves[n].square().sum() for n in anchor if n.endswith("weight"))
    expected = torch.autograd.grad(whole, list(leaves.values()))
    assert loss.item() == pytest.approx(smoothed.item(), rel=1e-12)
    assert all(torch.allclose(grads[n], g, rtol=1e-11) for n, g in zip(leaves, expected, strict=True))


def test_the_reported_loss_is_without_penalties():
    made = federation("plain", torch.float64)
    heavy = replace(made.work, optimizer=sgd(lr=1e-12), objective=r.l2(strength=50.0).bind(made.work.model, PLAIN))
    still = replace(made.work, optimizer=sgd(lr=1e-12))
    a, b = (result(replace(made, work=own), reference())[1] for own in (heavy, still))
    assert [one.train_loss for one in a[1:]] == pytest.approx([one.train_loss for one in b[1:]], rel=1e-9)


def test_an_objective_can_be_pickled():
    import pickle

    made = Objective(penalties=r.spectral().bind(MODEL, PLAIN).penalties)
    again = pickle.loads(pickle.dumps(made))
    params = p.of(MODEL)[0]
    assert again.penalties[0](params, Start(params, 1)) == made.penalties[0](params, Start(params, 1))
    assert pickle.loads(pickle.dumps(PLAIN)).plain
