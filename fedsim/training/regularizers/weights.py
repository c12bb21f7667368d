"""Regularisers that disturb the weights of linear layers and convolutions."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le
from torch import nn

from fedsim.models import places
from fedsim.models.layers.dropconnect import DropConnect
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.targeted import Kind, TargetedDropout
from fedsim.models.layers.variational import GaussianDropout, SparseDropout, first_log_sigma2
from fedsim.models.layers.weights import add_noise, can_be_noisy, set_law
from fedsim.models.places import Unit
from fedsim.training import variational
from fedsim.training.objective import Objective, Penalty
from fedsim.training.regularizers.regularizer import (
    AffineWhere,
    Rate,
    Regularizer,
    Strength,
    needed,
    penalise,
    unbound,
)

Affine = nn.Linear | nn.Conv2d
Share = Literal["auto", "layer", "unit", "weight"]
Probability = Annotated[float, Ge(0), Le(1)]


def dropconnect(
    *,
    p: Rate = 0.5,
    masks: Literal["batch", "example"] = "batch",
    inference: Literal["mean", "moments"] = "mean",
) -> Regularizer:
    """DropConnect: ``y = (W * kept / (1 - p)) x + b`` in hidden linear layers, weights dropped with probability p.

    Args:
        p: probability of a dropped weight, in [0, 1).
        masks: one for each ``batch``, or for each ``example``, which takes batch * out * in numbers of memory a layer.
        inference: what evaluation does: ``mean`` is ``W x + b``; ``moments`` is the mean of ``relu(u)`` for
            ``u ~ N(W x + b, p / (1 - p) (W * W)(x * x))``.

    Raises:
        ValueError: when bound: the model has no hidden linear layer, or one is without an ``nn.ReLU`` right behind
            it (for ``moments``), or its weight is applied in another way already (for ``moments`` and ``example``).

    Source: Wan et al. 2013, "Regularization of Neural Networks using DropConnect", sections 3.1 and 3.2. Differs:
        scaled in training rather than in testing; biases are not masked; one mask for a batch by default, where the
        paper has one for each example; moments in closed form, where the paper draws.
    """
    return Regularizer("weights", partial(_bind_dropconnect, p, masks, inference) if p else unbound)


def targeted_dropout(
    *,
    kind: Kind = "weight",
    target: Probability = 0.5,
    drop: Probability = 0.5,
    ramp: bool = True,
    where: AffineWhere = "all",
) -> Regularizer:
    """Targeted dropout: a share ``target`` of lowest magnitude, each dropped with probability ``drop``.

    Args:
        kind: of each unit (filter) the ``weight``s of lowest magnitude; or the ``unit``s whose weights have the lowest
            norm. A dropped unit keeps its bias.
        target: share of candidates, in [0, 1], rounded down to whole ones.
        drop: probability with which a candidate is dropped, in [0, 1].
        ramp: raise both from 0 in the course of the federation: ``drop`` linearly, and ``target`` to 95 % in its first
            half and to all of it in the second.
        where: ``hidden`` linear layers, ``convolutions``, or ``all``.

    Raises:
        ValueError: when bound, if the model has no such layer.

    Source: Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout", arXiv:1905.13678. Differs: ramped by
        rounds, not steps; a unit is dropped as a whole, where the authors' code drops its weights one by one; the first
        layer takes part. Pruning is not part of it.
    """
    make = partial(TargetedDropout, kind, target, drop, ramped=ramp)
    return Regularizer("weights", partial(_bind_targeted, make, where) if target and drop else unbound)


def variational_dropout(
    *,
    kind: Literal["gaussian", "sparse"] = "gaussian",
    p: Rate = 0.2,
    share: Share = "auto",
    strength: Strength = 0.01,
    where: AffineWhere = "hidden",
) -> Regularizer:
    """Variational dropout: ``w ~ N(theta, alpha theta^2)`` with learned alpha, and ``strength / n * KL`` in the loss.

    Args:
        kind: ``gaussian``, alpha at most 1; or ``sparse``, any alpha, where evaluation leaves out weights of
            ``log alpha >= 3``.
        p: rate of the dropout with the noise that training starts from, ``alpha = p / (1 - p)``; in [0, 1), and at
            most 0.5 if gaussian. 0 is the plain model.
        share: one alpha for each ``layer``, ``unit`` or ``weight``; ``auto`` is by layer if gaussian. Sparse has one
            for each weight.
        strength: factor on the divergence, >= 0; 1 is the evidence lower bound of a client with n examples. A client
            has few: sparse at 1, and SGD of lr 0.1, learned nothing from twenty clients' digits, 70 each.
        where: ``hidden`` linear layers, ``convolutions``, or ``all``.

    Raises:
        ValueError: p above 0.5 if gaussian, or another share than by weight if sparse. When bound: the model has no
            such layer that is trained, or its weight is applied in another way already.

    Source: Kingma, Salimans, Welling 2015, "Variational Dropout and the Local Reparameterization Trick", section 3
        (gaussian); Molchanov, Ashukha, Vetrov 2017, "Variational Dropout Sparsifies Deep Neural Networks", section 4
        (sparse). Differs: n is the client's; the divergence counts for a hundredth by default; sparse starts from one
        alpha, where theirs starts from one variance.
    """
    if kind == "gaussian" and p > 0.5:
        raise ValueError(f"p must be at most 0.5 with kind: gaussian, where alpha = p / (1 - p) is at most 1, got {p}")
    if kind == "sparse" and share not in ("auto", "weight"):
        raise ValueError(f"share must be weight with kind: sparse, got {share!r}")
    gaussian, alpha = kind == "gaussian", p / (1.0 - p)
    put = partial(_put_gaussian, alpha, share) if gaussian else partial(_put_sparse, alpha)
    divergence = variational.gaussian if gaussian else variational.sparse
    penalty = partial(divergence, strength=strength) if strength else None
    return Regularizer("weights", partial(_bind_variational, put, penalty, where) if p else unbound)


def affine_units(model: nn.Module, where: AffineWhere, condition: str = "") -> list[Unit]:
    """The hidden linear layers, convolutions, or all of these, of exactly torch's classes.

    Raises:
        ValueError: there is none. ``condition`` is added to what is needed.
    """
    found = places.convolutions(model) if where in ("convolutions", "all") else []
    found += places.hidden(model) if where in ("hidden", "all") else []
    units = [unit for unit in found if can_be_noisy(model.get_submodule(unit.layer))]
    if not units:
        raise needed(where, condition)
    return units


def affine_layer(model: nn.Module, unit: Unit) -> Affine:
    """The layer of a unit from :func:`affine_units`."""
    layer = model.get_submodule(unit.layer)
    assert can_be_noisy(layer)
    return layer


def _bind_dropconnect(p: float, masks: str, inference: str, model: nn.Module, objective: Objective) -> Objective:
    units, moments = affine_units(model, "hidden"), inference == "moments"
    if moments and (without := [unit.layer for unit in units if not _has_relu(model, unit)]):
        raise ValueError(f"inference: moments needs an nn.ReLU right behind each hidden layer, {without[0]} has none")
    for unit in units:
        layer = affine_layer(model, unit)
        if masks == "batch":
            add_noise(layer, "dropconnect", Dropout(p))
        if masks == "example" or moments:
            set_law(layer, DropConnect(p, per_example=masks == "example", moments=moments))
    return objective


def _has_relu(model: nn.Module, unit: Unit) -> bool:
    """Whether nothing but an ``nn.ReLU`` works on what the layer returns."""
    if unit.activation is None or type(model.get_submodule(unit.activation)) is not nn.ReLU:
        return False
    above, _, first = unit.layer.rpartition(".")
    children = model.get_submodule(above)._modules
    names = [*children]
    between = names[names.index(first) + 1 : names.index(unit.activation.rpartition(".")[2])]
    return all(type(children[name]) is nn.Identity for name in between)


def _bind_targeted(
    make: "partial[TargetedDropout]", where: AffineWhere, model: nn.Module, objective: Objective
) -> Objective:
    for unit in affine_units(model, where):
        add_noise(affine_layer(model, unit), "targeted_dropout", make())
    return objective


def _bind_variational(
    put: Callable[[Affine], None], penalty: Penalty | None, where: AffineWhere, model: nn.Module, objective: Objective
) -> Objective:
    for layer in _trained(model, where):
        put(layer)
    return penalise(objective, penalty) if penalty else objective


def _put_gaussian(alpha: float, share: Share, layer: Affine) -> None:
    sizes = {"unit": (len(layer.weight),), "weight": (layer.weight.numel(),)}
    set_law(layer, GaussianDropout())
    values = torch.full(sizes.get(share, ()), alpha, dtype=torch.float64).log()
    layer.register_parameter("log_alpha", nn.Parameter(values.to(layer.weight)))


def _put_sparse(alpha: float, layer: Affine) -> None:
    set_law(layer, SparseDropout())
    layer.register_parameter("log_sigma2", nn.Parameter(first_log_sigma2(layer.weight.detach(), alpha)))


def _trained(model: nn.Module, where: AffineWhere) -> list[Affine]:
    layers = [affine_layer(model, unit) for unit in affine_units(model, where, " that are trained")]
    trained = [layer for layer in layers if layer.weight.requires_grad]
    if not trained:
        raise needed(where, " that are trained")
    return trained
