"""Loss and accuracy against scikit-learn and slow loops."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.dropouts import Dropout
from fedsim.records import Examples
from fedsim.training import evaluate
from fedsim.training.evaluate import score

N = 1203  # more than two batches, the last one ragged


def classifier():
    with rng.torch_seeded(1):
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), Dropout(0.5), nn.Linear(8, 4)).double()


def examples(n=N):
    return Examples(rng.normal(2, n, 5, dtype=torch.float64) * 2, (rng.uniform(3, n) * 4).long())


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs)


def test_loss_and_accuracy_are_those_of_scikit_learn():
    model, data = classifier(), examples()
    logits = logits_of(model, data.inputs)
    loss, accuracy = score(model, *p.of(model), data).mean()
    assert loss == pytest.approx(log_loss(data.labels.numpy(), logits.softmax(1).numpy()), abs=1e-12)
    assert accuracy == accuracy_score(data.labels.numpy(), logits.argmax(1).numpy())
    assert 0 < accuracy < 1


def test_the_given_parameters_count_not_the_templates():
    model, data = classifier(), examples(50)
    params, buffers = p.of(model)
    expected = score(model, params, buffers, data).mean()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(3)
    before = {name: tensor.clone() for name, tensor in buffers.items()}
    model.train()  # whatever mode the template was left in
    assert score(model, params, buffers, data).mean() == expected
    assert p.same_bits(buffers, before)


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_the_batch_size_does_not_change_the_result(monkeypatch, size):
    model, data = classifier(), examples(60)
    expected = score(model, *p.of(model), data)
    monkeypatch.setattr(evaluate, "BATCH", size)
    scores = score(model, *p.of(model), data)
    assert torch.allclose(scores.loss, expected.loss, rtol=1e-12, atol=1e-14)
    assert torch.equal(scores.correct, expected.correct) and torch.equal(scores.labels, expected.labels)


class Tagger(nn.Module):
    """Logits (batch, time, classes) from tokens (batch, time)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 4, dtype=torch.float64)

    def forward(self, tokens):
        return self.table(tokens)


def test_padding_counts_neither_as_right_nor_as_wrong():
    with rng.torch_seeded(4):
        model = Tagger()
    tokens, labels = (rng.uniform(5, 40, 3) * 6).long(), (rng.uniform(6, 40, 3) * 4).long()
    labels[rng.bernoulli(7, 0.4, 40, 3)] = -100
    labels[0] = -100
    logits = logits_of(model, tokens)
    scores = score(model, *p.of(model), Examples(tokens, labels))
    for i in range(40):
        kept = [t for t in range(3) if labels[i, t] != -100]
        losses = [-float(logits[i, t].log_softmax(0)[labels[i, t]]) for t in kept]
        assert float(scores.loss[i]) == pytest.approx(sum(losses), abs=1e-12)
        assert int(scores.correct[i]) == sum(int(logits[i, t].argmax()) == int(labels[i, t]) for t in kept)
        assert int(scores.labels[i]) == len(kept)
    flat, mask = labels.flatten(), labels.flatten() != -100
    expected = log_loss(flat[mask].numpy(), logits.flatten(0, 1)[mask].softmax(1).numpy(), labels=range(4))
    assert scores.mean()[0] == pytest.approx(expected, abs=1e-12)
    nothing = score(model, *p.of(model), Examples(tokens[:1], labels[:1]))
    assert all(math.isnan(value) for value in nothing.mean())
