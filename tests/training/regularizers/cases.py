"""The table of the conformance suite: for every name of REGULARIZERS the models it is tried on, with which options.

A row says

- models: names of MODELS below, on which it has a place. All checks run on each. The first is the one that it is
  combined on with others, as far as they have a place there too.
- options: strong enough to be seen on a small model. Defaults are tried besides.
- off: options of strength 0, with which the model and the objective must stay as they are; None if there are none.
- draws: whether it draws random numbers in training.
- vectorised: whether ``torch.func.vmap`` takes the model, once the regulariser is in it.
- detached: why the gradient is not that of the value, by design; its own tests hold it to what it is then. "" if it is.
- apart: names that it cannot be combined with, since both want the same place; bind must refuse with both names.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.zoo import MODELS as ZOO
from fedsim.records import Examples

CLASSES = 3


class Model(NamedTuple):
    """A small model of the zoo: name, keys, shape of an example; tokens: inputs are token sequences."""

    name: str
    keys: dict[str, Any]
    shape: tuple[int, ...]
    tokens: bool = False

    def build(self, *, dtype: torch.dtype = torch.float64) -> nn.Module:
        with rng.torch_seeded(3):
            model = ZOO[self.name](input_shape=self.shape, num_classes=7 if self.tokens else CLASSES, **self.keys)
        return model.to(dtype)

    def batch(self, n: int, seed: int = 1, *, dtype: torch.dtype = torch.float64) -> Examples:
        if self.tokens:
            return Examples(*((rng.uniform(seed + i, n, *self.shape) * 7).long() for i in range(2)))
        labels: Tensor = (rng.uniform(seed + 1, n) * CLASSES).long()
        return Examples(rng.normal(seed, n, *self.shape, dtype=dtype), labels)


MODELS = {
    "mlp": Model("mlp", {"hidden": [9, 7]}, (2, 3)),
    "cnn": Model("cnn", {"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "group"}, (1, 8, 8)),
    "bn-cnn": Model("cnn", {"channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "batch"}, (1, 8, 8)),
    "resnet": Model("resnet", {"depth": 8}, (1, 8, 8)),
    "residual-mlp": Model("residual-mlp", {"depth": 3, "width": 9}, (2, 3)),
    "fractal": Model("fractal", {"channels": [4, 6]}, (1, 8, 8)),
    "lstm": Model("char-lstm", {"hidden": 6, "embedding": 4, "layers": 2}, (5,), tokens=True),
}


class Case(NamedTuple):
    """A row; see above."""

    models: tuple[str, ...]
    options: dict[str, Any]
    off: dict[str, Any] | None
    draws: bool = False
    vectorised: bool = True
    detached: str = ""
    apart: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "dropout": Case(("cnn", "mlp", "resnet"), {"p": 0.4}, {"p": 0.0}, draws=True),
    "spatial-dropout": Case(("cnn", "resnet"), {"p": 0.4}, {"p": 0.0}, draws=True),
    "dropconnect": Case(("cnn", "mlp"), {"p": 0.4}, {"p": 0.0}, draws=True),
    "targeted-dropout": Case(("cnn", "mlp", "resnet"), {"target": 0.6, "drop": 0.7}, {"target": 0.0}, draws=True),
    "variational-dropout": Case(("cnn", "mlp"), {"p": 0.3, "strength": 1.0}, {"p": 0.0}, draws=True),
    "maxout": Case(("cnn", "mlp"), {"pieces": 3}, None),
    "tied-dropout": Case(
        ("lstm",),
        {"p_input": 0.3, "p_hidden": 0.4, "p_embedding": 0.2},
        {"p_input": 0.0, "p_hidden": 0.0, "p_embedding": 0.0},
        draws=True,
    ),
    "zoneout": Case(("lstm",), {"cell": 0.5, "hidden": 0.2}, {"cell": 0.0, "hidden": 0.0}, draws=True),
    "multi-sample-dropout": Case(("cnn", "mlp", "resnet"), {"samples": 3, "p": 0.4}, {"p": 0.0}, draws=True),
    "collaborative": Case(
        ("cnn", "mlp", "resnet"),
        {"heads": 3},
        None,
        detached="heads learn from each other as constants, and the shared part gets the mean of their gradients",
        apart=("ensemblenet",),
    ),
    "ensemblenet": Case(("cnn", "mlp", "resnet"), {"heads": 3, "weight": 2.0}, None, apart=("collaborative",)),
    "stochastic-depth": Case(("resnet", "residual-mlp"), {"p": 0.6, "mode": "row"}, {"p": 0.0}, draws=True),
    "shakedrop": Case(
        ("resnet", "residual-mlp"),
        {"p": 0.8},
        {"p": 0.0},
        draws=True,
        detached="the branch is scaled by alpha, its gradient by beta",
    ),
    "droppath": Case(("fractal",), {"p": 0.4, "mode": "row"}, {"p": 0.0, "share_global": 0.0}, draws=True),
    "l1": Case(("cnn", "mlp"), {"strength": 0.1}, {"strength": 0.0}),
    "l2": Case(("cnn", "mlp"), {"strength": 0.1}, {"strength": 0.0}),
    "group-lasso": Case(("cnn", "mlp"), {"strength": 0.1}, {"strength": 0.0}),
    "orthogonal": Case(("cnn", "mlp"), {"strength": 0.1}, {"strength": 0.0}),
    "spectral": Case(
        ("cnn", "mlp"),
        {"strength": 0.1},
        {"strength": 0.0},
        detached="ten power iterations, vectors held fixed",
    ),
    "bn-slimming": Case(("bn-cnn",), {"strength": 0.1}, {"strength": 0.0}),
    "proximal": Case(("cnn", "mlp"), {"mu": 0.5}, {"mu": 0.0}),
    "label-smoothing": Case(("cnn", "mlp"), {"epsilon": 0.3}, {"epsilon": 0.0}),
    "dropblock": Case(("cnn", "bn-cnn", "resnet"), {"drop": 0.4, "gamma": "exact"}, {"drop": 0.0}, draws=True),
    "cutout": Case(("cnn", "resnet"), {"length": 4}, {"length": 0}, draws=True),
    "mixup": Case(("cnn", "mlp", "resnet"), {"alpha": 1.0}, {"alpha": 0.0}, draws=True),
}

TRIALS = [(name, model) for name, case in CASES.items() for model in case.models]
