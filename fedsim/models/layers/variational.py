"""Variational dropout as laws: a Gaussian over each weight, its noise drawn at the outputs.

A layer has one more parameter, ``log_alpha`` or ``log_sigma2``, which has one axis at most whatever it belongs to:
what is done to *weights* by penalties or pruning, which know them by their two axes or more, is not done to it.
"""

import math

import torch
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.keyed import Keyed
from fedsim.models.layers.weights import Affine, Stochastic

THRESHOLD = 3.0  # of log alpha, beyond which a weight is noise: p = 0.953
_FLOOR = 1e-8  # under roots and logarithms


class _LocalNoise(Affine, Keyed):
    """In training ``y ~ N(W x + b, V (x * x))``, V the variances of the weights; noise for each output, not weight.

    Output i, in row-major order with the batch first, uses draw i of ``self.key``.
    """

    regularizer = "variational-dropout"

    def forward(self, layer: Stochastic, x: Tensor, weight: Tensor) -> Tensor:
        """The output of ``layer`` at ``x``."""
        if not self.training:
            return layer.affine(x, self._mean(layer, weight), layer.bias)
        mean = layer.affine(x, weight, layer.bias)
        variance = layer.affine(x.square(), self._variances(layer, weight), None)
        return mean + torch.sqrt(variance + _FLOOR) * rng.noise(self.key, *mean.shape).to(mean.dtype)

    def _mean(self, layer: Stochastic, weight: Tensor) -> Tensor:
        """The weight in evaluation."""
        return weight

    def _variances(self, layer: Stochastic, weight: Tensor) -> Tensor:
        raise NotImplementedError


class GaussianDropout(_LocalNoise):
    """Noise of variance ``alpha w^2`` on each weight, with ``alpha <= 1`` from the layer's ``log_alpha``.

    Source: Kingma, Salimans, Welling 2015, "Variational Dropout and the Local Reparameterization Trick", eq. 6 and
        section 3.2. Differs: :func:`bounded` keeps alpha below 1, where their code has a sigmoid (unverified).
    """

    def _variances(self, layer: Stochastic, weight: Tensor) -> Tensor:
        return beside(bounded(_parameter(layer, "log_alpha")), weight).exp() * weight.square()


class SparseDropout(_LocalNoise):
    """Noise of variance ``sigma^2`` on each weight, from the layer's ``log_sigma2``; in evaluation only :func:`kept`.

    Trained is the variance and not alpha, its ratio to w^2: then the noise on a weight's gradient does not grow with
    alpha. The noise is the same where another regulariser has dropped the weight.

    Source: Molchanov, Ashukha, Vetrov 2017, "Variational Dropout Sparsifies Deep Neural Networks", section 4.2;
        zeros in evaluation: the authors' code. Differs: log alpha is not clipped to [-8, 8] as there.
    """

    def _mean(self, layer: Stochastic, weight: Tensor) -> Tensor:
        return torch.where(kept(layer.weight, _parameter(layer, "log_sigma2")), weight, 0.0)

    def _variances(self, layer: Stochastic, weight: Tensor) -> Tensor:
        return beside(_parameter(layer, "log_sigma2"), weight).exp()


def beside(values: Tensor, weight: Tensor) -> Tensor:
    """Values of a layer (), of its units (out,), or of its weights (entries,), in a shape that fits the weight's."""
    tail = weight.shape[1:] if values.numel() == weight.numel() else [1] * (weight.dim() - 1)
    return values.reshape(-1, *tail)


def bounded(log_alpha: Tensor) -> Tensor:
    """``min(log_alpha, 0)``, with the gradient 1 above 0 too, so that what is too large can come back."""
    return log_alpha - log_alpha.detach().clamp(min=0.0)


def log_alphas(weight: Tensor, log_sigma2: Tensor) -> Tensor:
    """``log sigma^2 - log w^2``, like ``weight``.

    Args:
        weight: (out, ...).
        log_sigma2: as many entries, any shape.
    """
    return log_sigma2.reshape(weight.shape) - torch.log(weight.square() + _FLOOR)


def first_log_sigma2(weight: Tensor, alpha: float) -> Tensor:
    """(entries,) with which all weights have this alpha, > 0: the inverse of :func:`log_alphas`."""
    return (torch.log(weight.square() + _FLOOR) + math.log(alpha)).flatten()


def kept(weight: Tensor, log_sigma2: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Bool tensor like ``weight``: true where log alpha is below the threshold, and the weight more than noise.

    Args:
        weight, log_sigma2: as for :func:`log_alphas`.
        threshold: of log alpha.
    """
    return log_alphas(weight, log_sigma2) < threshold


def _parameter(layer: Stochastic, name: str) -> Tensor:
    found = getattr(layer, name)
    assert isinstance(found, Tensor)
    return found
