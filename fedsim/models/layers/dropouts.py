"""Dropout from keys, and its exchange for torch's own in models from outside."""

import math

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.layers.keyed import Keyed

SELU_FLOOR = -1.0507009873554805 * 1.6732632423543772  # -scale * alpha: what SELU makes of minus infinity


class _Masked(Keyed):
    """A layer that drops entries, or whole channels, with probability p in training, and else is the identity.

    Entry i of the mask uses draw i of ``self.key``, so rows added at the end of a batch change no other row.

    Args:
        p: probability of being dropped, in [0, 1).
        inplace: write the result into the input, as torch's layers do with ``inplace=True``.

    Raises:
        ValueError: p is outside [0, 1).
    """

    def __init__(self, p: float, *, inplace: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"p must be in [0, 1), got {p}")
        self.p, self.inplace = p, inplace

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with parts of it dropped; same shape and dtype."""
        if not self.training or self.p == 0.0:
            return x
        masked = x.shape[: self._axes(x)]
        kept = (rng.uniform(self.key, *masked) >= self.p).reshape(*masked, *[1] * (x.dim() - len(masked)))
        result = self._result(x, kept)
        return x.copy_(result) if self.inplace else result

    def _axes(self, x: Tensor) -> int:
        """How many leading axes the mask has; along the others it is constant."""
        return x.dim()

    def _result(self, x: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept, x / (1.0 - self.p), 0.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p}" + ", inplace=True" * self.inplace


class Dropout(_Masked):
    """Zero each entry with probability p in training, and scale the others: ``y = x * kept / (1 - p)``.

    Entry i of the flattened input uses draw i of ``self.key``, so rows added at the end of a batch change no other row.
    The identity in evaluation, and for p = 0.

    Args:
        p: probability of a zero, in [0, 1).
        inplace: write the result into the input.

    Raises:
        ValueError: p is outside [0, 1).

    Source: Srivastava et al. 2014, "Dropout", JMLR 15, section 4. Differs: scaled in training rather than in testing.
    """


class Dropout1d(_Masked):
    """Dropout of whole channels of (batch, channels, length) or (channels, length): ``y = x * kept / (1 - p)``.

    Args:
        p: probability of zeros, in [0, 1).
        inplace: write the result into the input.

    Raises:
        ValueError: p is outside [0, 1), or the input has another number of axes.

    Source: Tompson et al. 2015, "Efficient Object Localization Using Convolutional Networks", CVPR, SpatialDropout.
        Differs: as ``nn.Dropout1d`` does, scaled in training rather than in testing.
    """

    def _axes(self, x: Tensor) -> int:
        if x.dim() not in (2, 3):
            raise ValueError(f"Dropout1d needs an input of 2 or 3 axes, got shape {tuple(x.shape)}")
        return x.dim() - 1


class Dropout2d(_Masked):
    """Dropout of whole channels of (batch, channels, ...), the first two axes always: ``y = x * kept / (1 - p)``.

    An input of three axes is (batch, channels, length), as it is for ``nn.Dropout2d``.

    Args:
        p: probability of zeros, in [0, 1).
        inplace: write the result into the input.

    Raises:
        ValueError: p is outside [0, 1), or the input has fewer than two axes.

    Source: as :class:`Dropout1d`. Differs: as there.
    """

    def _axes(self, x: Tensor) -> int:
        return _two(x, self)


class Dropout3d(_Masked):
    """Dropout of whole channels of (batch, channels, depth, height, width): ``y = x * kept / (1 - p)``.

    An input of any other number of axes is (channels, ...), as it is for ``nn.Dropout3d``.

    Args:
        p: probability of zeros, in [0, 1).
        inplace: write the result into the input.

    Raises:
        ValueError: p is outside [0, 1).

    Source: as :class:`Dropout1d`. Differs: as there.
    """

    def _axes(self, x: Tensor) -> int:
        return 2 if x.dim() == 5 else 1


class AlphaDropout(_Masked):
    """Dropout that keeps mean 0 and variance 1: ``y = a * (x * kept + floor * (1 - kept) - p * floor)``.

    ``floor = -1.758...`` is where SELU ends, and ``a = ((1 - p) * (1 + p * floor^2))^(-1/2)``.

    Args:
        p: probability of the floor, in [0, 1).
        inplace: has no effect, as it has none in torch.

    Raises:
        ValueError: p is outside [0, 1).

    Source: Klambauer et al. 2017, "Self-Normalizing Neural Networks", NeurIPS, "New Dropout Technique".
        Differs: none.
    """

    def __init__(self, p: float, *, inplace: bool = False) -> None:
        super().__init__(p)

    def _result(self, x: Tensor, kept: Tensor) -> Tensor:
        a = 1.0 / math.sqrt((1.0 - self.p) * (1.0 + self.p * SELU_FLOOR**2))
        shift = -a * self.p * SELU_FLOOR
        return torch.where(kept, a * x + shift, a * SELU_FLOOR + shift)


class FeatureAlphaDropout(AlphaDropout):
    """Alpha dropout of whole channels of (batch, channels, ...), the first two axes always.

    Args:
        p: probability of the floor, in [0, 1).
        inplace: has no effect, as it has none in torch.

    Raises:
        ValueError: p is outside [0, 1), or the input has fewer than two axes.

    Source: as :class:`AlphaDropout`, with the masks of :class:`Dropout1d`. Differs: like ``nn.FeatureAlphaDropout``,
        and other than its page says, an input without a batch axis is not told apart.
    """

    def _axes(self, x: Tensor) -> int:
        return _two(x, self)


def _two(x: Tensor, layer: nn.Module) -> int:
    if x.dim() < 2:
        raise ValueError(f"{type(layer).__name__} needs an input of 2 axes or more, got shape {tuple(x.shape)}")
    return 2


_TORCHS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_KEYED: dict[type[nn.Module], type[_Masked]] = dict(
    zip(_TORCHS, (Dropout, Dropout1d, Dropout2d, Dropout3d, AlphaDropout, FeatureAlphaDropout), strict=True)
)


def replace_dropout(model: nn.Module) -> tuple[str, ...]:
    """Put a keyed layer in the place of every dropout layer of torch inside ``model``, which is changed.

    One layer under several names becomes several, which draw independently. A subclass of somebody's stays, since
    its forward pass may be another; so do other layers that draw: see :func:`unkeyed`.

    Returns:
        Paths of the layers replaced, in the order of ``named_modules``.

    Raises:
        ValueError: ``model`` itself is a dropout layer, or the p of one is 1.
    """
    found = [(path, m) for path, m in model.named_modules(remove_duplicate=False) if type(m) in _KEYED]
    for path, old in found:
        if not path:
            raise ValueError(f"model must contain its dropout layers, got a bare nn.{type(old).__name__}")
        parent, _, name = path.rpartition(".")
        new = _KEYED[type(old)](old.p, inplace=old.inplace)
        setattr(model.get_submodule(parent), name, new.train(old.training))
    return tuple(path for path, _ in found)


def unkeyed(model: nn.Module) -> tuple[str, ...]:
    """Torch's layers in ``model`` that draw from the global generator, each as "path (class)"."""
    return tuple(f"{path} ({type(m).__name__})" for path, m in model.named_modules() if _draws(m))


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, _TORCHS):
        return module.p > 0
    return isinstance(module, nn.RReLU)
