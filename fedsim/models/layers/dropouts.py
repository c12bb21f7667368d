"""Dropout from keys, and its exchange for torch's own in models from outside."""

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.layers.keyed import Keyed

_TORCH_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Dropout(Keyed):
    """Zero each entry with probability p in training, and scale the others: ``y = x * kept / (1 - p)``.

    Entry i of the flattened input uses draw i of ``self.key``, so rows added at the end of a batch change no other row.
    The identity in evaluation, and for p = 0.

    Args:
        p: probability of a zero, in [0, 1).

    Raises:
        ValueError: p is outside [0, 1).

    Source: Srivastava et al. 2014, "Dropout", JMLR 15, section 4. Differs: scaled in training rather than in testing.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be in [0, 1), got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with entries dropped; same shape and dtype."""
        if not self.training or self.p == 0.0:
            return x
        kept = rng.uniform(self.key, *x.shape) >= self.p
        return torch.where(kept, x / (1.0 - self.p), 0.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p}"


def replace_dropout(model: nn.Module) -> tuple[str, ...]:
    """Put a keyed :class:`Dropout` in the place of every ``nn.Dropout`` inside ``model``, which is changed.

    One ``nn.Dropout`` under several names becomes several layers, which draw independently.
    Other layers that draw stay: see :func:`unkeyed`.

    Returns:
        Paths of the layers replaced, in the order of ``named_modules``.

    Raises:
        ValueError: ``model`` itself is an ``nn.Dropout``, or the p of one is 1.
    """
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Dropout]
    for path, old in found:
        if not path:
            raise ValueError("model must contain its dropout layers, got a bare nn.Dropout")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Dropout(old.p).train(old.training))
    return tuple(path for path, _ in found)


def unkeyed(model: nn.Module) -> tuple[str, ...]:
    """Torch's layers in ``model`` that draw from the global generator, each as "path (class)"."""
    return tuple(f"{path} ({type(m).__name__})" for path, m in model.named_modules() if _draws(m))


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, _TORCH_DROPOUTS):
        return module.p > 0
    return isinstance(module, nn.RReLU)
