"""Models with several heads: from some layer on the path divides, and each branch has weights of its own.

A fork is made in a model in place, and no name changes: the path that was there goes on as the first head, and the
other branches, copies with new initial weights, are found below it as ``forks.0``, ``forks.1``, ... In training the
shared part runs once, and logits come out as (batch, heads, classes), or (batch, time, heads, classes); with several
dropout samples, which come behind the heads, as (batch, heads, samples, classes). In evaluation the model returns what
it always did: the logits of its first head, or the mean over heads.

An ``nn.Sequential`` divides in front of any of its children (:class:`Forked`), and again at a later one, so that heads
form a tree. Elsewhere only the last linear layer is repeated (:class:`Together`).
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from fedsim.models import places
from fedsim.models.places import FORKS

Shown = int | Literal["mean", "all"]


class Split(NamedTuple):
    """Where paths divide.

    names: children of the Sequential with the last linear layer, in front of each of which every path divides. None
        takes ``depth`` of them: the last hidden linear layer, or what else has the weights just before the last linear
        layer (the last stage of a resnet), and those before it.
    ways: branches at each, >= 2, so there are ``ways ** depth`` heads.
    depth: how many there are; 0 divides the whole model, before its first layer, into ``ways``.
    """

    names: tuple[str, ...] | None
    ways: int
    depth: int = 1


class Manner(NamedTuple):
    """How a forked model behaves.

    shown: what it returns in evaluation: the logits of one head, their mean over heads, or all of them.
    rescale: whether what branches send back into the shared part is averaged rather than summed.
    samples: how many axes training logits have between heads and classes.
    """

    shown: Shown = 0
    rescale: bool = False
    samples: int = 0

    def axis(self, training: bool) -> int:
        """The axis of the heads, counted from the end."""
        return -2 - self.samples * training

    def of(self, heads: Sequence[Tensor], training: bool) -> Tensor:
        """What is returned, from the logits of each branch, which have an axis of heads."""
        axis = self.axis(training)
        joined = torch.cat([*heads], axis)
        if training or self.shown == "all":
            return joined
        return joined.mean(axis) if self.shown == "mean" else joined.select(axis, self.shown)


def divided(x: Tensor, branches: int) -> Tensor:
    """``x`` forward; backward the gradient over ``branches``.

    Put in front of a fork it makes of the sum of what the branches send back their mean, while each branch keeps its
    own gradient whole. In a tree with such a layer at every fork the root gets the mean over all leaves.

    Source: Song, Chai 2018, "Collaborative Learning for Deep Neural Networks", arXiv:1805.11761, section 3.3,
        "backpropagation rescaling", I(x) (number of the section unverified). Differs: none known.
    """
    return x.detach() + (x - x.detach()) / branches if x.is_floating_point() else x


class Forked(nn.Sequential):
    """A Sequential whose path divides in front of some of its children; see :func:`fork`.

    starts: for each of ``forks``, the child in front of which it leaves the main path.
    """

    adds_axis = True
    forks: nn.ModuleList
    starts: tuple[str, ...]
    manner: Manner

    def forward(self, input: Tensor) -> Tensor:
        """Logits of all heads in training; of what ``manner.shown`` says in evaluation."""
        x, others = input, list[Tensor]()
        for name, child in self._modules.items():
            if name == FORKS or child is None:
                continue
            leaving = [f for start, f in zip(self.starts, self.forks, strict=True) if start == name and self._divides()]
            if leaving:
                x = divided(x, 1 + len(leaving)) if self.manner.rescale else x
                others += [self._with_axis(branch(x), branch) for branch in leaving]
            x = child(x)
        return self.manner.of([self._with_axis(x), *others], self.training) if self._divides() else x

    def _divides(self) -> bool:
        return self.training or self.manner.shown != 0

    def _with_axis(self, logits: Tensor, branch: nn.Module | None = None) -> Tensor:
        """With an axis of heads, which a branch that divides again has made itself."""
        return logits if isinstance(branch, Forked) else logits.unsqueeze(self.manner.axis(self.training))


class Together(nn.Module):
    """A module of any class that is called together with copies of itself; see :func:`fork`.

    Each copy has layers of its own in front and behind, as :mod:`fedsim.models.layers.attaching` puts them.
    """

    adds_axis = True
    forks: nn.ModuleList
    manner: Manner

    def __call__(self, x: Tensor) -> Any:
        """Call all of them; hooks of this module are the first one's alone."""
        if not (self.training or self.manner.shown != 0):
            return super().__call__(x)
        x = divided(x, 1 + len(self.forks)) if self.manner.rescale else x
        logits = [super().__call__(x), *(other(x) for other in self.forks)]
        return self.manner.of([one.unsqueeze(self.manner.axis(self.training)) for one in logits], self.training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class is made on the spot, so it is sent as the class it was made of."""
        return (_blank, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:])


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _together(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind``, called together with copies; the same class each time."""
    if kind not in _MADE:
        _MADE[kind] = type(f"Together{kind.__name__}", (Together, kind), {})
    return _MADE[kind]


def _blank(kind: type[nn.Module]) -> nn.Module:
    made = _together(kind)
    return made.__new__(made)


def fork(model: nn.Module, split: Split, manner: Manner) -> None:
    """Let the path to the last linear layer divide, in place. New weights are drawn from torch's generator.

    Args:
        model: not yet forked.
        split: where. Where the last linear layer is in no Sequential, it alone is repeated.
        manner: how the model behaves then; its ``samples`` are counted here.

    Raises:
        ValueError: there are several heads already, no such child, or no place to divide.
    """
    if several_heads(model):
        raise ValueError("needs a model with one head; it has several heads already")
    manner = manner._replace(samples=sum(bool(getattr(module, "adds_axis", False)) for module in model.modules()))
    head = places.head(model)
    above, _, name = head.rpartition(".")
    parent = model.get_submodule(above) if split.depth else model
    if _is_sequence(parent):
        _divide(parent, _starts(parent, split, name), split.ways, manner)
    elif split.names is None and split.depth == 1:
        _repeat(model.get_submodule(head), split.ways, manner)
    else:
        what = f"but {head}, the last linear layer, is in a" if split.depth else "got a"
        raise ValueError(
            f"needs an nn.Sequential to divide, {what} {_kind(parent)}; every model of the zoo but char-lstm is one"
        )


def _repeat(module: nn.Module, ways: int, manner: Manner) -> None:
    _refuse_taken(module)
    others = nn.ModuleList(anew(copy.deepcopy(module)) for _ in range(ways - 1))
    module.__class__ = _together(type(module))
    _set(module, others, manner)


def several_heads(model: nn.Module) -> bool:
    """Whether a model has been forked."""
    return any(isinstance(module, Forked | Together) for module in model.modules())


@contextlib.contextmanager
def showing(model: nn.Module, shown: Shown) -> Iterator[None]:
    """Let a forked model return something else in evaluation: one head, the mean, or all, (batch, heads, classes).

    Raises:
        ValueError: it has one head.
    """
    outermost = next((m for m in model.modules() if isinstance(m, Forked | Together)), None)
    if outermost is None:
        raise ValueError("needs a model with several heads")
    before = outermost.manner
    outermost.manner = before._replace(shown=shown)
    try:
        yield
    finally:
        outermost.manner = before


def anew(module: nn.Module) -> nn.Module:
    """The module, with the parameters that are trained drawn again, and statistics as at the beginning.

    Raises:
        ValueError: no layer in it says how, by ``reset_parameters``.
    """
    found = [m for m in module.modules() if hasattr(m, "reset_parameters") and _is_trained(m)]
    if not found:
        raise ValueError("needs layers with reset_parameters behind the fork: branches that start alike stay alike")
    for layer in reversed(found):  # so that a module has the last word on what it is made of
        cast(Any, layer).reset_parameters()
    return module


def _divide(parent: nn.Module, names: Sequence[str], ways: int, manner: Manner) -> None:
    """Divide in front of each of ``names``, in order, and so do the branches at those that they still have."""
    _refuse_taken(parent)
    starts, branches = list[str](), list[nn.Module]()
    for i, start in enumerate(names):
        for _ in range(ways - 1):
            branch = anew(_copy_from(parent, start)).train(parent.training)
            if names[i + 1 :]:
                _divide(branch, names[i + 1 :], ways, manner._replace(shown="all"))
            starts.append(start)
            branches.append(branch)
    parent.__class__ = Forked
    parent.starts = tuple(starts)  # type: ignore[assignment]
    _set(parent, nn.ModuleList(branches), manner)


def _copy_from(parent: nn.Module, start: str) -> nn.Module:
    names = list(parent._modules)
    tail = OrderedDict((name, parent.get_submodule(name)) for name in names[names.index(start) :])
    return nn.Sequential(copy.deepcopy(tail))


def _set(module: nn.Module, others: nn.ModuleList, manner: Manner) -> None:
    module.add_module(FORKS, others)
    module.manner = manner  # type: ignore[assignment]


def _starts(parent: nn.Module, split: Split, head: str) -> list[str]:
    """The children in front of which paths divide, in order."""
    names = list(parent._modules)
    if split.depth == 0:
        return names[:1]
    if split.names is not None:
        return _in_order(names, split.names)
    points = [name for name in names[: names.index(head) + 1] if _has_weights(parent.get_submodule(name))]
    if len(points) < split.depth:
        raise ValueError(f"needs {split.depth} layers in front of which to divide, the model has {len(points)}")
    return points[-1 - split.depth : -1] if len(points) > split.depth else points


def _in_order(names: Sequence[str], given: Sequence[str]) -> list[str]:
    if unknown := [name for name in given if name not in names]:
        raise ValueError(
            f"split must name children of the Sequential with the head ({', '.join(names)}), got {unknown[0]}"
        )
    ordered = sorted(given, key=names.index)
    if not ordered or len(set(ordered)) < len(ordered):
        raise ValueError(f"split must name at least one child, each once, got {list(given)}")
    return ordered


def _has_weights(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear | nn.Conv2d) for m in module.modules())


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_trained(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not own or any(parameter.requires_grad for parameter in own)


def _refuse_taken(module: nn.Module) -> None:
    if hasattr(module, FORKS):
        raise ValueError(f"needs the name {FORKS} free, {_kind(module)} has something there")


def _kind(module: nn.Module) -> str:
    return type(module).__name__
