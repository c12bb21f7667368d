"""Penalties on parameters, as regularisers."""

from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.training import penalties
from fedsim.training.objective import Objective, Penalty
from fedsim.training.regularizers.regularizer import Regularizer, Strength, penalise, unbound


def l1(*, strength: Strength = 1e-5) -> Regularizer:
    """Lasso: ``strength * sum |w|`` over weights drives entries towards zero.

    Args:
        strength: >= 0, in nats per unit of weight.

    Source: Tibshirani 1996. Differs: by gradient steps, which leave small values where a proximal step makes zeros.
    """
    return _penalty(partial(penalties.l1, strength=strength), strength)


def l2(*, strength: Strength = 1e-4) -> Regularizer:
    """Ridge: ``strength / 2 * sum w^2`` over weights.

    With plain SGD this is ``weight_decay`` of the optimizer, but for biases and scales, which it leaves alone.

    Args:
        strength: >= 0.

    Source: Hoerl, Kennard 1970. Differs: none.
    """
    return _penalty(partial(penalties.l2, strength=strength), strength)


def group_lasso(*, strength: Strength = 1e-4) -> Regularizer:
    """Group lasso over filters and rows: ``strength * sum_g sqrt(|g|) ||w_g||`` drives whole channels towards zero.

    Args:
        strength: >= 0.

    Source: Yuan, Lin 2006, eq. 2.1 with identity kernels; filters as groups: Wen et al. 2016. Differs: as for l1.
    """
    return _penalty(partial(penalties.group_lasso, strength=strength), strength)


def orthogonal(*, strength: Strength = 1e-4) -> Regularizer:
    """Soft orthogonality: ``strength * sum ||W W^T - I||_F^2`` over weights, filters flattened to rows.

    Args:
        strength: >= 0.

    Source: Bansal et al. 2018, eq. 1. Differs: the smaller of the two Gram matrices, which can reach the identity.
    """
    return _penalty(partial(penalties.orthogonal, strength=strength), strength)


def spectral(*, strength: Strength = 1e-3) -> Regularizer:
    """Spectral norm: ``strength / 2 * sum sigma_max(W)^2`` over weights, filters flattened to rows.

    Args:
        strength: >= 0.

    Source: Yoshida, Miyato 2017, eq. 4. Differs: ten power iterations from a fixed vector at each step, where theirs
        does one and goes on from the last step's vector: nothing is remembered between steps.
    """
    return _penalty(partial(penalties.spectral, strength=strength), strength)


def bn_slimming(*, strength: Strength = 1e-4) -> Regularizer:
    """Network slimming: ``strength * sum |gamma|`` over the scales of batch norm drives channels towards zero.

    Args:
        strength: >= 0.

    Raises:
        ValueError: when bound, if the model has no batch norm with scales.

    Source: Liu et al. 2017, eq. 1. Differs: none.
    """
    return Regularizer("penalties", partial(_bind_slimming, strength))


def proximal(*, mu: Strength = 0.01) -> Regularizer:
    """FedProx: ``mu / 2 * ||w - w_global||^2`` over all parameters keeps a client near the model it was sent.

    Args:
        mu: >= 0; 0 is FedAvg.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2. Differs: none.
    """
    return _penalty(partial(penalties.proximal, mu=mu), mu)


def _penalty(penalty: Penalty, strength: float) -> Regularizer:
    """Of strength 0 it is left out, so that the plain model is trained bit for bit."""
    return Regularizer("penalties", partial(_bind_penalty, penalty) if strength else unbound)


def _bind_penalty(penalty: Penalty, model: nn.Module, objective: Objective) -> Objective:
    return penalise(objective, penalty)


def _bind_slimming(strength: float, model: nn.Module, objective: Objective) -> Objective:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = [path for path, module in model.named_modules() if isinstance(module, _BatchNorm)]
    names = tuple(f"{path}.weight" for path in norms if f"{path}.weight" in trained)
    if not names:
        raise ValueError("needs batch norm; cnn, conv-2, conv-4, conv-6 and resnet have it with norm: batch")
    slimming = partial(penalties.slimming, names=names, strength=strength)
    return penalise(objective, slimming) if strength else objective
