"""Where in a model a method has its place: found by the kinds of its layers, so that any model will do.

The order of layers is that of ``named_modules``, which is the order of the calls in every model of the zoo and in most
others. A residual block says which of its children ends its branch and which its shortcut, by attributes
``branch`` and ``shortcut``.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.GELU, nn.ELU, nn.SELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid)

FORKS = "forks"  # child that holds the other branches of a forked module


class Unit(NamedTuple):
    """A convolution or a linear layer and what follows it.

    layer: path of the layer with the weights. end: path of the last of the norm and activation behind it, or of the
        layer itself. activation: path of the activation, None if there is none or it is no module.
    stage: of convolutions, 1, 2, ...: a new one begins after a pool, and with a convolution that strides.
    """

    layer: str
    end: str
    activation: str | None
    stage: int


class Block(NamedTuple):
    """A residual block: paths of the end of its branch, and of its shortcut (None if that is no module)."""

    branch: str
    shortcut: str | None
    stage: int


def join(path: str, name: str) -> str:
    """The path of what is called ``name`` in the module at ``path``, which is "" for the model itself."""
    return f"{path}.{name}" if path else name


def convolutions(model: nn.Module) -> list[Unit]:
    """The convolutions (``nn.Conv2d``) of a model."""
    return [unit for unit in _units(model) if isinstance(model.get_submodule(unit.layer), nn.Conv2d)]


def hidden(model: nn.Module) -> list[Unit]:
    """The linear layers (``nn.Linear``) of a model but for the last."""
    return [unit for unit in _units(model) if isinstance(model.get_submodule(unit.layer), nn.Linear)][:-1]


def head(model: nn.Module) -> str:
    """Path of the last linear layer.

    Raises:
        ValueError: there is none, or it is the model itself.
    """
    paths = [path for path, module in _on_the_main_path(model) if isinstance(module, nn.Linear) and path]
    if not paths:
        raise ValueError("needs a linear layer inside the model; every model of the zoo has one")
    return paths[-1]


def before_head(model: nn.Module) -> list[str]:
    """Path of what an ``nn.Sequential`` calls just before the last linear layer; [] where that is not known."""
    above, _, name = head(model).rpartition(".")
    parent = model.get_submodule(above)
    names = list(parent._modules)
    known = isinstance(parent, nn.Sequential) and names.index(name) > 0
    return [join(above, names[names.index(name) - 1])] if known else []


def blocks(model: nn.Module) -> list[Block]:
    """The residual blocks, in order."""
    found = []
    stages = {unit.layer: unit.stage for unit in convolutions(model)}
    for path, module in model.named_modules():
        branch, shortcut = getattr(module, "branch", None), getattr(module, "shortcut", None)
        if isinstance(branch, str):
            inner = [stage for layer, stage in stages.items() if layer.startswith(join(path, ""))]
            shortcut_path = join(path, "shortcut") if isinstance(shortcut, nn.Module) else None
            found.append(Block(join(path, branch), shortcut_path, max(inner, default=1)))
    return found


def last_stages(places: list[Unit], count: int) -> Iterator[tuple[Unit, int]]:
    """The units of the last ``count`` stages, with how many stages come after theirs: 0 for the last."""
    last = max((unit.stage for unit in places), default=0)
    return ((unit, last - unit.stage) for unit in places if last - unit.stage < count)


def _units(model: nn.Module) -> Iterator[Unit]:
    stage, fresh = 1, True  # fresh: the stage has no convolution yet
    for path, module in _on_the_main_path(model):
        if isinstance(module, _POOLS):
            stage, fresh = (stage, fresh) if fresh else (stage + 1, True)
        if not path or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if isinstance(module, nn.Conv2d):
            if max(_numbers(module.stride)) > 1 and not fresh:
                stage += 1
            fresh = False
        end, activation = _followed(model, path)
        yield Unit(path, end, activation, stage)


def _on_the_main_path(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules, but for the other branches of a model with several heads (:mod:`fedsim.models.forks`)."""
    forked = (path for path, module in model.named_modules() if getattr(module, "adds_axis", False))
    others = tuple(join(path, FORKS) + "." for path in forked)
    return ((path, module) for path, module in model.named_modules() if not path.startswith(others))


def _numbers(stride: object) -> tuple[int, ...]:
    return stride if isinstance(stride, tuple) else (int(str(stride)),)


def _followed(model: nn.Module, path: str) -> tuple[str, str | None]:
    """The end of a unit and its activation. In an ``nn.Sequential`` the next children are known to be called next;
    elsewhere only a norm is taken for what follows, since one activation often serves many layers.
    """
    above, _, name = path.rpartition(".")
    parent = model.get_submodule(above)
    names = list(parent._modules)
    following = names[names.index(name) + 1 :]
    end = name
    for other in following:
        module = parent._modules[other]
        if isinstance(module, ACTIVATIONS) and isinstance(parent, nn.Sequential):
            return join(above, other), join(above, other)
        if not isinstance(module, (*_NORMS, nn.Identity)):
            break
        end = other
    return join(above, end), None
