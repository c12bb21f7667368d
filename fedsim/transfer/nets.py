"""A party's local net as pure functions: hidden values, row by row, and how they follow the parameters.

Every row goes through the net alone, with draws of its own where layers are stochastic, so the derivative of one row's
hidden values is that row's alone, in training too. All is float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.keyed import key_names, progress_names, step_keys
from fedsim.models.places import head as head_of
from fedsim.records import Params
from fedsim.training.objective import Penalty


@dataclass(frozen=True)
class Net:
    """A model whose outputs are a party's hidden values.

    model: float64; a template, only its structure and buffers are used.
    head: path of the last linear layer, ``u = W h + b``, where the model returns just that; None where it does not.
    frozen: names of parameters that are not trained.
    penalties: of regularisers, on the parameters.
    """

    model: nn.Module
    head: str | None
    frozen: frozenset[str] = frozenset()
    penalties: tuple[Penalty, ...] = ()

    @property
    def head_names(self) -> tuple[str, ...]:
        """Parameters of the head, weight first; () where there is none."""
        return () if self.head is None else (f"{self.head}.weight", f"{self.head}.bias")

    def body_names(self, params: Params) -> tuple[str, ...]:
        """The other trained parameters."""
        return tuple(name for name in params if name not in self.frozen and name not in self.head_names)


class Hidden(NamedTuple):
    """values: (n, d). features: (n, width), what the head is given; (n, 0) where there is no head."""

    values: Tensor
    features: Tensor


def net_of(model: nn.Module, example: Tensor, *, only_head: bool = False, penalties: tuple[Penalty, ...] = ()) -> Net:
    """The net around a model, which is made float64.

    Args:
        model: from the zoo, with d outputs; changed in place.
        example: one input, without a leading axis.
        only_head: freeze all but the last linear layer.
        penalties: of regularisers.

    Raises:
        ValueError: ``only_head`` where the last layer is not a plain linear one.
    """
    model.double()
    found = Net(model, _head(model, example), frozenset(), penalties)
    if not only_head:
        return found
    if found.head is None:
        raise ValueError("trains: head needs a model that ends in a plain linear layer with a bias")
    names = [name for name, _ in model.named_parameters()]
    return Net(model, found.head, frozenset(names) - frozenset(found.head_names), penalties)


def _head(model: nn.Module, example: Tensor) -> str | None:
    """Path of the last linear layer, if the model returns what that does with its own parameters."""
    try:
        path = head_of(model)
    except ValueError:
        return None
    layer = model.get_submodule(path)
    if type(layer) is not nn.Linear or layer.bias is None:
        return None
    net = Net(model, path)
    found = rows(net, p.of(model)[0], example.double().unsqueeze(0), key=0)
    expected = found.features @ layer.weight.T + layer.bias
    same = found.values.shape == expected.shape and bool(
        torch.equal(found.values, expected) or torch.allclose(found.values, expected, rtol=1e-12, atol=1e-12)
    )
    return path if same else None


def rows(net: Net, params: Params, inputs: Tensor, *, key: int | None, progress: float = 1.0) -> Hidden:
    """Hidden values of every row.

    Args:
        net: the net.
        params: all its parameters.
        inputs: (n, *shape), float64.
        key: of this step's draws; None: as in prediction, without any.
        progress: how far training has come, in (0, 1], for layers whose strength grows.
    """
    given = _given(net, len(inputs), key, progress)
    values, features = vmap(_one(net), in_dims=(None, 0, 0))(params, inputs, given)
    return Hidden(values, features)


def jacobian(net: Net, params: Params, inputs: Tensor, *, key: int, progress: float = 1.0) -> Tensor:
    """Derivatives of hidden values by the body's parameters: (n, d, P), in the order of ``body_names``.

    The draws are those of :func:`rows` with the same key.
    """
    names = net.body_names(params)
    fixed = {name: tensor for name, tensor in params.items() if name not in names}
    one = _one(net)

    def values(body: Params, row: Tensor, given: Params) -> Tensor:
        return one({**fixed, **body}, row, given)[0]

    body = {name: params[name] for name in names}
    found = vmap(jacrev(values), in_dims=(None, 0, 0))(body, inputs, _given(net, len(inputs), key, progress))
    return torch.cat([found[name].flatten(2) for name in names], 2)


def _given(net: Net, count: int, key: int | None, progress: float) -> dict[str, Tensor]:
    """Keys of each row for the stochastic layers, (n,), and how far training has come."""
    net.model.train(key is not None)
    names = key_names(net.model)
    parent = rng.as_tensor(0 if key is None else key)
    given = step_keys(names, rng.fold_tensor(parent, torch.arange(count)))
    given.update({name: torch.full((count,), progress) for name in progress_names(net.model)})
    return given


def _one(net: Net) -> Callable[[Params, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]:
    """Hidden values (d,) and features (width,) of one row."""
    buffers = p.of(net.model)[1]

    def one(params: Params, row: Tensor, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        state = {**params, **buffers, **given}
        if net.head is None:
            return functional_call(net.model, state, (row.unsqueeze(0),))[0], row.new_zeros(0)
        layer = net.model.get_submodule(net.head)
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            values = functional_call(net.model, state, (row.unsqueeze(0),))
        finally:
            hook.remove()
        return values[0], seen[-1][0]

    return one
