"""Loss and accuracy of a model on held-out examples, example by example, so that one pass serves every client."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedsim.records import IGNORED, Examples, Indices, Params

BATCH = 500  # examples per forward pass; bounds memory, does not change the result


@dataclass(frozen=True)
class Scores:
    """Per example, float64 (n,): summed loss in nats, number of correct labels, number of labels that count."""

    loss: Tensor
    correct: Tensor
    labels: Tensor

    def mean(self, indices: Indices | None = None) -> tuple[float, float]:
        """(loss, accuracy) per label over all examples, or over those at ``indices``. NaN if no label counts."""
        chosen = slice(None) if indices is None else torch.from_numpy(indices)
        loss, correct, labels = self.loss[chosen].sum(), self.correct[chosen].sum(), self.labels[chosen].sum()
        return float(loss / labels), float(correct / labels)


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
