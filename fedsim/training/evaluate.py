"""Loss and accuracy of a model on held-out examples, example by example, so that one pass serves every client."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.records import IGNORED, ClientEvaluation, Examples, Indices, Params, Partition

Floats = npt.NDArray[np.float64]

BATCH = 500  # examples per forward pass; bounds memory, changes losses by no more than rounding


@dataclass(frozen=True)
class Scores:
    """Per example, float64 (n,): summed loss in nats, number of correct labels, number of labels that count."""

    loss: Tensor
    correct: Tensor
    labels: Tensor

    def mean(self) -> tuple[float, float]:
        """(loss, accuracy) per label over all examples. NaN if no label counts."""
        labels = self.labels.sum()
        return float(self.loss.sum() / labels), float(self.correct.sum() / labels)


@torch.no_grad()
def score(model: nn.Module, params: Params, buffers: Params, examples: Examples) -> Scores:
    """Evaluate ``params`` on every example, in eval mode.

    Args:
        model: template; its own parameters are not used.
        params, buffers: the model to evaluate. Not changed.
        examples: n of them.

    Returns:
        Scores over n examples.
    """
    model.eval()
    parts = []
    for start in range(0, len(examples), BATCH):
        inputs, labels = examples.inputs[start : start + BATCH], examples.labels[start : start + BATCH]
        logits = functional_call(model, {**params, **buffers}, (inputs,))
        losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
        counts = labels != IGNORED
        correct = (logits.argmax(-1) == labels) & counts
        parts.append([t.reshape(len(inputs), -1).double().sum(1) for t in (losses, correct, counts)])
    loss, correct, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(loss, correct, counts)


@dataclass(frozen=True)
class OwnerScores:
    """The global model on each client's own held-out examples; clients without any are left out. Arrays (clients,)."""

    client: Indices
    num_examples: Indices
    loss: Floats
    accuracy: Floats

    def lines(self, round: int) -> tuple[ClientEvaluation, ...]:
        """One line of clients.jsonl per client."""
        columns = (self.client, self.num_examples, self.loss, self.accuracy)
        return tuple(ClientEvaluation(round, *row) for row in zip(*(c.tolist() for c in columns), strict=True))


def by_owner(scores: Scores, partition: Partition) -> OwnerScores:
    """Sum scores over the examples of each client."""
    owners, held = torch.from_numpy(partition.owners()), torch.from_numpy(partition.indices)
    sums = torch.zeros(3, partition.num_clients, dtype=torch.float64)
    sums.index_add_(1, owners, torch.stack([scores.loss[held], scores.correct[held], scores.labels[held]]))
    loss, correct, labels = sums.numpy()
    some = np.flatnonzero(labels > 0)
    return OwnerScores(some, partition.sizes()[some], loss[some] / labels[some], correct[some] / labels[some])
