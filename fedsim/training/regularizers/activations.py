"""Regularisers that put a layer behind the units of a model."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

from fedsim.models import places
from fedsim.models.layers.attaching import attach
from fedsim.models.layers.dropouts import Dropout, Dropout2d
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Rate, Regularizer, needed, unbound

Where = Literal["auto", "hidden", "convolutions", "all"]


def dropout(*, p: Rate = 0.5, where: Where = "auto") -> Regularizer:
    """Dropout: ``y = x * kept / (1 - p)`` behind hidden units.

    Args:
        p: probability of a zero, in [0, 1).
        where: behind ``hidden`` linear layers, behind ``convolutions``, or ``all``; ``auto`` is ``hidden`` if there are
            any, else before the last layer.

    Source: Srivastava et al. 2014, "Dropout", JMLR 15, section 4. Differs: scaled in training rather than in testing.
    """
    return _behind("dropout", partial(Dropout, p), p, where)


def spatial_dropout(*, p: Rate = 0.1) -> Regularizer:
    """Spatial dropout: whole feature maps are dropped behind convolutions, the others scaled by ``1 / (1 - p)``.

    Args:
        p: probability of a dropped map, in [0, 1).

    Source: Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks", CVPR, section 3.2.
        Differs: scaled in training rather than in testing.
    """
    return _behind("spatial_dropout", partial(Dropout2d, p), p, "convolutions")


def _behind(name: str, make: Callable[[], nn.Module], p: float, where: Where) -> Regularizer:
    return Regularizer("layers", partial(_bind_behind, name, make, where) if p else unbound)


def _bind_behind(
    name: str, make: Callable[[], nn.Module], where: Where, model: nn.Module, objective: Objective
) -> Objective:
    for path in _ends(model, where):
        attach(model.get_submodule(path), name, make())
    return objective


def _ends(model: nn.Module, where: Where) -> list[str]:
    """Paths of the modules behind which a layer is put."""
    found: list[str] = []
    if where in ("convolutions", "all"):
        found += [unit.end for unit in places.convolutions(model)]
    if where in ("auto", "hidden", "all"):
        found += [unit.end for unit in places.hidden(model)]
    if where == "auto" and not found:
        found = places.before_head(model)
    if not found:
        raise needed("convolutions" if where == "convolutions" else "hidden")
    return found
