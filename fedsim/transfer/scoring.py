"""How well the two nets predict, for whoever may see both: a simulation, not a party."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from fedsim.data.sides import Table
from fedsim.records import Params
from fedsim.transfer.agreement import Party
from fedsim.transfer.nets import rows
from fedsim.transfer.objective import predictor


class Scorer:
    """Accuracy of both nets on B's held-out rows; None where there are none with labels."""

    def __init__(self, a: Party, b: Party, held_out: Table | None) -> None:
        # copies of the templates, since the parties' own are in use at the same time
        self._a, self._b = (replace(party.net, model=copy.deepcopy(party.net.model)) for party in (a, b))
        self._inputs, self._labels, self._held_out = a.inputs, a.labels, held_out

    @torch.no_grad()
    def __call__(self, a: Params, b: Params) -> float | None:
        """Share of rows whose label the sign of the score gives, in [0, 1]."""
        if self._held_out is None or self._held_out.labels is None or not len(self._held_out.labels):
            return None
        assert self._labels is not None
        phi = predictor(rows(self._a, a, self._inputs, key=None).values, self._labels)
        scores = rows(self._b, b, self._held_out.inputs.double(), key=None).values @ phi
        return accuracy(torch.where(scores > 0, 1.0, -1.0), self._held_out.labels)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal signs, in [0, 1]."""
    return float((predicted.double() == labels.double()).double().mean())
