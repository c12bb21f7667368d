"""Where each output channel of a layer goes: what layers return is prescribed, and channels are changed.

Nothing is assumed about the code between layers but that it can be called. Norms and other layers that treat each
channel alone are passed by as if they were not there, so that those which pool their statistics do not hide who reads
whom. Layers are not computed, and C channels take about 2 log2 C rows of a batch, so this is quick.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from fedsim import rng
from fedsim.models.cost import example
from fedsim.models.forks import Forked, Together
from fedsim.models.layers.weights import StochasticConv2d, StochasticLinear

INPUT, OUTPUT = "the input", "the output"  # of the model; no path has a space in it

_LINEAR = (nn.Linear, StochasticLinear)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, StochasticConv2d)
_FOLLOWERS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.PReLU)

NOBODY, SEVERAL = -1, -2  # in the place of the channel that a feature depends on

_MOVED = 1e-4  # channels are moved by 0.1 and more


@dataclass(frozen=True)
class Flow:
    """Which channel reaches what.

    calls: how often each station, a layer or a follower, is called in a forward pass, by path.
    reached: for :data:`INPUT` and each layer, the stations (and :data:`OUTPUT`) that its channels come to without
        passing another layer: for each feature the one channel that it depends on, or :data:`NOBODY`, or
        :data:`SEVERAL`; int64 (features,).
    """

    calls: Mapping[str, int]
    reached: dict[str, dict[str, Tensor]]

    def others(self, layer: str, station: str) -> list[str]:
        """What else comes to the features of ``station`` that ``layer`` reaches."""
        own = self.reached[layer][station] != NOBODY
        found = ((source, to[station]) for source, to in self.reached.items() if source != layer and station in to)
        return [source for source, owners in found if bool((own & (owners != NOBODY)).any())]


def is_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer or a convolution of exactly a known class: a subclass may compute something else."""
    return _kind(module) in (*_LINEAR, *_CONVOLUTIONS)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a linear one."""
    return _kind(module) in _LINEAR


def is_follower(module: nn.Module) -> bool:
    """Whether it is a norm, or another layer that has numbers for each channel and gives back as many."""
    return isinstance(module, _FOLLOWERS) and getattr(module, "num_parameters", 0) != 1  # that one is of all channels


def in_evaluation(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode that computes all of its heads, without gradients."""
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, Forked | Together):
            module.manner = module.manner._replace(shown="all")
    return copied


def follow(model: nn.Module, input_shape: tuple[int, ...]) -> Flow:
    """Find out where the channels of each layer go. The model is not changed.

    Raises:
        ValueError: the model cannot be called with such an input.
    """
    copied = in_evaluation(model)
    for module in copied.modules():
        if not is_layer(module) and not is_follower(module):
            for number, own in enumerate(module.parameters(recurse=False)):  # none may hide what comes, as a 0 would
                own.copy_(_between(0.4, 0.6, number, own.shape))
    watched = _Watched(copied)
    x = example(copied, input_shape, 2)
    try:
        watched.call(x)
        watched.prescribe()
        reached = {INPUT: watched.from_input(x)} | {path: watched.from_layer(path, x) for path in watched.given}
    except Exception as error:
        raise ValueError(
            f"the model cannot be called with an input {input_shape}: {type(error).__name__}: {error}"
        ) from error
    return Flow(watched.calls, reached)


@dataclass
class _Watched:
    """A model whose layers return what they are told.

    given: what a layer returns, (1, ...). now: the same for all rows of this pass; None lets layers compute.
    fed: which features of each station's input are another than in row 0, for each call in the last pass.
    shapes: of what layers return.
    """

    model: nn.Module
    given: dict[str, Tensor] = field(default_factory=dict)
    calls: "Counter[str]" = field(default_factory=Counter)
    now: dict[str, Tensor] | None = None
    fed: dict[str, list[Tensor]] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    rows: int = 2

    def __post_init__(self) -> None:
        found = self.model.named_modules()
        self.stations = {path: module for path, module in found if is_layer(module) or is_follower(module)}
        for path, module in self.stations.items():
            module.forward = partial(self._called, path, module.forward)

    def _called(self, path: str, forward: Any, input: Tensor) -> Tensor:
        module = self.stations[path]
        axis = -1 if is_linear(module) or isinstance(module, nn.LayerNorm) else 1
        self.fed.setdefault(path, []).append(_changed(input, axis, self.rows))
        self.calls[path] += self.now is None
        if is_follower(module):
            return input
        if self.now is not None and path in self.now:
            return self.now[path].clone()
        returned: Tensor = forward(input)
        self.shapes[path] = returned.shape
        return returned

    def call(self, x: Tensor) -> object:
        """A forward pass."""
        self.fed, self.rows = {}, len(x)
        with torch.no_grad(), rng.torch_seeded(0):
            return self.model(x.clone())

    def prescribe(self) -> None:
        """After a first pass with two rows: choose what layers return that are called once and keep the rows apart."""
        plain = {path: shape[1:] for path, shape in self.shapes.items() if self.calls[path] == 1 and shape[0] == 2}
        for number, (path, shape) in enumerate(plain.items()):
            values = _between(0.1, 0.4, number, (1, *shape))
            self.given[path] = values.to(self.stations[path].get_parameter("weight"))

    def from_input(self, x: Tensor) -> dict[str, Tensor]:
        """Where the input goes, all of it taken for one channel."""
        changed = torch.cat([x[:1], x[:1], x[:1] + 1])
        given = {path: values.expand(3, *values.shape[1:]) for path, values in self.given.items()}
        return _touched({to: _owners(flags) for to, flags in self._pass(changed, given).items()})

    def from_layer(self, layer: str, x: Tensor) -> dict[str, Tensor]:
        """Where the channels of a layer go; with both signs, since an activation may stop one of them."""
        signs = [self._moved(layer, sign, x) for sign in (1.0, -1.0)]
        return _touched({to: _owners(signs[0][to] | signs[1][to]) for to in signs[0]})

    def _moved(self, layer: str, sign: float, x: Tensor) -> dict[str, Tensor]:
        """Row 0 is as prescribed. Row 1 + 2b changes the channels whose number has bit b, row 2 + 2b the others."""
        own = self.given[layer]
        axis = own.dim() - 1 if is_linear(self.stations[layer]) else 1
        channels = torch.arange(own.shape[axis])
        has = torch.stack([(channels >> bit) % 2 == 1 for bit in range(max(len(channels) - 1, 1).bit_length())])
        changes = torch.cat([torch.zeros_like(has[:1]), torch.stack([has, ~has], 1).flatten(0, 1)])
        rows, along = len(changes), [-1 if i == axis else 1 for i in range(1, own.dim())]
        given = {path: (sign * values).expand(rows, *values.shape[1:]) for path, values in self.given.items()}
        other = sign * _between(0.5, 0.9, 0, own.shape).to(own)
        given[layer] = torch.where(changes.reshape(rows, *along).to(own.device), other, given[layer])
        return self._pass(x[:1].expand(rows, *x.shape[1:]), given)

    def _pass(self, x: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Which features are another than in row 0: bool (rows - 1, features) for each station."""
        self.now = given
        returned = [leaf for leaf in tree_leaves(self.call(x)) if isinstance(leaf, Tensor)]
        found = {OUTPUT: _any([_changed(leaf.reshape(len(leaf), 1, -1), 1, len(x)) for leaf in returned])}
        return found | {path: _any(changes) for path, changes in self.fed.items()}


def _changed(x: Tensor, axis: int, rows: int) -> Tensor:
    features = x.shape[axis]
    if len(x) != rows:  # who knows what is in them
        return torch.ones(rows - 1, features, dtype=torch.bool)
    moved = (x[1:] - x[:1]).abs() > _MOVED
    return moved.movedim(axis, 1).reshape(rows - 1, features, -1).any(2).cpu()


def _any(flags: list[Tensor]) -> Tensor:
    return torch.stack(flags).any(0)


def _owners(changed: Tensor) -> Tensor:
    """The channel that each feature depends on, from its changes (2 bits, features): int64 (features,).

    A feature that depends on one channel changes in one row of each pair, and two channels differ in some bit.
    """
    having, others = changed[0::2], changed[1::2]
    owners = (having.long() << torch.arange(len(having))[:, None]).sum(0)
    owners = torch.where((having ^ others).all(0), owners, SEVERAL)
    return torch.where(changed.any(0), owners, NOBODY)


def _touched(owners: dict[str, Tensor]) -> dict[str, Tensor]:
    return {to: one for to, one in owners.items() if bool((one != NOBODY).any())}


def _between(low: float, high: float, number: int, shape: tuple[int, ...]) -> Tensor:
    return low + (high - low) * rng.uniform(rng.fold(0, "follow", number), *shape)


def _kind(module: nn.Module) -> type:
    return type(module).__bases__[1] if isinstance(module, Together) else type(module)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer and convolution, of whatever class."""
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    return ((path, module) for path, module in model.named_modules() if isinstance(module, kinds))
