"""The model that parameters belong to, once channels have been removed: their shapes say which one it is."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.params import of
from fedsim.pruning import channels
from fedsim.records import Params


def fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Whether these parameters and buffers have the model's shapes; those that it does not have count for nothing."""
    own = model.state_dict(keep_vars=True)
    return all(own[name].shape == tensor.shape for name, tensor in tensors.items() if name in own)


def fitted(model: nn.Module, tensors: Mapping[str, Tensor], input_shape: tuple[int, ...]) -> nn.Module:
    """The model itself, or a copy with as few channels as the tensors have; of its own numbers the first ones.

    Args:
        model: as it was built.
        tensors: parameters, at least those of layers that lost channels.
        input_shape: of one example.

    Raises:
        ValueError: the shapes are those of no smaller copy of this model.
    """
    if fits(model, tensors):
        return model
    kept = {}
    for group in channels.groups(model, input_shape):
        weight = tensors.get(f"{group.layer}.weight")
        if weight is not None and len(weight) < group.out:
            kept[group.layer] = torch.arange(len(weight))
    smaller = channels.shrunk(model, kept, input_shape)
    if not fits(smaller, tensors):
        own = smaller.state_dict(keep_vars=True)
        name = next(n for n, t in tensors.items() if n in own and own[n].shape != t.shape)
        raise ValueError(f"{name}: shape {tuple(tensors[name].shape)} fits neither the model nor a smaller copy of it")
    return smaller


def redrawn(model: nn.Module, key: int) -> tuple[Params, Params]:
    """First parameters and buffers of a model of this shape: what each layer's ``reset_parameters`` draws by the key.

    Raises:
        ValueError: a layer with parameters has no such method; names it.
    """
    found = copy.deepcopy(model)
    with rng.torch_seeded(key):
        for path, module in found.named_modules():
            if not list(module.parameters(recurse=False)):
                continue
            reset = getattr(module, "reset_parameters", None)
            if reset is None:
                raise ValueError(f"{path} is a {type(module).__name__}, which has no reset_parameters to draw anew by")
            reset()
    return of(found)
