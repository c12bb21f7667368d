"""From an ``nn.Module`` to the layers of a chain, or the finding that it is none."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedsim.models.layers import dropouts
from fedsim.models.layers.attaching import attached, only_attached
from fedsim.models.places import join
from fedsim.training.chain_layers import Dropout, Flatten, Layer, Linear, ReLU, Tanh, suits_onednn
from fedsim.training.chain_maps import AvgPool, Conv, GreyConv, GroupNorm, MaxPool, Pair, Window

_FRESH = (Linear, Conv, GreyConv, GroupNorm, MaxPool, AvgPool, Dropout)  # they return a new tensor and do not keep it


def layers_of(model: nn.Module) -> tuple[Layer, ...] | None:
    """The layers that do in training what ``model`` does, or None if it is not a chain.

    A chain is a nest of ``nn.Sequential`` of the layers that ``fedsim.training.chain_layers`` and ``chain_maps`` have,
    from examples to rows of logits. All are plain: no subclass, patched method, or hook but that of a layer
    attached behind another. All parameters are trained, on the CPU, in one dtype of float32 and float64; none is
    shared, and there is nothing to remember.
    """
    leaves = list(_leaves("", model))
    if not (all(_is_plain(module) for module in model.modules()) and _holds_nothing_else(model, leaves)):
        return None
    layers: list[Layer] = []
    for path, module in leaves:
        make = _MAKERS.get(type(module))
        found = make(path, module, not any(map(has_parameters, layers))) if make else None
        if found is None:
            return None
        layers += found
    return _with_owners(_reordered(layers)) if _ends_in_rows(layers) else None


def has_parameters(layer: Layer) -> bool:
    """Whether there is anything to train in it."""
    return isinstance(layer, Linear | Conv | GreyConv | GroupNorm)


def takes_one_client(layer: Layer) -> bool:
    """Whether it cannot take a stack of several clients."""
    return _on_maps(layer) or (isinstance(layer, Linear) and layer.large)


def _on_maps(layer: Layer) -> bool:
    return isinstance(layer, Conv | GreyConv | GroupNorm | MaxPool | AvgPool)


def _leaves(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each layer, in the order of the calls; the same module twice if it is called twice."""
    if type(module) is not nn.Sequential:
        yield path, module
        for name in attached(module):
            yield from _leaves(join(path, name), module.get_submodule(name))
        return
    for name, child in module._modules.items():
        assert child is not None  # Sequential would fail on it
        yield from _leaves(join(path, name), child)


def _is_plain(module: nn.Module) -> bool:
    return "forward" not in vars(module) and only_attached(module)


def _holds_nothing_else(model: nn.Module, leaves: Sequence[tuple[str, nn.Module]]) -> bool:
    """Whether parameters and buffers are those that the layers below know, each used once, and all are trained."""
    parameters = dict(model.named_parameters())
    known = [
        join(path, name) for path, m in leaves for name in ("weight", "bias") if getattr(m, name, None) is not None
    ]
    keys = [join(path, "key") for path, module in leaves if isinstance(module, dropouts.Dropout)]
    kinds = {(p.dtype, p.device.type, p.requires_grad) for p in parameters.values()}
    allowed = ({(dtype, "cpu", True)} for dtype in (torch.float32, torch.float64))
    return known == list(parameters) and keys == [n for n, _ in model.named_buffers()] and kinds in allowed


def _ends_in_rows(layers: Sequence[Layer]) -> bool:
    """Whether logits come out as (batch, classes), or in rows of any number of axes if the examples came so.

    What one example is, as far as the layers tell: anything, feature maps, a flat vector, or rows (axes, features).
    """
    shape = "anything"
    for layer in layers:
        match layer, shape:
            case Linear(), "maps":
                return False
            case Linear(), "anything":
                shape = "rows"
            case Flatten(), "rows":
                return False
            case Flatten(), _:
                shape = "flat"
            case _ if _on_maps(layer):
                if shape in ("rows", "flat"):
                    return False
                shape = "maps"
    return shape in ("rows", "flat")


def _reordered(layers: Sequence[Layer]) -> list[Layer]:
    """The same function in less time: flattening before what works on single entries, and max pools before ReLU.

    Flattening first, entries lie in order of memory for all that follows. Of a window, ReLU changes neither which entry
    is the largest, if that is positive, nor that it contributes nothing, if not.
    """
    order = list(layers)
    for end in range(len(order), 1, -1):
        for i in range(end - 1):
            before, after = order[i], order[i + 1]
            entrywise = isinstance(before, ReLU | Tanh | Dropout) and isinstance(after, Flatten)
            if entrywise or (isinstance(before, ReLU) and isinstance(after, MaxPool)):
                order[i : i + 2] = [after, before]
    return order


def _with_owners(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """ReLU may write into what it gets if that is a new tensor which the layer that made it does not keep."""
    owned, done = False, []
    for layer in layers:
        done.append(replace(layer, owns_input=owned) if isinstance(layer, ReLU) else layer)
        owned = isinstance(layer, _FRESH) or (owned and isinstance(layer, Flatten | ReLU))
    return tuple(done)


def _linear(path: str, module: Any, first: bool) -> Iterable[Layer]:
    weight, bias = join(path, "weight"), _bias(path, module)
    return (Linear(weight, bias, input_slope=not first, large=suits_onednn(module.weight)),)


def _conv(path: str, module: Any, first: bool) -> Iterable[Layer] | None:
    window, weight, bias = _window(module), join(path, "weight"), _bias(path, module)
    if window is None or module.padding_mode != "zeros":
        return None
    if first and module.in_channels == 1:
        return (GreyConv(weight, bias, window),)
    return (Conv(weight, bias, window, module.groups, input_slope=not first),)


def _window(module: Any) -> Window | None:
    """None for padding that differs between two opposite sides."""
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(getattr(module, "dilation", 1))
    if module.padding == "valid":
        return Window(kernel, stride, (0, 0), dilation)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return None if any(t % 2 for t in total) else Window(kernel, stride, (total[0] // 2, total[1] // 2), dilation)
    return Window(kernel, stride, _pair(module.padding), dilation)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _max_pool(path: str, module: Any, first: bool) -> Iterable[Layer] | None:
    window = _window(module)
    if window is None or window.dilation != (1, 1) or module.ceil_mode or module.return_indices:
        return None
    return (MaxPool(window),)


def _avg_pool(path: str, module: Any, first: bool) -> Iterable[Layer] | None:
    window = _window(module)
    if window is None or module.ceil_mode:
        return None
    return (AvgPool(window, module.count_include_pad, module.divisor_override),)


def _group_norm(path: str, module: Any, first: bool) -> Iterable[Layer] | None:
    weight, bias = join(path, "weight"), _bias(path, module)
    if module.weight is None or bias is None:
        return None
    return (GroupNorm(weight, bias, module.num_groups, module.eps, input_slope=not first),)


def _bias(path: str, module: Any) -> str | None:
    return None if module.bias is None else join(path, "bias")


_MAKERS: dict[type[nn.Module], Callable[[str, Any, bool], Iterable[Layer] | None]] = {
    nn.Identity: lambda path, module, first: (),
    nn.ReLU: lambda path, module, first: (ReLU(),),
    nn.Tanh: lambda path, module, first: (Tanh(),),
    nn.Flatten: lambda path, module, first: (Flatten(),) if (module.start_dim, module.end_dim) == (1, -1) else None,
    dropouts.Dropout: lambda path, module, first: (Dropout(join(path, "key"), module.p),) if module.p else (),
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.Conv2d: _conv,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
}
