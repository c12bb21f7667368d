"""Arithmetic on parameter dicts. Every function is pure and refuses dicts whose names, shapes or dtypes differ."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedsim.records import Params


def check_alike(a: Params, b: Params) -> None:
    """Same names, and for each the same shape and dtype.

    Raises:
        ValueError: names the first difference.
    """
    if a.keys() != b.keys():
        raise ValueError(f"parameter names differ: {sorted(a.keys() ^ b.keys())}")
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise ValueError(f"{name}: shapes differ: {tuple(tensor.shape)} and {tuple(b[name].shape)}")
        if tensor.dtype != b[name].dtype:
            raise ValueError(f"{name}: dtypes differ: {tensor.dtype} and {b[name].dtype}")


def of(module: nn.Module) -> tuple[Params, Params]:
    """Copies of a module's parameters, and of all else that makes up its state.

    Frozen parameters (``requires_grad`` False) count as buffers: they are sent, and never trained. The keys of
    stochastic layers are non-persistent buffers and no part of the state.
    """
    persistent = module.state_dict().keys()
    trainable = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    buffers = {name: b.detach().clone() for name, b in module.named_buffers() if name in persistent}
    return trainable, {**frozen, **buffers}


def add(a: Params, b: Params) -> Params:
    """``a + b``."""
    check_alike(a, b)
    return {name: a[name] + b[name] for name in a}


def sub(a: Params, b: Params) -> Params:
    """``a - b``."""
    check_alike(a, b)
    return {name: a[name] - b[name] for name in a}


def scale(a: Params, factor: float) -> Params:
    """``factor * a``."""
    return {name: tensor * factor for name, tensor in a.items()}


def add_scaled(a: Params, b: Params, factor: float) -> Params:
    """``a + factor * b``."""
    check_alike(a, b)
    return {name: torch.add(a[name], b[name], alpha=factor) for name in a}


def zeros_like(a: Params) -> Params:
    """A zero for each tensor."""
    return {name: torch.zeros_like(tensor) for name, tensor in a.items()}


def masked(a: Params, kept: Mapping[str, Tensor]) -> Params:
    """``a`` with exactly 0 wherever ``kept`` (bool, broadcast to the tensor's shape) is false; others as they are."""
    return {name: torch.where(kept[name], tensor, 0.0) if name in kept else tensor for name, tensor in a.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Sum of products over all entries: float64 tensor ()."""
    check_alike(a, b)
    return sum((torch.sum(a[n].double() * b[n].double()) for n in a), start=torch.zeros((), dtype=torch.float64))


def l2_norm(a: Params) -> Tensor:
    """Euclidean norm of all entries taken as one vector: float64 tensor ()."""
    return torch.sqrt(dot(a, a))


def num_entries(a: Params) -> int:
    """How many numbers the dict holds."""
    return sum(tensor.numel() for tensor in a.values())


def all_finite(a: Params) -> bool:
    """True if no entry is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in a.values())


def flatten(a: Params) -> Tensor:
    """One vector (num_entries,) in the dict's order. All tensors need one dtype.

    Raises:
        ValueError: dtypes differ, or the dict is empty.
    """
    if len({tensor.dtype for tensor in a.values()}) != 1:
        raise ValueError(f"flatten needs exactly one dtype, got {sorted({str(t.dtype) for t in a.values()})}")
    return torch.cat([tensor.reshape(-1) for tensor in a.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of :func:`flatten`: views into ``vector`` with the names and shapes of ``like``.

    Raises:
        ValueError: the vector has another length.
    """
    if vector.shape != (num_entries(like),):
        raise ValueError(f"vector must have shape ({num_entries(like)},), got {tuple(vector.shape)}")
    parts = torch.split(vector, [tensor.numel() for tensor in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def stack(many: Sequence[Params]) -> Params:
    """Tensors with a leading axis over ``many``: (len(many), *shape).

    Raises:
        ValueError: nothing to stack, or the dicts are not alike.
    """
    if not many:
        raise ValueError("stack needs at least one dict")
    for other in many[1:]:
        check_alike(many[0], other)
    return {name: torch.stack([one[name] for one in many]) for name in many[0]}


def lanes(stacked: Mapping[str, Tensor], which: int | slice | list[int]) -> Params:
    """Part of a stack: ``tensor[which]`` of each. One lane or a slice of them are views, a list of them is copied."""
    return {name: tensor[which] for name, tensor in stacked.items()}


def as_stack(one: Params) -> Params:
    """A stack (1, *shape) of one (views)."""
    return {name: tensor[None] for name, tensor in one.items()}


def weighted_mean(stacked: Params, weights: Tensor) -> Params:
    """``sum_k w_k x_k / sum_k w_k`` over the leading axis.

    Args:
        stacked: floating-point tensors (clients, *shape).
        weights: (clients,), >= 0, sum > 0.

    Returns:
        Tensors (*shape), same dtypes.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0; not one weight each; integers.
    """
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()) or float(weights.sum()) <= 0:
        raise ValueError(f"weights must be finite and >= 0 with a positive sum, got {weights.tolist()}")
    for name, tensor in stacked.items():
        if tensor.shape[:1] != weights.shape:
            raise ValueError(f"{name}: needs one entry for each of {len(weights)} weights, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: a mean needs floating-point tensors, got {tensor.dtype}")
    share = weights.double() / weights.double().sum()
    return {name: torch.tensordot(share.to(t.dtype), t, dims=1) for name, t in stacked.items()}


def to(a: Params, device: torch.device) -> Params:
    """The tensors on a device; those that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in a.items()}


def separate(tensor: Tensor) -> Tensor:
    """A contiguous copy. safetensors refuses tensors that share memory, which pure functions may well return."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def same_bits(a: Params, b: Params) -> bool:
    """True if the dicts are alike and every tensor is bit-equal (NaN equals NaN)."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(_raw(a[n]), _raw(b[n])) for n in a
    )


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_zeros(0)
