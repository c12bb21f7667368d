"""The layers of a chain: each knows its forward pass, its backward pass, and what of it the update needs.

Tensors between layers are stacked over clients, (clients, batch, ...), and so are parameters, (clients, *shape).

A backward pass may write into the slope it is given, since nobody else holds it. Whether a forward pass may write into
its input is decided where the chain is put together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.records import Params

Saved = tuple[Tensor, ...]
Keys = Mapping[str, Tensor]

_threshold_backward, _tanh_backward = torch.ops.aten.threshold_backward.grad_input, torch.ops.aten.tanh_backward.default
_onednn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # not in every build of torch
_ONEDNN_FROM = 2**18  # float32 weights; measured: oneDNN's product is faster than MKL's from about here, for any batch


class Sink(Protocol):
    """Takes the gradient of each parameter as soon as the backward pass has it."""

    def product(self, name: str, slope: Tensor, x: Tensor) -> None:
        """The gradient ``slope^T x`` of a matrix: slope (clients, batch, out), x (clients, batch, in)."""

    def add(self, name: str, gradient: Tensor) -> None:
        """A gradient (clients, *shape)."""

    def of_clients(self, some: slice) -> "Sink":
        """The sink for some of the clients."""


@dataclass(frozen=True)
class Collect:
    """Writes gradients into stacks (clients, *shape) that lie ready."""

    gradients: Params

    def product(self, name: str, slope: Tensor, x: Tensor) -> None:
        """See :class:`Sink`."""
        torch.bmm(slope.mT, x, out=self.gradients[name])

    def add(self, name: str, gradient: Tensor) -> None:
        """See :class:`Sink`."""
        self.gradients[name].copy_(gradient)

    def of_clients(self, some: slice) -> "Collect":
        """See :class:`Sink`."""
        return Collect(p.lanes(self.gradients, some))


@dataclass(frozen=True)
class Descend:
    """Steps down at once: ``w <- keep * w - lr * gradient``. So a layer is done with w when it brings the gradient."""

    local: Params
    lr: float
    keep: float

    def product(self, name: str, slope: Tensor, x: Tensor) -> None:
        """See :class:`Sink`. The gradient itself is never written down."""
        self.local[name].baddbmm_(slope.mT, x, beta=self.keep, alpha=-self.lr)

    def add(self, name: str, gradient: Tensor) -> None:
        """See :class:`Sink`."""
        weight = self.local[name]
        if self.keep != 1.0:
            weight.mul_(self.keep)
        weight.add_(gradient, alpha=-self.lr)

    def of_clients(self, some: slice) -> "Descend":
        """See :class:`Sink`."""
        return Descend(p.lanes(self.local, some), self.lr, self.keep)


class Layer(Protocol):
    """One step of a chain."""

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """The layer's output, and what its backward pass needs."""

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """Hands the parameters' gradients to ``sink``; returns the slope at the input, if anybody needs it."""


@dataclass(frozen=True)
class Linear:
    """``y = x w^T + b``.

    input_slope: whether a layer with parameters comes before.
    large: whether to take oneDNN's product, see :func:`suits_onednn`, which takes one client at a time.
    """

    weight: str
    bias: str | None
    input_slope: bool = True
    large: bool = False

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See :class:`Layer`. x: (clients, batch, in)."""
        weight, bias = local[self.weight], None if self.bias is None else local[self.bias]
        if self.large:
            return _onednn(x, weight[0], None if bias is None else bias[0]), (x,)
        if bias is None:
            return torch.bmm(x, weight.mT), (x,)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT), (x,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See :class:`Layer`."""
        below = slope
        if self.input_slope:
            weight = local[self.weight]
            below = _onednn(slope, weight[0].t(), None) if self.large else torch.bmm(slope, weight)
        sink.product(self.weight, slope, saved[0])
        if self.bias is not None:
            sink.add(self.bias, slope.sum(1))
        return below


def suits_onednn(weight: Tensor) -> bool:
    """Whether oneDNN's product with this matrix is the faster one. A build of torch may lack it."""
    return weight.numel() >= _ONEDNN_FROM and weight.dtype == torch.float32 and _onednn_linear is not None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias`` for one client: x (1, batch, in), weight (out, in)."""
    y: Tensor = _onednn_linear(x[0], weight, bias, "none", [], "")
    return y.unsqueeze(0)


@dataclass(frozen=True)
class ReLU:
    """``max(x, 0)``. ``owns_input``: nobody reads the input again, so the output takes its place."""

    owns_input: bool = False

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See :class:`Layer`."""
        y = x.relu_() if self.owns_input else x.relu()
        return y, (y,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See :class:`Layer`."""
        return _keep_above(slope, saved[0], 0, out=slope)


@dataclass(frozen=True)
class Tanh:
    """``tanh(x)``."""

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See :class:`Layer`."""
        y = x.tanh()
        return y, (y,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See :class:`Layer`."""
        below: Tensor = _tanh_backward(slope, saved[0])
        return below


@dataclass(frozen=True)
class Flatten:
    """All but the first two axes into one, in row-major order whatever the memory layout."""

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See :class:`Layer`."""
        return x.flatten(2), (x,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See :class:`Layer`. Goes back to the layout that the input had."""
        x = saved[0]
        slope = slope.view(x.shape)
        return slope if x.is_contiguous() else torch.empty_like(x).copy_(slope)


@dataclass(frozen=True)
class Dropout:
    """Fedsim's keyed dropout in training: the same draws, ``y = x * kept / (1 - p)``, 0 < p < 1."""

    key: str
    p: float

    def forward(self, x: Tensor, local: Params, keys: Keys) -> tuple[Tensor, Saved]:
        """See :class:`Layer`."""
        drawn = torch.empty_like(x).copy_(rng.uniforms(keys[self.key], x[0].numel()).view(x.shape))
        return self._apply(x, drawn, torch.empty_like(x)), (drawn,)

    def backward(self, slope: Tensor, saved: Saved, local: Params, sink: Sink) -> Tensor:
        """See :class:`Layer`."""
        return self._apply(slope, saved[0], slope)

    def _apply(self, x: Tensor, drawn: Tensor, out: Tensor) -> Tensor:
        return _keep_above(x, drawn, _last_dropped(self.p), out=out).div_(1.0 - self.p)


def _keep_above(x: Tensor, other: Tensor, limit: float, *, out: Tensor) -> Tensor:
    """``x`` where ``other > limit``, 0 elsewhere: one pass over memory, unlike a mask."""
    kept: Tensor = _threshold_backward(x, other, limit, grad_input=out)
    return kept


@lru_cache(maxsize=64)
def _last_dropped(p: float) -> float:
    """The largest draw that drops: draws are multiples of 2^-24, and the layer compares as float32, ``u >= p``."""
    return (math.ceil(float(torch.tensor(p, dtype=torch.float32)) * 2.0**24) - 1.0) * 2.0**-24
