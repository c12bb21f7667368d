"""How well the two nets predict, for whoever may see both: a simulation, not a party."""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim.data.sides import Table
from fedsim.records import Params
from fedsim.transfer.agreement import Party
from fedsim.transfer.nets import rows
from fedsim.transfer.objective import Form, label_loss, predictor


class Score(NamedTuple):
    """loss: of labels, mean, as it is in training. accuracy: in [0, 1]. None where no row has a label."""

    loss: float | None
    accuracy: float | None


class Scorer:
    """How both nets do on B's held-out rows."""

    def __init__(self, a: Party, b: Party, held_out: Table | None, form: Form) -> None:
        # copies of the templates, since the parties' own are in use at the same time
        self._a, self._b = (replace(party.net, model=copy.deepcopy(party.net.model)) for party in (a, b))
        self._inputs, self._labels, self._held_out, self._form = a.inputs, a.labels, held_out, form

    @torch.no_grad()
    def __call__(self, a: Params, b: Params) -> Score:
        """Of these parameters; a label is predicted by the sign of its score."""
        if self._held_out is None or self._held_out.labels is None or not len(self._held_out.labels):
            return Score(None, None)
        assert self._labels is not None
        phi = predictor(rows(self._a, a, self._inputs, key=None).values, self._labels)
        scores = rows(self._b, b, self._held_out.inputs.double(), key=None).values @ phi
        labels = self._held_out.labels.double()
        loss = float(label_loss(scores, labels, self._form))
        return Score(loss, accuracy(torch.where(scores > 0, 1.0, -1.0), labels))


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of equal signs, in [0, 1]."""
    return float((predicted.double() == labels.double()).double().mean())
