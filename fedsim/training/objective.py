"""What a client minimises: the loss of a batch, and penalties on its parameters and on what its layers make."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from fedsim.records import Params
from fedsim.training.losses import cross_entropy


class Start(NamedTuple):
    """What a client starts a round with: the global parameters, and how many examples it has, >= 1.

    Parameters that stay with the client are not among them.
    """

    params: Params
    num_examples: Tensor | int


Loss = Callable[[Tensor, Tensor], Tensor]  # (logits, labels) -> scalar, a mean over the labels that count
Penalty = Callable[[Params, Start], Tensor]  # (local parameters, what the client started with) -> scalar
MapPenalty = Callable[[Tensor, Tensor], Tensor]  # (what a layer returned, labels) -> scalar
Mixing = Callable[[Tensor, Tensor, Tensor], "Mixed"]  # (inputs, labels, key) -> inputs, partners' labels, share


class Mixed(NamedTuple):
    """Inputs that are ``share`` parts of their own example, and a partner's for the rest.

    partners: labels of the partners. share: scalar tensor () in [0, 1].
    """

    inputs: Tensor
    partners: Tensor
    share: Tensor


@dataclass(frozen=True)
class Objective:
    """``loss(logits, labels) + sum of penalties``; all of it can be pickled, and mapped by vmap.

    loss: of a batch. Whatever a model with several heads returns in training, (batch, heads, classes), comes here.
    penalties: on parameters.
    maps: path of a layer -> penalties on what it returns, in training.
    mixing: what is done to a batch first, with the name of the key it draws from, as in ``key_names``; the loss is
        then ``share * loss(labels) + (1 - share) * loss(partners)``.
    """

    loss: Loss = cross_entropy
    penalties: tuple[Penalty, ...] = ()
    maps: tuple[tuple[str, MapPenalty], ...] = ()
    mixing: tuple[str, Mixing] | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the cross-entropy alone, which some ways of training have by heart."""
        return self == PLAIN

    def told(self) -> list[str]:
        """Names of its functions."""
        used = (self.loss, *self.penalties, *(penalty for _, penalty in self.maps), *(self.mixing or ())[1:])
        functions = [getattr(part, "func", part) for part in used]
        return [f"{function.__module__}.{function.__qualname__}" for function in functions]


PLAIN = Objective()


def penalised(objective: Objective, loss: Tensor, local: Params, start: Start) -> Tensor:
    """The loss with the penalties on parameters added; the loss itself where there are none."""
    for penalty in objective.penalties:
        loss = loss + penalty(local, start)
    return loss


@contextlib.contextmanager
def watched(model: nn.Module, objective: Objective) -> Iterator[Mapping[str, Tensor]]:
    """What the layers with a penalty return while the model runs, by path."""
    returned: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: returned.__setitem__(path, output)

    paths = {path for path, _ in objective.maps}
    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield returned
    finally:
        for handle in handles:
            handle.remove()
