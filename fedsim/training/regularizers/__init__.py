"""The table of regularisers: what ``model.regularizers`` can name. One file per place where they work.

A regulariser is bound to the model before training starts. It puts layers into the model, which draw from the step's
key, or changes the objective, or both.
"""

import contextlib
from collections.abc import Callable, Sequence

from torch import nn

from fedsim import rng
from fedsim.training.objective import PLAIN, Objective
from fedsim.training.regularizers.activations import dropout, spatial_dropout
from fedsim.training.regularizers.dropblock import dropblock
from fedsim.training.regularizers.heads import collaborative, ensemblenet, multi_sample_dropout
from fedsim.training.regularizers.parameters import (
    bn_slimming,
    group_lasso,
    l1,
    l2,
    orthogonal,
    proximal,
    spectral,
)
from fedsim.training.regularizers.paths import droppath, shakedrop, stochastic_depth
from fedsim.training.regularizers.recurrent import tied_dropout, zoneout
from fedsim.training.regularizers.regularizer import STAGES, Regularizer
from fedsim.training.regularizers.targets import cutout, label_smoothing, mixup
from fedsim.training.regularizers.units import maxout
from fedsim.training.regularizers.weights import dropconnect, targeted_dropout, variational_dropout

__all__ = ["REGULARIZERS", "Regularizer", "bind"]

Blamed = Callable[[int], contextlib.AbstractContextManager[None]]

REGULARIZERS: dict[str, Callable[..., Regularizer]] = {
    "dropout": dropout,
    "spatial-dropout": spatial_dropout,
    "dropconnect": dropconnect,
    "targeted-dropout": targeted_dropout,
    "variational-dropout": variational_dropout,
    "maxout": maxout,
    "tied-dropout": tied_dropout,
    "zoneout": zoneout,
    "stochastic-depth": stochastic_depth,
    "shakedrop": shakedrop,
    "droppath": droppath,
    "multi-sample-dropout": multi_sample_dropout,
    "collaborative": collaborative,
    "ensemblenet": ensemblenet,
    "l1": l1,
    "l2": l2,
    "group-lasso": group_lasso,
    "orthogonal": orthogonal,
    "spectral": spectral,
    "bn-slimming": bn_slimming,
    "proximal": proximal,
    "label-smoothing": label_smoothing,
    "dropblock": dropblock,
    "cutout": cutout,
    "mixup": mixup,
}


def _in_order(regularizers: Sequence[Regularizer]) -> list[int]:
    """Their positions, in the order in which they are bound."""
    return sorted(range(len(regularizers)), key=lambda i: STAGES.index(regularizers[i].stage))


def unblamed(number: int) -> contextlib.AbstractContextManager[None]:
    """Let what binding raises pass."""
    return contextlib.nullcontext()


def bind(
    model: nn.Module, regularizers: Sequence[Regularizer], key: int = 0, *, blamed: Blamed = unblamed
) -> Objective:
    """Change ``model`` in place as the regularisers say, and tell what is to be minimised then.

    Args:
        model: not yet trained.
        regularizers: in any order; see ``Regularizer.stage``.
        key: from which new parameters are drawn, the i-th regulariser's from ``fold(key, i)``.
        blamed: within ``blamed(i)`` the i-th is bound; what it raises can be given a name there.

    Raises:
        ValueError: the model has no place for one of them.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> bind(model, [dropout(p=0.2), proximal(mu=0.1)]).told()
    ['fedsim.training.losses.cross_entropy', 'fedsim.training.penalties.proximal']
    >>> model[1]
    ReLU(
      (dropout): Dropout(p=0.2)
    )
    """
    objective = PLAIN
    for i in _in_order(regularizers):
        with blamed(i), rng.torch_seeded(rng.fold(key, i)):
            objective = regularizers[i].bind(model, objective)
    return objective
