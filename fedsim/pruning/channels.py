"""Structured pruning: which output channels of which layers can go, what goes with them, and the smaller model.

A channel of a layer owns its row of the weight and its bias, its numbers in the norms that follow, and the columns with
which other layers read it: one for each pixel behind a flatten. Channels that meet others, in a residual sum say, stay:
of a residual block only those go that are inside its branch.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from fedsim import rng
from fedsim.models.cost import example
from fedsim.pruning import following
from fedsim.pruning.following import INPUT, OUTPUT, Flow
from fedsim.pruning.slicing import Consumer, Group, cut, indices, masked, own_tensors, sliced

__all__ = ["Consumer", "Group", "groups", "indices", "masked", "refusals", "shrunk", "sliced"]


def groups(model: nn.Module, input_shape: tuple[int, ...]) -> list[Group]:
    """The layers whose output channels can go, in the order of ``named_modules``.

    Found by calling the model (:mod:`fedsim.pruning.following`), and tried: without some channels of all of them the
    model must compute what it does with those at 0.

    Args:
        model: of any class; not changed.
        input_shape: of one example.

    Raises:
        ValueError: the model cannot be called with it, or no layer has channels that can go; says why, layer by layer.
    """
    found, refused = _searched(model, input_shape)
    if not found:
        reasons = "; ".join(f"{layer}: {why}" for layer, why in refused.items()) or "it has no layers"
        raise ValueError(f"no channels of this model can be removed ({reasons})")
    return found


def refusals(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, str]:
    """Why the channels of the other linear layers and convolutions must stay, by path. Args as for :func:`groups`."""
    return _searched(model, input_shape)[1]


def shrunk(model: nn.Module, kept: Mapping[str, Tensor], input_shape: tuple[int, ...]) -> nn.Module:
    """A copy of the model without the other channels: every tensor is smaller, every name is there.

    Without a norm, and with batch norm, it computes in evaluation mode what the model does with :func:`masked`
    parameters. Group and layer norm take their statistics over the channels that are there, so behind them the copy is
    another function, as a smaller model is; the number of groups stays, and channels move up into them in order.

    Args:
        model: not changed. Hooks, keyed layers, what is frozen and the mode are copied.
        kept: layer -> channels that stay: int64 ascending, or bool (out,). Layers not named keep all.
        input_shape: of one example.

    Raises:
        ValueError: as for :func:`groups`; a layer's channels cannot go, or it keeps none, or as many as its group norm
            cannot take; names it.
    """
    found, refused = _searched(model, input_shape)
    for layer in kept:
        if layer in refused:
            raise ValueError(f"channels of {layer} cannot be removed: {refused[layer]}")
    return cut(model, kept, found)


# ---------------------------------------------------------------- finding


def _searched(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[list[Group], dict[str, str]]:
    """The groups, and why the other layers are none."""
    flow = following.follow(model, input_shape)
    found: dict[str, Group] = {}
    refused: dict[str, str] = {}
    for layer, module in following.layers(model):
        try:
            found[layer] = _group(model, flow, layer, module)
        except _RefusedError as why:
            refused[layer] = str(why)
    refused |= _failing(model, input_shape, found)
    left = [group for layer, group in found.items() if layer not in refused]
    return left, {layer: refused[layer] for layer, _ in following.layers(model) if layer in refused}


def _failing(model: nn.Module, input_shape: tuple[int, ...], found: Mapping[str, Group]) -> dict[str, str]:
    """The groups that cannot go after all, and why."""
    if not _trial(model, input_shape, list(found.values())):  # which is the rule, and spares a trial for each
        return {}
    tried = {layer: _trial(model, input_shape, [group]) for layer, group in found.items()}
    together = _trial(model, input_shape, [group for layer, group in found.items() if not tried[layer]])
    return {layer: why or together for layer, why in tried.items() if why or together}


class _RefusedError(Exception):
    """Why the channels of a layer must stay."""


def _group(model: nn.Module, flow: Flow, layer: str, module: nn.Module) -> Group:
    _check_station(model, flow, layer)
    if layer not in flow.reached:
        raise _RefusedError("the first axis of what it returns is not the batch")
    reached, follows, readers, multiple = flow.reached[layer], list[str](), list[Consumer](), 1
    if OUTPUT in reached:
        raise _RefusedError("its outputs are the model's")
    out = len(own_tensors(module)["weight"])
    for station in reached:
        _check_station(model, flow, station)
        positions = _positions(flow, layer, station, out)
        other = model.get_submodule(station)
        if following.is_layer(other):
            readers.append(Consumer(station, positions))
            continue
        follows.append(station)
        if isinstance(other, nn.GroupNorm):
            multiple = math.lcm(multiple, other.num_groups // math.gcd(other.num_groups, positions))
    if not readers:
        raise _RefusedError("no layer reads its outputs")
    return Group(layer, out, tuple(follows), tuple(readers), multiple)


def _positions(flow: Flow, layer: str, station: str, out: int) -> int:
    """How many features of ``station`` each channel owns; they must be nobody else's, and lie side by side."""
    owners = flow.reached[layer][station]
    if others := flow.others(layer, station):
        met = "the model's input" if others[0] == INPUT else f"those of {others[0]}"
        raise _RefusedError(f"its channels meet {met} before {station}")
    positions = len(owners) // out
    if not torch.equal(owners, torch.arange(out).repeat_interleave(positions)):
        raise _RefusedError(f"its channels do not come to {station} one by one, in order")
    return positions


def _check_station(model: nn.Module, flow: Flow, path: str) -> None:
    """Refuse what cannot be made smaller, as a layer that loses channels or as one that reads them."""
    module, calls = model.get_submodule(path), flow.calls.get(path, 0)
    if not (following.is_layer(module) or following.is_follower(module)):
        raise _RefusedError(f"{path} is a {type(module).__name__}, which may use its weight in a way of its own")
    if calls != 1:
        raise _RefusedError(f"{path} is called {calls} times in a forward pass")
    if getattr(module, "groups", 1) != 1:
        raise _RefusedError(f"{path} is a convolution of {getattr(module, 'groups', 1)} groups")
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        raise _RefusedError(f"{path} normalises over {len(module.normalized_shape)} axes")
    own = own_tensors(module)
    weight = own.get("weight")
    if weight is None and following.is_layer(module):
        raise _RefusedError(f"{path} has a weight that is computed from others")
    shapes = () if weight is None else (weight.shape, weight.shape[:1])
    if odd := [name for name, tensor in own.items() if tensor.numel() > 1 and tensor.shape not in shapes]:
        raise _RefusedError(f"{path} has {odd[0]} in a shape of its own, {tuple(own[odd[0]].shape)}")
    names = [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is weight]
    if weight is not None and len(names) > 1:
        raise _RefusedError(f"{' and '.join(names)} are one tensor")


def _trial(model: nn.Module, input_shape: tuple[int, ...], groups: Sequence[Group]) -> str:
    """Take half of the channels away and compare; why it failed, "" if it did not."""
    if not groups:
        return ""
    copied = _random(following.in_evaluation(model))
    kept = {one.layer: _half(one) for one in groups}
    x = example(copied, input_shape, 2)
    x = rng.normal(rng.fold(0, "trial"), *x.shape).to(x) if x.is_floating_point() else x
    smaller = cut(copied, kept, groups)
    for module in [*copied.modules(), *smaller.modules()]:
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):  # whose statistics are of other channels then
            vars(module)["forward"] = _same
    state = masked({**dict(copied.named_parameters()), **dict(copied.named_buffers())}, kept, groups)
    with torch.no_grad(), rng.torch_seeded(0):
        expected = _tensors(functional_call(copied, state, (x,)))
        try:
            returned = _tensors(smaller(x))
        except Exception as error:
            return f"without some of its channels the model fails: {error}"
    if not all(_alike(one, other) for one, other in zip(returned, expected, strict=True)):
        return "without some of its channels the model computes something else: its code depends on all of them"
    return ""


def _tensors(returned: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-3 * float(other.abs().max())


def _half(group: Group) -> Tensor:
    """About half of the channels, here and there."""
    count = max(group.multiple, group.out // 2 // group.multiple * group.multiple)
    return rng.permutation(rng.fold(0, "half", group.layer), group.out)[:count].sort().values


def _random(model: nn.Module) -> nn.Module:
    """The same model with random numbers, none of them 0, that neither grow nor vanish from layer to layer."""
    for number, parameter in enumerate(model.parameters()):
        key, fan = rng.fold(0, "random", number), parameter[0].numel() if parameter.dim() > 1 else 0
        drawn = rng.normal(key, *parameter.shape) / math.sqrt(fan) if fan else 0.5 + rng.uniform(key, *parameter.shape)
        parameter.copy_(drawn)
    return model


def _same(x: Tensor) -> Tensor:
    return x
