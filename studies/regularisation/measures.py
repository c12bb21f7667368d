"""What a finished run comes to: numbers of its final global model, all in evaluation mode."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedsim
from fedsim import params as p
from fedsim import rng
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.models import forks
from fedsim.models.fractal import Fractal, single_column
from fedsim.records import Examples
from fedsim.training.evaluate import score
from fedsim.training.heads import disagreement

PATCH = 5  # of 14 x 14 pixels
PRUNED = 0.5


def measure(folder: Path, here: Path) -> dict[str, Any]:
    """Losses and accuracies on training and test examples, and on test examples that were tampered with.

    Args:
        folder: of the run.
        here: where the modules are that its config names.
    """
    run = fedsim.load(folder)
    with importable(here):
        data = build.federated_data(config_files.check(run.config))
        model = run.model()
    found = {
        **_scores("train", model, data.train),
        **_scores("test", model, data.test),
        "train_losses": [one.train_loss for one in run.rounds],
    }
    if data.test.inputs.dim() == 4:
        found |= _scores("occluded", model, occluded(data.test))
        with pruned(model):
            found |= _scores("pruned", model, data.test)
    if fractals_of(model):
        alone = single_column(model, fractals_of(model)[0].columns)
        found |= _scores("deepest", alone, data.test)
    return found | heads(model, data.test)


def fractals_of(model: nn.Module) -> list[Fractal]:
    """The fractal networks in a model."""
    return [module for module in model.modules() if isinstance(module, Fractal)]


def _scores(name: str, model: nn.Module, examples: Examples) -> dict[str, float]:
    loss, accuracy = score(model, *p.of(model), examples).mean()
    return {f"{name}_loss": loss, f"{name}_accuracy": accuracy}


def occluded(examples: Examples) -> Examples:
    """A square of zeros in every picture, wholly inside, its place drawn anew for each."""
    n, _, height, width = examples.inputs.shape
    size = PATCH * height // 14
    top, left = ((rng.uniform(side, n) * (length - size + 1)).long() for side, length in ((1, height), (2, width)))
    rows, columns = torch.arange(height), torch.arange(width)
    inside = _between(rows, top, size)[:, :, None] & _between(columns, left, size)[:, None, :]
    return Examples(examples.inputs.masked_fill(inside[:, None], 0.0), examples.labels)


def _between(places: Tensor, start: Tensor, size: int) -> Tensor:
    return (places >= start[:, None]) & (places < start[:, None] + size)


@contextlib.contextmanager
def pruned(model: nn.Module) -> Iterator[None]:
    """Half of each hidden or convolutional weight is zero, those of least magnitude, while this lasts."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][:-1]
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer in layers:
            sizes = layer.weight.abs()
            layer.weight.mul_(sizes > sizes.flatten().kthvalue(int(PRUNED * sizes.numel())).values)
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)


def heads(model: nn.Module, examples: Examples) -> dict[str, Any]:
    """Accuracy of each head and how often two of them disagree; {} for a model with one."""
    if not forks.several_heads(model):
        return {}
    with forks.showing(model, "all"), torch.no_grad():
        logits = model(examples.inputs)  # (examples, heads, classes)
    each = (logits.argmax(-1) == examples.labels[:, None]).double().mean(0).tolist()
    return {"head_accuracies": each, "disagreement": float(disagreement(logits))}
