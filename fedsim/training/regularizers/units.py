"""Regularisers that change what a unit computes."""

from functools import partial
from typing import Annotated

from annotated_types import Ge
from torch import nn

from fedsim.models.layers.attaching import attach
from fedsim.models.layers.maxout import Maxout, widen
from fedsim.models.places import Unit
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import AffineWhere, Regularizer, needed
from fedsim.training.regularizers.weights import affine_layer, affine_units


def maxout(*, pieces: Annotated[int, Ge(2)] = 2, where: AffineWhere = "hidden") -> Regularizer:
    """Maxout: ``h_i = max_j (w_ij x + b_ij)`` takes the place of a layer and the ReLU behind it.

    The layer has ``pieces`` times as many parameters, and the max comes right behind it, before a norm. Trained with
    dropout in the paper: put ``dropout`` beside it.

    Args:
        pieces: affine maps of each unit, >= 2.
        where: ``hidden`` linear layers, ``convolutions``, or ``all``; only such as have an ``nn.ReLU`` behind them. In
            a resnet that is the first convolution: its blocks call relu as a function.

    Raises:
        ValueError: when bound, if there is no such layer.

    Source: Goodfellow et al. 2013, "Maxout Networks", ICML, section 2. Differs: first weights by torch; no bound on
        their norm.
    """
    return Regularizer("units", partial(_bind, pieces, where))


def _bind(pieces: int, where: AffineWhere, model: nn.Module, objective: Objective) -> Objective:
    behind = " followed by nn.ReLU"
    units = [unit for unit in affine_units(model, where, behind) if _ends_in_relu(model, unit)]
    if not units:
        raise needed(where, behind)
    for unit in units:
        layer = affine_layer(model, unit)
        attach(layer, "maxout", Maxout(pieces, axis=-1 if isinstance(layer, nn.Linear) else -3))
        widen(layer, pieces)
        above, _, name = str(unit.activation).rpartition(".")
        model.get_submodule(above)._modules[name] = nn.Identity()
    return objective


def _ends_in_relu(model: nn.Module, unit: Unit) -> bool:
    return unit.activation is not None and type(model.get_submodule(unit.activation)) is nn.ReLU
