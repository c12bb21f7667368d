"""What a client minimises: the loss of a batch, and penalties on its parameters."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedsim.records import Params
from fedsim.training.losses import cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> scalar, a mean over the labels that count
Penalty = Callable[[Params, Params], Tensor]  # (local parameters, those the client started from) -> scalar


@dataclass(frozen=True)
class Objective:
    """``loss(logits, labels) + sum of penalties(local, anchor)``; all of it can be pickled, and mapped by vmap."""

    loss: Loss = cross_entropy
    penalties: tuple[Penalty, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is the cross-entropy alone, which some ways of training have by heart."""
        return self.loss is cross_entropy and not self.penalties

    def told(self) -> list[str]:
        """Names of its functions."""
        functions = [getattr(part, "func", part) for part in (self.loss, *self.penalties)]
        return [f"{function.__module__}.{function.__qualname__}" for function in functions]


PLAIN = Objective()


def penalised(objective: Objective, loss: Tensor, local: Params, anchor: Params) -> Tensor:
    """The loss with the penalties added; the loss itself where there are none."""
    for penalty in objective.penalties:
        loss = loss + penalty(local, anchor)
    return loss
