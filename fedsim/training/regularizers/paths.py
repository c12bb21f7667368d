"""Regularisers that drop or shake whole branches: of residual blocks, and of fractal networks."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Le, MaxLen, MinLen
from torch import nn

from fedsim.models import places
from fedsim.models.fractal import fractals
from fedsim.models.layers.attaching import attach
from fedsim.models.layers.paths import DropPath, Level, Mode, PathDraws, Scaling, ShakeDrop, StochasticDepth
from fedsim.training.objective import Objective
from fedsim.training.regularizers.regularizer import Rate, Regularizer, unbound

Rule = Literal["linear", "uniform"]
Ends = Annotated[list[float], MinLen(2), MaxLen(2)]
Share = Annotated[float, Ge(0), Le(1)]


def stochastic_depth(
    *, p: Rate = 0.5, rule: Rule = "linear", mode: Mode = "batch", scaling: Scaling = "eval"
) -> Regularizer:
    """Stochastic depth: residual branches are dropped, ``relu(x' + b f(x))``, the later the likelier.

    Block l of L drops its branch with probability ``l / L * p``. In evaluation a branch is multiplied by
    ``1 - l / L * p``. With p = 0.5 about three quarters of the blocks are there, (3 L - 1) / 4 of them.

    Blocks that stride or widen take part like the others: their shortcut has no parameters, and passes on every second
    pixel, with channels of zeros. Branches are computed even where they are dropped, since clients that train side by
    side do not drop the same ones: this does not make training faster, and batch norms inside see every batch.

    Args:
        p: probability that the last block's branch is dropped, in [0, 1).
        rule: ``linear`` as above, or ``uniform``, p for every block.
        mode: ``batch``, one draw per block and step; ``row``, one per block and example.
        scaling: ``eval`` as above; ``inverted`` divides by the survival probability in training instead.

    Raises:
        ValueError: when bound, if the model has no residual blocks.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382, sections 3 and 4 (numbers
        unverified). Differs: nothing is skipped.
    """
    make = partial(StochasticDepth, mode=mode, scaling=scaling)
    return _on_branches(_Branches("stochastic_depth", make, p, rule))


def shakedrop(
    *,
    p: Rate = 0.5,
    rule: Rule = "linear",
    alpha: Ends = [-1.0, 1.0],  # noqa: B006 -- only read; a list, so that it shows as YAML writes it
    beta: Ends = [0.0, 1.0],  # noqa: B006
    level: Level = "image",
) -> Regularizer:
    """ShakeDrop: residual branches times ``b + alpha - b alpha``, their gradients times ``b + beta - b beta``.

    Block l of L has b = 0 with probability ``l / L * p``, else 1: one draw per block and step. alpha and beta are
    uniform and independent. In evaluation a branch is multiplied by the mean of its factor, ``1 - l / L * p`` for
    alpha of mean 0.

    The gradient is on purpose not that of the loss. A norm at the end of the branch keeps training stable, as the
    paper has it (unverified). Blocks that stride or widen take part, as in stochastic depth.

    Args:
        p: probability that the last block's branch is shaken, in [0, 1).
        rule: ``linear`` as above, or ``uniform``, p for every block.
        alpha, beta: lower and upper end.
        level: what has an alpha and a beta of its own: the ``batch``, each ``image``, each ``channel`` of an image, or
            each ``pixel`` of a channel.

    Raises:
        ValueError: a lower end is above the upper; or when bound, if the model has no residual blocks.

    Source: Yamada et al. 2018, "ShakeDrop Regularization", arXiv:1802.02375, section 3 (number unverified).
        Differs: none known.
    """
    for name, ends in (("alpha", alpha), ("beta", beta)):
        if len(ends) != 2 or not ends[0] <= ends[1]:
            raise ValueError(f"{name} must be a lower and an upper end, got {ends}")
    make = partial(ShakeDrop, alpha=(alpha[0], alpha[1]), beta=(beta[0], beta[1]), level=level)
    return _on_branches(_Branches("shakedrop", make, p, rule))


def droppath(*, p: Rate = 0.15, share_global: Share = 0.5, mode: Mode = "batch") -> Regularizer:
    """DropPath: joins of a fractal network drop inputs and average the rest, or the whole network is one column.

    Local, with probability ``1 - share_global``: each join drops each input with probability p, and keeps one, drawn,
    where none is left. Global: one column is drawn for the whole network. In evaluation joins take the mean of all;
    after training with global draws each column does by itself, too (``fedsim.models.fractal.single_column``).

    ``timm``'s layer of this name is stochastic depth.

    Args:
        p: probability that a join drops an input, in [0, 1).
        share_global: probability of one column, in [0, 1].
        mode: ``batch``, one draw of everything per step; ``row``, one per example.

    Raises:
        ValueError: when bound, if the model has no columns, or one only.

    Source: Larsson, Maire, Shakhnarovich 2017, "FractalNet", arXiv:1605.07648, section 3; half of the mini-batches
        global there (unverified). Differs: none known.
    """
    draws = PathDraws(p, share_global, mode)
    return Regularizer("layers", partial(_bind_droppath, draws) if p or share_global else unbound)


class _Branches(NamedTuple):
    """A layer for the end of every residual branch: its name, how it is made from a probability, and that of the last
    block.
    """

    name: str
    make: Callable[[float], nn.Module]
    p: float
    rule: Rule


def _on_branches(layer: _Branches) -> Regularizer:
    return Regularizer("layers", partial(_bind_branches, layer) if layer.p else unbound)


def _bind_branches(layer: _Branches, model: nn.Module, objective: Objective) -> Objective:
    blocks = places.blocks(model)
    if not blocks:
        raise ValueError("needs residual blocks; resnet, resnet-8, resnet-20 and residual-mlp have them")
    for number, block in enumerate(blocks, 1):
        share = number / len(blocks) if layer.rule == "linear" else 1.0
        attach(model.get_submodule(block.branch), layer.name, layer.make(layer.p * share))
    return objective


def _bind_droppath(draws: PathDraws, model: nn.Module, objective: Objective) -> Objective:
    for fractal in fractals(model):
        if fractal.columns < 2:
            raise ValueError("needs two columns or more; fractal has them unless model.columns is 1")
        if fractal.droppath is not None:
            raise ValueError("the model has droppath already")
        fractal.droppath = DropPath(fractal.columns, fractal.joins(), draws).train(fractal.training)
    return objective
