"""What several heads and dropout samples are as regularisers; the losses and the forks have tests of their own."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import MODELS
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.forks import several_heads, showing
from fedsim.models.layers.attaching import attach_first
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.models.zoo import check_model
from fedsim.records import Examples
from fedsim.strategies.strategy import fedavg
from fedsim.training import regularizers as r
from fedsim.training.chain import chain_of
from fedsim.training.client import LocalWork, gradient, layer_inputs
from fedsim.training.evaluate import score
from fedsim.training.heads import disagreement
from fedsim.training.objective import PLAIN
from fedsim.training.optimizers import sgd

LIKE = {"rtol": 1e-11, "atol": 1e-13}


def work_of(model, *regularizers):
    built = MODELS[model].build() if isinstance(model, str) else model
    objective = r.bind(built, regularizers, key=5)
    built = built.double()
    return LocalWork(built, key_names(built), sgd(lr=0.1), fedavg().local, 1, None, objective=objective)


def gradient_of(work, batch, **keys):
    work.model.train()
    params, buffers = p.of(work.model)
    return gradient(work, params, buffers, batch, keys or layer_inputs(work, 7, 1))


def row_repeated(model, start, key, batch, samples):
    """Loss with the features in front of ``start`` repeated in rows, each row with the mask of its sample, at p 0.4."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in p.of(model)[0].items()}
    children = list(model._modules.items())
    at = [name for name, _ in children].index(start)

    def run(part, x):
        for name, child in part:
            own = {n.removeprefix(f"{name}."): t for n, t in leaves.items() if n.startswith(f"{name}.")}
            x = functional_call(child, own, (x,))
        return x

    h = run(children[:at], batch.inputs).repeat_interleave(samples, 0)
    kept = rng.uniform(key, *h.shape) >= 0.4
    logits = run(children[at:], h * kept / 0.6)
    loss = F.cross_entropy(logits, batch.labels.repeat_interleave(samples))
    return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True)), loss


@pytest.mark.parametrize(
    ("model", "tail", "start"), [("cnn", None, "head"), ("cnn", "fc1", "fc1"), ("resnet", None, "head")]
)
def test_dropout_samples_are_rows_repeated(model, tail, start):
    work, batch = work_of(model, r.multi_sample_dropout(samples=5, p=0.4, tail=tail)), MODELS[model].batch(6)
    name, key = f"{start}.samples.key", rng.as_tensor(77)
    grads, loss = gradient_of(work, batch, **{name: key})
    expected, total = row_repeated(MODELS[model].build(), start, key, batch, 5)
    assert work.key_names == (name,) and loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert grads.keys() == expected.keys() and all(torch.allclose(grads[n], g, **LIKE) for n, g in expected.items())


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet", "lstm"])
def test_one_sample_is_ordinary_dropout_bit_for_bit(model):
    work, other, batch = (
        work_of(model, r.multi_sample_dropout(samples=1, p=0.4)),
        work_of(model),
        MODELS[model].batch(6),
    )
    attach_first(other.model.head, "samples", Dropout(0.4))
    keys = {"head.samples.key": rng.as_tensor(77)}
    (one, loss), (two, same) = gradient_of(work, batch, **keys), gradient_of(other, batch, **keys)
    assert torch.equal(loss, same) and p.same_bits(one, two)


def test_a_sequence_model_has_samples_and_heads_too():
    batch = MODELS["lstm"].batch(4)
    several = [r.multi_sample_dropout(samples=3), r.collaborative(heads=2), r.label_smoothing(epsilon=0.1)]
    work = work_of("lstm", *several)
    check_model(work.model, (5,), 7, batch.inputs[0], name="char-lstm")
    grads, loss = gradient_of(work, batch)
    padded = Examples(torch.cat([batch.inputs, batch.inputs[:1]]), torch.cat([batch.labels, torch.full((1, 5), -100)]))
    same, total = gradient_of(work, padded)
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert all(torch.allclose(grads[n], g, **LIKE) for n, g in same.items()) and "head.forks.0.weight" in grads


@pytest.mark.parametrize("rescale", [True, False])
def test_heads_without_a_soft_part_are_models_of_their_own_on_the_mean_trunk(rescale):
    """By hand: beta 1 leaves the sum of cross-entropies; each head has the gradient of a plain model with it."""
    work, batch = work_of("mlp", r.collaborative(heads=3, beta=1.0, rescale=rescale)), MODELS["mlp"].batch(6)
    grads, loss = gradient_of(work, batch)
    params, alone = p.of(work.model)[0], []
    for i in range(3):
        plain, where = work_of("mlp"), f"forks.{i - 1}." if i else ""
        own = {name: params.get(where + name, params[name]) for name in p.of(plain.model)[0]}
        plain.model.train()
        alone.append((where, *gradient(plain, own, {}, batch, {})))
    assert loss.item() == pytest.approx(sum(one.item() for _, _, one in alone), rel=1e-12)
    for where, own, _ in alone:
        assert all(torch.allclose(grads[where + n], own[n], **LIKE) for n in ("fc2.weight", "head.bias"))
    total = sum(own["fc1.weight"] for _, own, _ in alone)
    assert torch.allclose(grads["fc1.weight"], total / 3 if rescale else total, **LIKE)


@pytest.mark.parametrize("pattern", ["simple", "hierarchical", "multiple-instance"])
@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet"])
def test_every_pattern_trains_all_it_has(pattern, model):
    work, batch = work_of(model, r.collaborative(heads=4, pattern=pattern)), MODELS[model].batch(6)
    check_model(work.model, MODELS[model].shape, 3, batch.inputs[0], name=model)
    grads, _ = gradient_of(work, batch)
    assert all(bool((g != 0).any()) for g in grads.values())
    names = [re.sub(r"(forks\.\d+\.)+", "", name) for name in grads]
    first = {"simple": 1, "hierarchical": 2 if model == "mlp" else 1, "multiple-instance": 4}[pattern]
    assert names.count("head.weight") == 4 and names.count(names[0]) == first


def test_evaluation_scores_the_first_head_the_mean_or_any_other():
    batch = MODELS["mlp"].batch(40)
    models = {
        name: work_of("mlp", make(heads=3)).model for name, make in (("c", r.collaborative), ("e", r.ensemblenet))
    }
    losses = {}
    for name, model in models.items():
        params, buffers = p.of(model)
        with showing(model, "all"):
            logits = model.eval()(batch.inputs)
        expected = {"c": logits[:, 0], "e": logits.mean(1)}[name]
        losses[name] = score(model, params, buffers, batch).mean()[0]
        assert losses[name] == pytest.approx(F.cross_entropy(expected, batch.labels).item(), rel=1e-12)
        with showing(model, 2):
            third = score(model, params, buffers, batch).mean()[0]
        assert third == pytest.approx(F.cross_entropy(logits[:, 2], batch.labels).item(), rel=1e-12)
        assert 0.0 < disagreement(logits).item() <= 1.0
    assert losses["c"] != losses["e"]


def test_the_loss_so_far_is_that_of_a_head():
    both = [r.ensemblenet(heads=2, weight=1.0), r.label_smoothing(epsilon=0.3)]
    batch = MODELS["mlp"].batch(6)
    work = work_of("mlp", *both)
    _, loss = gradient_of(work, batch)
    logits = work.model.train()(batch.inputs)
    expected = sum(F.cross_entropy(logits[:, i], batch.labels, label_smoothing=0.3) for i in range(2)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert "interpolated" in work.objective.told()[0]


def test_none_of_it_is_a_chain_that_can_be_fused():
    for one in (r.multi_sample_dropout(), r.collaborative(), r.ensemblenet()):
        assert (
            chain_of(work_of("mlp").model.float()) is not None and chain_of(work_of("mlp", one).model.float()) is None
        )


def test_no_dropout_is_the_plain_model():
    model = MODELS["mlp"].build()
    assert r.multi_sample_dropout(p=0.0).bind(model, PLAIN) == PLAIN and not key_names(model)


def test_new_heads_follow_the_key():
    states = []
    for key in (1, 1, 2):
        model = MODELS["mlp"].build()
        r.bind(model, [r.collaborative()], key=key)
        states.append(model.state_dict())
    assert p.same_bits(states[0], states[1]) and not p.same_bits(states[0], states[2])
    assert several_heads(model) and len(states[0]) == 6 + 3 * 4


@pytest.mark.parametrize(
    ("make", "options", "rule"),
    [
        (r.collaborative, {"heads": 3, "pattern": "hierarchical"}, "heads must be a power of 2 .* got 3"),
        (r.collaborative, {"heads": 4, "split": ["fc1", "head"]}, "split must name 1 for 4 heads .* simple, got 2"),
        (r.collaborative, {"pattern": "hierarchical", "split": ["fc1"]}, "split must name 2 for 4 heads"),
        (r.collaborative, {"pattern": "multiple-instance", "split": ["fc1"]}, "split must be null"),
        (r.ensemblenet, {"split": []}, "split must name 1"),
        (r.ensemblenet, {"weight": -0.1}, "weight must be >= 0 with form: normalised"),
        (r.ensemblenet, {"form": "codistillation", "weight": -0.1}, "weight must be >= 0 with form: codistillation"),
        (
            r.ensemblenet,
            {"form": "sum", "weight": -0.34, "cap": True},
            r"weight must be >= -1 / heads \(-0.333\).* maximised",
        ),
        (
            r.ensemblenet,
            {"form": "sum", "weight": -0.1},
            "unless cap is true, got -0.1; the loss would have no lower bound",
        ),
        (r.ensemblenet, {"cap": True}, "cap must be false with form: normalised"),
    ],
)
def test_options_that_cannot_be(make, options, rule):
    with pytest.raises(ValueError, match=rule):
        make(**options)


def test_options_at_their_limits_can():
    for weight in (-1 / 3, -0.1, 0.0):
        gradient_of(work_of("mlp", r.ensemblenet(form="sum", weight=weight, cap=True)), MODELS["mlp"].batch(4))
    r.ensemblenet(form="sum", weight=0.0)


@pytest.mark.parametrize(
    ("model", "tail", "rule"),
    [
        ("mlp", "fc9", "tail must name the last linear layer or one before it beside it, flatten, fc1, .*; got fc9"),
        ("bn-cnn", "norm2", r"got norm2 \(BatchNorm2d\)"),
        ("cnn", "conv2", r"works on another axis than the last, got conv2 \(Conv2d\)"),
        ("mlp", "flatten", r"got flatten \(Flatten\)"),
        ("lstm", "lstm", "tail must name .* head; got lstm"),
    ],
)
def test_tails_that_cannot_be(model, tail, rule):
    with pytest.raises(ValueError, match=rule):
        work_of(model, r.multi_sample_dropout(tail=tail))


def test_a_hidden_batch_norm_would_take_samples_for_channels():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"got 1 \(BatchNorm1d\)"):
        work_of(model, r.multi_sample_dropout(tail="0"))


def test_several_samples_twice_are_refused():
    with pytest.raises(ValueError, match="has them already"):
        work_of("mlp", r.multi_sample_dropout(), r.multi_sample_dropout(tail="fc1"))


def test_without_dropout_in_the_tail_samples_leave_the_loss():
    """The mean over equal samples, whatever their number: p is far below a draw."""
    batch = MODELS["mlp"].batch(6)
    plain, many = work_of("mlp"), work_of("mlp", r.multi_sample_dropout(samples=7, p=1e-9, tail="fc1"))
    (a, one), (b, other) = gradient_of(plain, batch), gradient_of(many, batch)
    assert one.item() == pytest.approx(other.item(), rel=1e-7)
    assert all(torch.allclose(a[n], b[n], rtol=1e-6, atol=1e-9) for n in a)
    assert replace(many, objective=PLAIN) == many
