import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch.func import vmap

from fedsim import rng
from fedsim.training import heads
from fedsim.training.losses import cross_entropy, smoothed_cross_entropy

CLASSES, HEADS = 4, 3
LABELS = torch.tensor([3, 0, -100, 2, 1, -100])
SHAPES = [(6, HEADS, CLASSES), (6, HEADS, 2, CLASSES), (2, 3, HEADS, CLASSES)]


def drawn(shape=SHAPES[0], seed=1):
    """Logits of mixed signs, some far apart; and labels of which two count nothing."""
    logits = 2 * rng.normal(seed, *shape, dtype=torch.float64)
    return logits, LABELS if shape[0] == 6 else LABELS.view(2, 3)


def rows(logits, labels):
    """(logits (heads, samples, classes), label) of the rows that count, in numpy."""
    flat = logits.reshape(labels.numel(), HEADS, -1, CLASSES).detach().numpy()
    return [(z, y) for z, y in zip(flat, labels.flatten().tolist(), strict=True) if y != -100]


def slow_collaborative(logits, labels, beta, temperature):
    total = 0.0
    counting = rows(logits, labels)
    for z, y in counting:
        for h, m in np.ndindex(*z.shape[:2]):
            q = softmax(np.mean([z[j, m] for j in range(HEADS) if j != h], axis=0) / temperature)
            hard, soft = -log_softmax(z[h, m])[y], -(q * log_softmax(z[h, m] / temperature)).sum()
            total += (beta * hard + (1 - beta) * soft) / z.shape[1]
    return total / len(counting)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum()


def slow_ensemble(logits, labels):
    """Means over rows and samples: CE of the mean logits, CE of each head (heads,), and KL(mean || head) (heads,)."""
    found = []
    for z, y in rows(logits, labels):
        for m in range(z.shape[1]):
            mean = z[:, m].mean(0)
            apart = [kl(softmax(mean), softmax(one)) for one in z[:, m]]
            found.append((-log_softmax(mean)[y], [-log_softmax(one)[y] for one in z[:, m]], apart))
    return tuple(np.mean([row[i] for row in found], axis=0) for i in range(3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 2.0), (0.3, 0.7), (1.0, 5.0), (0.0, 1.0)])
def test_collaborative_against_a_loop(shape, beta, temperature):
    logits, labels = drawn(shape)
    loss = heads.collaborative(logits, labels, base=cross_entropy, beta=beta, temperature=temperature)
    assert loss.item() == pytest.approx(slow_collaborative(logits, labels, beta, temperature), rel=1e-12)


def test_the_gradient_of_collaborative_in_closed_form():
    """``(beta (softmax(z) - y) + (1 - beta) / T (softmax(z / T) - q)) / n``: nothing through q, and no T^2."""
    logits, labels = drawn()
    logits.requires_grad_()
    heads.collaborative(logits, labels, base=cross_entropy, beta=0.3, temperature=3.0).backward()
    z, expected = logits.detach().numpy(), np.zeros(SHAPES[0])
    for n, y in enumerate(LABELS.tolist()):
        for h in range(HEADS if y != -100 else 0):
            q = softmax(np.mean([z[n, j] for j in range(HEADS) if j != h], axis=0) / 3.0)
            hard, soft = softmax(z[n, h]) - np.eye(CLASSES)[y], (softmax(z[n, h] / 3.0) - q) / 3.0
            expected[n, h] = (0.3 * hard + 0.7 * soft) / 4
    assert np.allclose(logits.grad.numpy(), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mu", [0.0, 0.4, 1.0, 2.5])
def test_the_normalised_form_is_the_ensemble_and_a_divergence(shape, mu):
    logits, labels = drawn(shape)
    ensemble, each, apart = slow_ensemble(logits, labels)
    assert each.mean() - ensemble == pytest.approx(apart.mean(), rel=1e-12)  # the identity itself
    loss = heads.interpolated(logits, labels, base=cross_entropy, weight=mu)
    assert loss.item() == pytest.approx(ensemble + mu * apart.mean(), rel=1e-11)


def test_and_so_are_their_gradients():
    logits, _ = drawn()
    labels = torch.tensor([3, 0, 1, 2, 1, 0])
    z = logits.requires_grad_()
    (one,) = torch.autograd.grad(heads.interpolated(z, labels, base=cross_entropy, weight=1.7), z)
    mean = F.log_softmax(z.mean(1, keepdim=True), -1).expand_as(z)
    apart = F.kl_div(F.log_softmax(z, -1), mean, log_target=True, reduction="sum") / (len(labels) * HEADS)
    (other,) = torch.autograd.grad(F.cross_entropy(z.mean(1), labels) + 1.7 * apart, z)
    assert torch.allclose(one, other, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("weight", [-0.2, 0.0, 0.5, 2.0])
def test_the_sum_form(weight):
    logits, labels = drawn(SHAPES[1])
    logits[:, 1] += 6 * F.one_hot(labels.clamp(min=0), CLASSES)[:, None]  # one head is better than a guess
    ensemble, each, _ = slow_ensemble(logits, labels)
    loss = heads.summed(logits, labels, base=cross_entropy, weight=weight)
    assert loss.item() == pytest.approx(ensemble + weight * each.sum(), rel=1e-12)
    mu = weight * HEADS / (1 + weight * HEADS)
    same = (1 + weight * HEADS) * heads.interpolated(logits, labels, base=cross_entropy, weight=mu)
    assert loss.item() == pytest.approx(same.item(), rel=1e-11)
    capped = heads.summed(logits, labels, base=cross_entropy, weight=weight, cap=True)
    assert (each > math.log(CLASSES)).any() and (each < math.log(CLASSES)).any()  # some are cut, some are not
    assert capped.item() == pytest.approx(ensemble + weight * np.minimum(each, math.log(CLASSES)).sum(), rel=1e-12)


def test_a_negative_weight_has_no_lower_bound_but_for_a_cap():
    """One head wrong by s, another right by t > s, so that their mean stays right."""
    y = F.one_hot(torch.tensor([1]), CLASSES).double()
    for s in (10.0, 100.0, 1000.0):
        logits = torch.stack([4 * s * y, -s * y], 1)
        free, capped = (
            heads.summed(logits, torch.tensor([1]), base=cross_entropy, weight=-0.4, cap=c) for c in (False, True)
        )
        assert free.item() < -0.39 * s and capped.item() >= -0.4 * 2 * math.log(CLASSES)


@pytest.mark.parametrize("shape", SHAPES)
def test_codistillation_against_a_loop(shape):
    logits, labels = drawn(shape)
    expected = []
    for z, y in rows(logits, labels):
        for h, m in np.ndindex(*z.shape[:2]):
            q = softmax(np.mean([z[j, m] for j in range(HEADS) if j != h], axis=0))
            expected.append(-log_softmax(z[h, m])[y] + 0.8 * kl(q, softmax(z[h, m])))
    loss = heads.codistillation(logits, labels, base=cross_entropy, weight=0.8)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)


def test_the_gradient_of_codistillation_goes_through_no_teacher():
    logits, labels = drawn()
    logits.requires_grad_()
    heads.codistillation(logits, labels, base=cross_entropy, weight=0.8).backward()
    z, expected = logits.detach().numpy(), np.zeros(SHAPES[0])
    for n, y in enumerate(LABELS.tolist()):
        for h in range(HEADS if y != -100 else 0):
            q = softmax(np.mean([z[n, j] for j in range(HEADS) if j != h], axis=0))
            expected[n, h] = (softmax(z[n, h]) - np.eye(CLASSES)[y] + 0.8 * (softmax(z[n, h]) - q)) / (4 * HEADS)
    assert np.allclose(logits.grad.numpy(), expected, rtol=1e-11, atol=1e-14)


LOSSES = [
    partial(heads.collaborative, beta=0.4, temperature=2.0),
    partial(heads.interpolated, weight=1.5),
    partial(heads.summed, weight=-0.2, cap=True),
    partial(heads.codistillation, weight=0.7),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("base", [cross_entropy, partial(smoothed_cross_entropy, epsilon=0.2)])
def test_rows_that_count_nothing_have_no_say(loss, shape, base):
    logits, labels = drawn(shape)
    counts, other = labels != -100, logits.clone()
    other[~counts] = 50 * rng.normal(9, *other[~counts].shape, dtype=torch.float64)
    assert loss(other, labels, base=base).item() == loss(logits, labels, base=base).item()
    kept = loss(logits[counts], labels[counts], base=base)  # (rows, heads, ...), whatever axes labels had
    assert kept.item() == pytest.approx(loss(logits, labels, base=base).item(), rel=1e-12)
    leaf = logits.clone().requires_grad_()
    loss(leaf, labels, base=base).backward()
    assert (leaf.grad[~counts] == 0).all() and (leaf.grad[counts] != 0).any()
    assert math.isnan(loss(logits, torch.full_like(labels, -100), base=base).item())


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_heads_have_the_loss_of_one(loss):
    """Up to the entropy of the soft targets, which collaborative learning counts."""
    one, labels = 2 * rng.normal(1, 6, CLASSES, dtype=torch.float64), LABELS
    same = loss(one[:, None].expand(6, HEADS, CLASSES), labels, base=cross_entropy).item()
    plain = cross_entropy(one, labels).item()
    match loss.func.__name__:
        case "collaborative":
            soft = one[labels != -100].div(2.0).softmax(-1)
            entropy = -(soft * soft.log()).sum(-1).mean().item()
            assert same == pytest.approx(HEADS * (0.4 * plain + 0.6 * entropy), rel=1e-12)
        case "summed":
            assert same == pytest.approx(plain - 0.2 * HEADS * min(plain, math.log(CLASSES)), rel=1e-12)
        case _:
            assert same == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_under_vmap_it_is_the_loop(loss):
    logits = rng.normal(4, 5, *SHAPES[1], dtype=torch.float64)
    labels = torch.stack([LABELS.roll(i) for i in range(5)])
    mapped = vmap(partial(loss, base=cross_entropy))(logits, labels)
    looped = torch.stack([loss(logits[i], labels[i], base=cross_entropy) for i in range(5)])
    assert torch.allclose(mapped, looped, rtol=1e-12)


def test_the_mean_loss_over_samples_is_at_least_that_of_their_mean():
    """Jensen; averaging logits is another regulariser. And it is the loss of rows repeated."""
    logits, labels = rng.normal(1, 6, 5, CLASSES, dtype=torch.float64), LABELS
    over = cross_entropy(logits, labels)
    assert over.item() > cross_entropy(logits.mean(1), labels).item() + 0.05
    repeated = F.cross_entropy(logits.reshape(30, CLASSES), labels.repeat_interleave(5), ignore_index=-100)
    assert torch.equal(over, repeated)


def test_disagreement_counts_pairs():
    logits = rng.normal(7, 11, 5, CLASSES)
    guesses = logits.argmax(-1).tolist()
    pairs = [a != b for row in guesses for a, b in itertools.combinations(row, 2)]
    assert heads.disagreement(logits).item() == pytest.approx(np.mean(pairs), rel=1e-12)
    assert heads.disagreement(logits[:, :1].expand(11, 4, CLASSES)).item() == 0.0
    assert heads.disagreement(logits.view(1, 11, 5, CLASSES)).item() == heads.disagreement(logits).item()
