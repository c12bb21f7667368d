"""What a regulariser is: a change of the model and of the objective, made once, before training starts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import nn

from fedsim.training.objective import Objective, Penalty

Positive = Annotated[float, Gt(0)]
Strength = Annotated[float, Ge(0)]
Rate = Annotated[float, Ge(0), Lt(1)]  # probability of being dropped
Count = Annotated[int, Gt(0)]

AffineWhere = Literal["hidden", "convolutions", "all"]
Stage = Literal["units", "weights", "layers", "samples", "heads", "inputs", "penalties"]
STAGES: tuple[Stage, ...] = ("units", "weights", "layers", "samples", "heads", "inputs", "penalties")

_HIDDEN = "hidden linear layers{}; mlp, 2nn, lenet-300-100, cnn, conv-2, conv-4 and conv-6 have them"
_CONVOLUTIONS = "convolutions{}; cnn, conv-2, conv-4, conv-6 and resnet have them"
_ALL = "hidden linear layers or convolutions{}; every model but linear and char-lstm has them"
_NEEDED = {"hidden": _HIDDEN, "convolutions": _CONVOLUTIONS, "all": _ALL}

Bind = Callable[[nn.Module, Objective], Objective]


@dataclass(frozen=True)
class Regularizer:
    """What ``model.regularizers`` holds.

    stage: when it is bound; the order in the config decides only within a stage. Units are changed before the weights
        in them, layers put behind them, the loss sampled, the whole copied into heads, inputs changed, and penalties
        find the parameters that came of it.
    bind: (model, objective so far) -> objective. It may change the model in place, but no name of a parameter that is
        there. New parameters are drawn from torch's generator, which is seeded then. It raises ``ValueError`` if the
        model has no place for it.
    """

    stage: Stage
    bind: Bind


def unbound(model: nn.Module, objective: Objective) -> Objective:
    """``bind`` of a regulariser of strength 0: the plain model is trained, bit for bit."""
    return objective


def penalise(objective: Objective, penalty: Penalty) -> Objective:
    """With one penalty on parameters more."""
    return replace(objective, penalties=(*objective.penalties, penalty))


def needed(where: AffineWhere, condition: str = "") -> ValueError:
    """What to say to a model without a place."""
    return ValueError("needs " + _NEEDED[where].format(condition))
