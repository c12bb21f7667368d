"""Linear layers and convolutions whose weight is noisy in training: torch's own, with another class.

Two things can be changed about such a layer. ``noises`` make another weight of the weight, one after the other. One
``law`` says how that weight is applied to an input. The class is changed in place, so names of parameters, hooks and
children stay. Only layers of exactly torch's classes are changed: another class may use its weight otherwise.
"""

from typing import TypeGuard, cast

import torch.nn.functional as F
from torch import Tensor, nn


class Affine(nn.Module):
    """The law of a plain layer: ``y = W x + b`` with the noisy weight W.

    Other laws are subclasses. ``regularizer`` is the name by which an error calls a law.
    """

    regularizer = ""

    def forward(self, layer: "Stochastic", x: Tensor, weight: Tensor) -> Tensor:
        """The output of ``layer`` at ``x``, with ``weight`` in the place of its own."""
        return layer.affine(x, weight, layer.bias)


class StochasticLinear(nn.Linear):
    """``nn.Linear`` with noises and a law."""

    noises: nn.Sequential
    law: Affine

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., in) to (batch, ..., out)."""
        return cast(Tensor, self.law(self, x, self.noises(self.weight)))

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``W x + b`` with these."""
        return F.linear(x, weight, bias)


class StochasticConv2d(nn.Conv2d):
    """``nn.Conv2d`` with noises and a law."""

    noises: nn.Sequential
    law: Affine

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) to (batch, out, height', width')."""
        return cast(Tensor, self.law(self, x, self.noises(self.weight)))

    def affine(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of x with these, stride and padding its own."""
        return cast(Tensor, self._conv_forward(x, weight, bias))


Stochastic = StochasticLinear | StochasticConv2d
_PLAIN = (nn.Linear, nn.Conv2d)


def can_be_noisy(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether its class is exactly torch's linear layer or convolution, or the noisy one made of it."""
    return type(layer) in (*_PLAIN, StochasticLinear, StochasticConv2d)


def add_noise(layer: nn.Linear | nn.Conv2d, name: str, noise: nn.Module) -> None:
    """Let ``noise`` make another weight of ``layer``'s, behind the noises that are there.

    Args:
        layer: for which :func:`can_be_noisy`. Changed in place.
        name: of the noise among the layer's ``noises``.
        noise: (weight) -> weight of the same shape and dtype; the identity in evaluation.

    Raises:
        ValueError: there is a noise of that name.
    """
    noises = _made_noisy(layer).noises
    if name in noises._modules:
        raise ValueError(f"the model has {name} already, at a {type(layer).__name__}")
    noises.add_module(name, noise.train(layer.training))


def set_law(layer: nn.Linear | nn.Conv2d, law: Affine) -> None:
    """Let ``law`` say how the weight of ``layer`` is applied.

    Raises:
        ValueError: another law than the plain one does so.
    """
    noisy = _made_noisy(layer)
    if type(noisy.law) is not Affine:
        raise ValueError(
            f"{noisy.law.regularizer} and {law.regularizer} both say how a layer applies its weight; it takes one"
        )
    noisy.law = law.train(layer.training)


def _made_noisy(layer: nn.Linear | nn.Conv2d) -> Stochastic:
    if type(layer) in _PLAIN:
        layer.__class__ = StochasticLinear if isinstance(layer, nn.Linear) else StochasticConv2d
        layer.noises, layer.law = nn.Sequential().train(layer.training), Affine().train(layer.training)
    return cast(Stochastic, layer)
