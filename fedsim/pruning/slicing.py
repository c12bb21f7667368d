"""Taking channels away from tensors and from a model, once it is known what goes with them."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedsim.models.places import join
from fedsim.records import Params


class Consumer(NamedTuple):
    """A layer that reads the channels: path, and how many of its inputs, side by side, each channel owns."""

    path: str
    positions: int


@dataclass(frozen=True)
class Group:
    """A layer whose output channels can go.

    layer: its path. out: how many it has.
    follows: paths of norms, and of other modules with numbers for each channel, that lose the same ones.
    next: the layers that read them.
    multiple: how many stay must be a multiple of this, 1 but for group norm, whose groups must stay equal in size.
    """

    layer: str
    out: int
    follows: tuple[str, ...]
    next: tuple[Consumer, ...]
    multiple: int = 1


def sliced(tensors: Params, kept: Mapping[str, Tensor], groups: Sequence[Group]) -> Params:
    """The tensors of the smaller model: parameters, buffers, or whatever else has their names and shapes.

    Args:
        tensors: by name; some may be missing, others are returned as they are.
        kept: as for :func:`shrunk`.
        groups: of the whole model.

    Raises:
        ValueError: a tensor has not as many channels as its layer; or as for :func:`shrunk`.
    """
    staying = _staying(tensors, kept, groups)
    return {name: _selected(tensor, staying.get(name, {})) for name, tensor in tensors.items()}


def masked(tensors: Params, kept: Mapping[str, Tensor], groups: Sequence[Group]) -> Params:
    """The tensors with all at 0 that :func:`sliced` leaves out: rows, biases, scales and shifts, and the columns.

    With the columns at 0 nobody reads what an activation makes of 0.

    Args, Raises: as for :func:`sliced`.
    """
    staying = _staying(tensors, kept, groups)
    return {name: _zeroed(tensor, staying.get(name, {})) for name, tensor in tensors.items()}


def indices(kept: Tensor, group: Group) -> Tensor:
    """Channels that stay as int64, ascending.

    Args:
        kept: int64 ascending in [0, out), or bool (out,).

    Raises:
        ValueError: it is neither; there is none; or not a multiple of what the group norm takes. Names the layer.
    """
    if kept.dtype == torch.bool and kept.shape == (group.out,):
        kept = kept.nonzero().flatten()
    whole = kept.dtype == torch.int64 and kept.dim() == 1
    if not whole or bool((kept.diff() <= 0).any()) or bool(((kept < 0) | (kept >= group.out)).any()):
        rule = f"must be int64, ascending in [0, {group.out}), or bool ({group.out},)"
        raise ValueError(f"kept channels of {group.layer} {rule}, got {kept.dtype} {kept.tolist()}")
    if not len(kept):
        raise ValueError(f"{group.layer} must keep at least one channel")
    if len(kept) % group.multiple:
        rule = f"must keep a multiple of {group.multiple} channels, for the groups of the norm behind it"
        raise ValueError(f"{group.layer} {rule}, got {len(kept)}")
    return kept


def _staying(tensors: Params, kept: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, dict[int, Tensor]]:
    """For tensors that lose something: axis -> positions that stay."""
    found: dict[str, dict[int, Tensor]] = {}
    for group, staying in _chosen(kept, groups):
        for path in (group.layer, *group.follows):
            for name in _below(tensors, path, axes=1):
                size = tensors[name].shape[0]
                each = 1 if path == group.layer else max(size // group.out, 1)
                found.setdefault(name, {})[0] = _spread(name, size, staying, group.out, each)
        for path, each in group.next:
            for name in _below(tensors, path, axes=2):
                found.setdefault(name, {})[1] = _spread(name, tensors[name].shape[1], staying, group.out, each)
    return found


def _chosen(kept: Mapping[str, Tensor], groups: Sequence[Group]) -> list[tuple[Group, Tensor]]:
    """The groups that are named, and what stays of each."""
    if unknown := [layer for layer in kept if layer not in {group.layer for group in groups}]:
        names = ", ".join(group.layer for group in groups)
        raise ValueError(f"channels of {unknown[0]} cannot be removed; those of {names} can")
    return [(group, indices(kept[group.layer], group)) for group in groups if group.layer in kept]


def _below(tensors: Params, path: str, axes: int) -> Iterable[str]:
    """Names of the tensors that the module itself owns, with so many axes; a single number is of all channels."""
    own = (name for name in tensors if name.rpartition(".")[0] == path)
    return [name for name in own if tensors[name].dim() >= axes and tensors[name].numel() > 1]


def _spread(name: str, size: int, staying: Tensor, out: int, each: int) -> Tensor:
    """Positions along an axis of ``size``, of which each channel owns ``each`` side by side."""
    if size != out * each:
        raise ValueError(f"{name}: must have {out * each} entries along an axis, {each} for each channel, got {size}")
    return (staying[:, None] * each + torch.arange(each, device=staying.device)).flatten()


def _selected(tensor: Tensor, staying: Mapping[int, Tensor]) -> Tensor:
    for axis, positions in staying.items():
        tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor


def _zeroed(tensor: Tensor, staying: Mapping[int, Tensor]) -> Tensor:
    for axis, positions in staying.items():
        gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
        gone[positions] = False
        tensor = tensor.index_fill(axis, gone.nonzero().flatten().to(tensor.device), 0)
    return tensor


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, without those of its children."""
    return {name: t for name, t in [*module._parameters.items(), *module._buffers.items()] if t is not None}


def cut(model: nn.Module, kept: Mapping[str, Tensor], groups: Sequence[Group]) -> nn.Module:
    """A copy of the model with smaller tensors, and modules that know their sizes. Args, Raises: as :func:`sliced`."""
    made = copy.deepcopy(model)
    for path, module in made.named_modules():
        before = own_tensors(module)
        after = sliced({join(path, name): t.detach() for name, t in before.items()}, kept, groups)
        for name, old in before.items():
            new = after[join(path, name)]
            if new.shape == old.shape:
                continue
            if isinstance(old, nn.Parameter):
                module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
            else:
                module._buffers[name] = new
    for group, staying in _chosen(kept, groups):
        _tell(made.get_submodule(group.layer), _OUT, len(staying))
        for path in group.follows:
            _resize(made.get_submodule(path), group.out, len(staying))
        for path, each in group.next:
            _tell(made.get_submodule(path), _IN, len(staying) * each)
    return made


_OUT, _IN = ("out_features", "out_channels"), ("in_features", "in_channels")
_WIDTHS = ("num_features", "num_channels", "num_parameters")


def _tell(module: nn.Module, names: Sequence[str], value: Any) -> None:
    """Set the attribute that it has of these."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)


def _resize(follower: nn.Module, out: int, staying: int) -> None:
    if isinstance(follower, nn.LayerNorm):
        follower.normalized_shape = (follower.normalized_shape[0] // out * staying,)
        return
    width = next(int(getattr(follower, name)) for name in _WIDTHS if hasattr(follower, name))
    _tell(follower, _WIDTHS, width // out * staying)
