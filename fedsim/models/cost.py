"""What a model costs for one example: parameters, and multiply-accumulates of its layers, found in one forward pass."""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from fedsim import rng

ELSEWHERE = "(code)"  # path of the line for products that no layer makes


@dataclass(frozen=True)
class LayerCost:
    """One module with parameters of its own.

    path: "" for the model itself. kind: name of its class.
    weight_shape: of its ``weight``, or of its first parameter; () for :data:`ELSEWHERE`.
    parameters: entries of all its parameters, biases among them; those it shares count where they come first.
    nonzeros: of these, how many are not 0.
    macs: multiply-accumulates for one example. effective_macs: those with a weight that is not 0.
    """

    path: str
    kind: str
    weight_shape: tuple[int, ...]
    parameters: int
    nonzeros: int
    macs: int
    effective_macs: int


def costs(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> list[LayerCost]:
    """The cost of each module with parameters, for one example in evaluation mode, in the order of ``named_modules``.

    A layer with weight W takes ``entries(W) * positions`` multiply-accumulates: positions are the pixels of its output
    (of its input, if the convolution is transposed), time steps, or 1. Padding counts as any other pixel. Of LSTM, GRU
    and RNN all input and recurrent weights count at each step, and gates do not. Biases, norms, activations, pools and
    embeddings take none: they are no products of matrices. Such products in the model's own code, attention say, are
    one line at the end, :data:`ELSEWHERE`, all of them effective.

    Args:
        model: not changed. Heads that evaluation does not show cost parameters only.
        input_shape: of one example.
        dtype: of the input; None is int64 for models with an ``nn.Embedding``, and else that of the parameters.

    Raises:
        ValueError: the model cannot be called with such an input.
    """
    copied = copy.deepcopy(model).eval()
    positions: Counter[nn.Module] = Counter()
    for module in copied.modules():
        module.register_forward_hook(partial(_count, positions))
    flops = _flops(copied, example(copied, input_shape, 1, dtype))
    seen: set[int] = set()
    found = [
        _cost(path, module, positions[module], seen) for path, module in copied.named_modules() if module._parameters
    ]
    found = [one for one in found if one.weight_shape or one.parameters]
    more = flops // 2 - sum(one.macs for one in found)
    return [*found, LayerCost(ELSEWHERE, "products", (), 0, 0, more, more)] if more > 0 else found


def macs(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """Multiply-accumulates of all layers for one example; see :func:`costs`."""
    return sum(one.macs for one in costs(model, input_shape, dtype))


def effective_macs(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None = None) -> int:
    """Multiply-accumulates with a weight that is not 0, for one example; see :func:`costs`."""
    return sum(one.effective_macs for one in costs(model, input_shape, dtype))


def example(model: nn.Module, input_shape: tuple[int, ...], rows: int, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros (rows, *input_shape) that the model takes: tokens for one with an ``nn.Embedding``, else numbers."""
    if dtype is None and any(isinstance(module, nn.Embedding) for module in model.modules()):
        dtype = torch.int64
    first = next(iter(model.parameters()), torch.empty(0))
    return torch.zeros(rows, *input_shape, dtype=dtype or first.dtype, device=first.device)


def _count(positions: "Counter[nn.Module]", module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook: how often the weights of a layer are used for one example, added up over its calls."""
    if isinstance(module, nn.Linear):
        positions[module] += output.numel() // module.out_features
    elif isinstance(module, _ConvTransposeNd):
        positions[module] += args[0].numel() // module.in_channels
    elif isinstance(module, _ConvNd):
        positions[module] += output.numel() // module.out_channels
    elif isinstance(module, nn.RNNBase):
        positions[module] += args[0].numel() // module.input_size


def _cost(path: str, module: nn.Module, positions: int, seen: set[int]) -> LayerCost:
    own = {name: p for name, p in module._parameters.items() if p is not None}
    counted = [p for p in own.values() if id(p) not in seen]
    seen |= {id(p) for p in own.values()}
    weights = [p for name, p in own.items() if name.startswith("weight")] if positions else []
    first = own.get("weight", next(iter(own.values()), None))
    return LayerCost(
        path=path,
        kind=type(module).__name__,
        weight_shape=() if first is None else tuple(first.shape),
        parameters=sum(p.numel() for p in counted),
        nonzeros=sum(int(p.count_nonzero()) for p in counted),
        macs=positions * sum(p.numel() for p in weights),
        effective_macs=positions * sum(int(p.count_nonzero()) for p in weights),
    )


def _flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of the matrix products and convolutions in a forward pass."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment] # of oneDNN's LSTM the counter sees nothing
    try:
        with torch.no_grad(), rng.torch_seeded(0), FlopCounterMode(display=False) as counter:
            model(x)
    except Exception as error:
        got = f"an input {tuple(x.shape[1:])} of {x.dtype}"
        raise ValueError(f"the model cannot be called with {got}: {type(error).__name__}: {error}") from error
    finally:
        torch.backends.mkldnn.enabled = before
    return int(counter.get_total_flops())
