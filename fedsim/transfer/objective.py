"""What the two parties minimise together, and what of it each can calculate alone.

``L = L1 + gamma L2 + l2 / 2 (|theta_A|^2 + |theta_B|^2)``, with means where the paper has sums:
``L1 = mean_i loss(y_i phi_i)`` over labelled rows of the overlap, ``phi_i = <Phi, u_i^B>``, ``Phi = mean_j y_j u_j^A``
over all of A's rows; ``L2 = mean_i`` of ``|u_i^A - u_i^B|^2`` or ``-<u_i^A, u_i^B>`` over the whole overlap.

Source: Liu et al. 2018, "Secure Federated Transfer Learning", arXiv:1812.03337, section 3 and 4.1. Differs: means, so
that a step size does not depend on how many rows there are.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Form = Literal["taylor", "exact"]
Alignment = Literal["distance", "inner-product"]


@dataclass(frozen=True)
class Objective:
    """The weights and forms of the parts.

    form: of the logistic loss; only ``taylor`` can be calculated on encrypted values.
    alignment: what pulls the hidden values of one person together. gamma: its weight, >= 0. l2: of parameters, >= 0.
    """

    form: Form = "taylor"
    alignment: Alignment = "distance"
    gamma: float = 0.05
    l2: float = 0.001

    @property
    def kappa(self) -> float:
        """Factor of ``<u^A, u^B>`` in the alignment."""
        return -2.0 if self.alignment == "distance" else -1.0


def predictor(hidden: Tensor, labels: Tensor) -> Tensor:
    """``Phi = mean_j y_j u_j``: (d,), of hidden (n, d) and labels (n,) of +1 and -1. All that B needs of A."""
    return (labels @ hidden) / len(labels)


def label_loss(scores: Tensor, labels: Tensor, form: Form) -> Tensor:
    """Mean loss of scores (n,) for labels (n,) of +1 and -1: scalar.

    exact: ``ln(1 + exp(-z))``, z = y phi; taylor: ``ln 2 - z / 2 + z^2 / 8``, its second-order expansion at 0.
    """
    margins = labels * scores
    if form == "exact":
        return F.softplus(-margins).mean()
    return (math.log(2) - margins / 2 + margins**2 / 8).mean()


def cross(objective: Objective, phi: Tensor, labels: Tensor, hidden_a: Tensor, hidden_b: Tensor) -> Tensor:
    """The part of the loss that needs values of both parties: scalar.

    ``L1 + gamma kappa mean_i <u_i^A, u_i^B>``.

    Args:
        objective: its forms and weights.
        phi: (d,), from :func:`predictor`.
        labels: (labelled,) of +1 and -1: of the first rows of the overlap.
        hidden_a, hidden_b: (overlap, d), row by row of the same people.
    """
    scores = hidden_b[: len(labels)] @ phi
    products = (hidden_a * hidden_b).sum(1).mean()
    return label_loss(scores, labels, objective.form) + objective.gamma * objective.kappa * products


def alone(objective: Objective, hidden: Tensor, params: dict[str, Tensor]) -> Tensor:
    """A party's own part: ``gamma mean_i |u_i|^2 + l2 / 2 |theta|^2``, the first only where distances align: scalar.

    hidden: (overlap, d), of the rows of the overlap.
    """
    weights = sum((tensor.square().sum() for tensor in params.values()), start=hidden.new_zeros(()))
    own = objective.l2 / 2 * weights
    if objective.alignment == "distance":
        own = own + objective.gamma * hidden.square().sum(1).mean()
    return own
