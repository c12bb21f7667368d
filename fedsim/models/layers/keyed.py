"""How a layer that draws random numbers gets its key: in a buffer, from outside, for each step.

A stochastic layer is a ``Keyed`` module: it holds an int64 buffer ``key`` of shape () and draws from it with
``fedsim.rng``. The buffer is not persistent, so it is in no state dict and never travels. Training puts a fresh key
into every such layer for one forward pass::

    names = key_names(model)
    keys = step_keys(names, step_key)
    functional_call(model, {**params, **buffers, **keys}, (inputs,))

Nothing changes in the module, so the same call gives the same draws, under ``torch.func.vmap`` too.
In a plain ``model(inputs)`` in training mode the layer uses the key its buffer holds: 0, the same draws each time.

A layer whose strength grows in the course of a federation is ``Ramped``: training also tells it how far the federation
has come. Two class attributes tell engines and checks what they must know of a layer: ``mixes_examples``, that
what it makes of one example depends on the others of the batch; ``adds_axis``, that in training logits come out with
more axes, (batch, heads, classes).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedsim import rng


class Keyed(nn.Module):
    """A layer that draws from ``self.key``.

    Two draws in one forward pass need two keys, ``rng.fold_tensor(self.key, 0)`` and so on. For the same reason a
    keyed layer is called once in a forward pass: a second call would repeat the draws of the first.
    """

    key: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("key", rng.as_tensor(0), persistent=False)


class Ramped(Keyed):
    """A keyed layer that knows the federation's ``progress``, round / rounds in (0, 1]; 1 outside of training."""

    progress: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("progress", torch.ones(()), persistent=False)


def key_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the key buffers of all keyed layers, in the order of ``named_modules``; ``()`` if nothing draws."""
    modules = model.named_modules()
    return tuple(f"{path}.key" if path else "key" for path, module in modules if isinstance(module, Keyed))


def progress_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the progress buffers of all ramped layers, in the order of ``named_modules``."""
    return tuple(f"{path}.progress".lstrip(".") for path, m in model.named_modules() if isinstance(m, Ramped))


def mixes_examples(model: nn.Module) -> bool:
    """Whether a layer says of itself that it does."""
    return any(getattr(module, "mixes_examples", False) for module in model.modules())


def adds_axis(model: nn.Module) -> bool:
    """Whether logits have more axes in training."""
    return any(getattr(module, "adds_axis", False) for module in model.modules())


def step_keys(names: Sequence[str], step_key: int | Tensor) -> dict[str, Tensor]:
    """A key for each layer: ``fold(step_key, path)`` with the layer's path in the model.

    Args:
        names: from :func:`key_names`.
        step_key: key of this training step; an int, or an int64 tensor of shape () (it may be batched by
            ``torch.func.vmap``) or (clients,).

    Returns:
        Int64 tensors in the shape of ``step_key``, by name.

    >>> step_keys(("drop.key",), 5)["drop.key"].item() == rng.as_tensor(rng.fold(5, "drop")).item()
    True
    """
    parent = step_key if isinstance(step_key, Tensor) else rng.as_tensor(step_key)
    return {name: rng.fold_tensor(parent, name.rpartition(".")[0]) for name in names}
