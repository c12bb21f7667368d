"""Small pairs of parties for the tests of ``fedsim.transfer``: unequal sizes, mixed signs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.models.zoo import MODELS
from fedsim.records import Params
from fedsim.transfer import objective as o
from fedsim.transfer.nets import Net, net_of
from fedsim.transfer.step import Forward, Rows, forward

HIDDEN, OVERLAP, LABELLED, ROWS_A = 5, 12, 7, 20
NETS = {
    "linear": ("linear", {}, False),
    "mlp": ("mlp", {"hidden": [4]}, False),
    "deep": ("mlp", {"hidden": [3, 4], "norm": "layer"}, False),
    "dropout": ("mlp", {"hidden": [6], "dropout": 0.5}, False),
    "head only": ("mlp", {"hidden": [4]}, True),
}


@dataclass(frozen=True)
class Side:
    """A net, its parameters, its rows."""

    net: Net
    params: Params
    rows: Rows


def normal(key: int, *shape: int) -> Tensor:
    return rng.normal(key, *shape, dtype=torch.float64)


def signs(key: int, n: int) -> Tensor:
    return torch.where(rng.uniform(key, n) < 0.4, 1.0, -1.0).double()


def side(role: str, kind: str = "linear", seed: int = 0) -> Side:
    """Party a: 6 features, 20 rows of which 12 overlap; party b: 9 features, 12 rows."""
    name, params, only_head = NETS[kind]
    width = 6 if role == "a" else 9
    key = rng.fold(seed, role, kind)
    with rng.torch_seeded(key):
        model = MODELS[name]((width,), HIDDEN, **params)
    inputs = normal(rng.fold(key, "inputs"), ROWS_A if role == "a" else OVERLAP, width)
    net = net_of(model, inputs[0], only_head=only_head)
    start = {n: tensor.detach().clone() for n, tensor in p.of(net.model)[0].items()}
    labels = signs(rng.fold(key, "labels"), ROWS_A) if role == "a" else None
    return Side(net, start, Rows(inputs, OVERLAP, LABELLED, labels))


def ahead(side: Side, objective: o.Objective, params: Params | None = None) -> Forward:
    """The party's forward pass, with draws of key 3."""
    return forward(side.net, params or side.params, side.rows, objective, key=3, progress=1.0, start=side.params)


def loss(objective: o.Objective, a: Forward, b: Forward, labels: Tensor) -> Tensor:
    """The whole loss of both parties."""
    assert a.phi is not None
    hidden = a.hidden.values[:OVERLAP]
    crossed = o.cross(objective, a.phi, labels[:LABELLED], hidden, b.hidden.values)
    return crossed + a.own + b.own
