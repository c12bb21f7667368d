"""What the two parties agree on, and what each brings."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsim.pruning.pruning import Fresh, Pruning
from fedsim.records import Params
from fedsim.training.optimizers import Optimizer
from fedsim.training.schedules import Schedule, unchanged
from fedsim.transfer import objective as o
from fedsim.transfer.nets import Net
from fedsim.transfer.terms import Role


@dataclass(frozen=True)
class Agreed:
    """What both parties must have in their configs alike.

    overlap, labelled: how many common rows train, at most, and how many of them with their label; null: all.
    tolerance: training ends when the loss falls by no more; None: after all ``iterations``.
    """

    protocol: str
    loss: o.Form
    alignment: o.Alignment
    gamma: float
    l2: float
    hidden: int
    iterations: int
    overlap: int | None
    labelled: int | None
    tolerance: float | None
    key_bits: int
    triples: str

    def objective(self) -> o.Objective:
        """What is minimised."""
        return o.Objective(self.loss, self.alignment, self.gamma, self.l2)


@dataclass(frozen=True)
class Party:
    """What a party brings.

    ids: of its rows, one each. inputs: float64 (n, *shape). labels: (n,) of +1 and -1 at A, None at B.
    asks: rows of which B wants the labels; None at A.
    params: the first ones of ``net``. pruning, fresh: how the net is pruned between iterations, if it is.
    key: of all its draws.
    """

    role: Role
    ids: Sequence[str]
    inputs: Tensor
    labels: Tensor | None
    asks: Tensor | None
    net: Net
    params: Params
    optimizer: Optimizer
    key: int
    schedule: Schedule = unchanged
    pruning: Pruning | None = None
    fresh: Fresh | None = None
