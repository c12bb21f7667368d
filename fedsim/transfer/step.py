"""One iteration at one party: its forward pass, and its gradient once the other party's share of it is there."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import TransferError
from fedsim.records import Params
from fedsim.training.objective import Start
from fedsim.transfer import objective as o
from fedsim.transfer.nets import Hidden, Net, jacobian, rows
from fedsim.transfer.terms import Gradient, Source, View


@dataclass(frozen=True)
class Rows:
    """A party's rows of training.

    inputs: float64 (n, *shape), those of the overlap first. overlap, labelled: how many.
    labels: (n,) of +1 and -1, at party A; None at B.
    """

    inputs: Tensor
    overlap: int
    labelled: int
    labels: Tensor | None = None


@dataclass(frozen=True)
class Forward:
    """What a party knows before it hears of the other.

    leaves: all parameters, of which the trained ones want gradients. hidden: of all rows. own: its part of the loss.
    phi: (d,), at party A.
    """

    leaves: Params
    hidden: Hidden
    own: Tensor
    phi: Tensor | None


def forward(
    net: Net, params: Params, data: Rows, objective: o.Objective, *, key: int, progress: float, start: Params
) -> Forward:
    """The party's hidden values, and its own part of the loss.

    key: of this iteration's draws. progress: in (0, 1]. start: the first parameters, for penalties that ask.
    """
    leaves = {name: tensor.detach().requires_grad_(name not in net.frozen) for name, tensor in params.items()}
    hidden = rows(net, leaves, data.inputs, key=key, progress=progress)
    trained = {name: leaf for name, leaf in leaves.items() if name not in net.frozen}
    own = o.alone(objective, hidden.values[: data.overlap], trained)
    for penalty in net.penalties:
        own = own + penalty(leaves, Start(start, len(data.inputs)))
    phi = None if data.labels is None else o.predictor(hidden.values, data.labels)
    return Forward(leaves, hidden, own, phi)


def derivatives(forward: Forward, value: Tensor) -> Params:
    """Gradient of a value by the trained parameters."""
    trained = {name: leaf for name, leaf in forward.leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(
        value, list(trained.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(trained, found, strict=True))


def view(net: Net, forward: Forward, data: Rows, *, key: int, progress: float) -> View:
    """The party's values as its coefficients need them."""
    count = data.overlap
    hidden = forward.hidden.values.detach()[:count]
    features = _with_ones(forward.hidden.features.detach()[:count]) if net.head else hidden.new_zeros(count, 0)
    names = net.body_names(forward.leaves)
    body = hidden.new_zeros(count, hidden.shape[1], 0)
    if names:
        params = {name: leaf.detach() for name, leaf in forward.leaves.items()}
        body = jacobian(net, params, data.inputs[:count], key=key, progress=progress)
    return View(hidden.numpy(), features.numpy(), body.numpy())


def source(net: Net, forward: Forward, data: Rows) -> Source:
    """What only party A has."""
    assert data.labels is not None and forward.phi is not None
    features = data.labels @ _with_ones(forward.hidden.features.detach()) / len(data.labels)
    body = [forward.leaves[name] for name in net.body_names(forward.leaves)]
    parts = [torch.cat([d.flatten() for d in _each(one, body)]) if body else one.new_zeros(0) for one in forward.phi]
    return Source(
        forward.phi.detach().numpy(),
        data.labels[: data.labelled].numpy(),
        features.numpy() if net.head else features.new_zeros(0).numpy(),
        torch.stack(parts).detach().numpy(),
    )


def _each(value: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones(len(features), 1)], 1)


def joined(net: Net, forward: Forward, secret: Gradient) -> Params:
    """The whole gradient: the party's own part, and the one that needed the other party.

    Raises:
        TransferError: an entry is not finite.
    """
    own = derivatives(forward, forward.own)
    by_name = dict(zip(net.head_names, (secret.weight, secret.bias), strict=False))
    found, at = {}, 0
    for name, gradient in own.items():
        if name in by_name:
            part = torch.from_numpy(by_name[name].copy())
        else:
            part = torch.from_numpy(secret.body[at : at + gradient.numel()].reshape(gradient.shape).copy())
            at += gradient.numel()
        found[name] = gradient + part
    return finite(found)


def finite(gradient: Params) -> Params:
    """The gradient.

    Raises:
        TransferError: an entry is not finite.
    """
    for name, tensor in gradient.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TransferError(f"training diverged: the gradient of {name} is not finite; lower train.optimizer.lr")
    return gradient
