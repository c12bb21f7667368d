"""Structured pruning in a federation: after some rounds the server removes whole channels, and all go on smaller."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim import rng
from fedsim.pruning import channels, filters
from fedsim.pruning.channels import Group
from fedsim.pruning.fitting import fitted, redrawn
from fedsim.pruning.pruning import ENTRIES, Change, Moment, Pruning, with_entries
from fedsim.records import Params
from fedsim.training.regularizers.parameters import bn_slimming

Share = Annotated[float, Gt(0), Lt(1)]
At = Annotated[int, Gt(0)]
Then = Literal["fine-tune", "scratch"]
Names = list[str]


class Choice(NamedTuple):
    """Channels that stay, by layer, and the parameters, in which some may have been changed to make up for the rest."""

    kept: dict[str, Tensor]
    params: Params


Choose = Callable[[Moment, Sequence[Group]], Choice]


def once(at: int, then: Then, choose: Choose) -> Callable[[Moment], Change | None]:
    """``before`` of a method that removes channels once, after ``at`` rounds."""

    def before(moment: Moment) -> Change | None:
        if moment.round != at + 1 or any(name.startswith(ENTRIES) for name in moment.memory):
            return None
        found = channels.groups(moment.model, moment.input_shape)
        kept, params = choose(moment, found)
        memory = with_entries(moment.memory, moment.params)
        params, buffers = channels.sliced(params, kept, found), channels.sliced(moment.buffers, kept, found)
        if then == "scratch":
            smaller = fitted(moment.model, {**params, **buffers}, moment.input_shape)
            params, buffers = redrawn(smaller, rng.fold(moment.key, "scratch"))
        return Change(params, buffers, memory, restarted=True)

    return before


def l1_filter(
    *, sparsity: Share = 0.5, at: At = 10, then: Then = "fine-tune", layers: Names | None = None, random: bool = False
) -> Pruning:
    """L1-norm filter pruning: after some rounds remove the filters with the smallest sums of |w| from each layer.

    Of each layer's filters the ``floor(out * sparsity)`` with the smallest ``sum |W_j|`` go, with their biases, their
    places in the norm behind, and the weights that read them: messages, steps and the model are smaller from then on.

    Args:
        sparsity: share of each layer's filters that goes, in (0, 1); one stays, and with group norm a multiple of its
            groups.
        at: rounds before it, >= 1 and below ``train.rounds``.
        then: ``fine-tune`` the weights that are left, or train the small model from ``scratch``, newly drawn.
        layers: paths of those to prune; null: all whose channels can go, hidden units of linear layers among them.
        random: remove as many at random, to compare with.

    Raises:
        ValueError: the model has no channels that can go, or none by such a name.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3.1; the arms: Liu et
        al. 2019, "Rethinking the Value of Network Pruning", arXiv:1810.05270. Differs: one share for all layers.
    """

    def choose(moment: Moment, found: Sequence[Group]) -> Choice:
        kept = {}
        for group in _named(found, layers):
            part, key = share(group, sparsity), rng.fold(moment.key, group.layer)
            if random:
                kept[group.layer] = filters.random_filters(group.out, part, key)
            else:
                kept[group.layer] = filters.l1_filters(_weight(moment, group), part)
        return Choice(kept, moment.params)

    return Pruning(once(at, then, choose), check=partial(_check, then, layers), removes=True)


def soft_filter(
    *, sparsity: Share = 0.3, at: At = 10, then: Then = "fine-tune", layers: Names | None = None
) -> Pruning:
    """Soft filter pruning: zero the weakest filters after every round, let them train on, and remove them in the end.

    Before each of the first ``at`` rounds but one the server sets to 0, in each layer, the ``floor(out * sparsity)``
    filters of lowest L2 norm; clients train them like all others, but where a ReLU behind passes no gradient at 0: with
    batch norm, of filters whose shift is not above 0. After ``at`` rounds those of lowest norm are removed.

    Args:
        sparsity: share of each layer's filters, in (0, 1).
        at: rounds before they are removed, >= 1 and below ``train.rounds``.
        then: as for ``l1-filter``. layers: as for ``l1-filter``.

    Raises:
        ValueError: the model has no channels that can go, or none by such a name.

    Source: He et al. 2018, "Soft Filter Pruning", arXiv:1808.06866, algorithm 1. Differs: the server zeroes the
        averaged filters once a round, not each client once an epoch, since the mean of different zeros is not 0.
    """

    def choose(moment: Moment, found: Sequence[Group]) -> Choice:
        staying = _named(found, layers)
        kept = {g.layer: filters.l2_filters(_weight(moment, g), share(g, sparsity)) for g in staying}
        return Choice(kept, moment.params)

    remove = once(at, then, choose)

    def before(moment: Moment) -> Change | None:
        if not 1 < moment.round <= at:
            return remove(moment)
        params = moment.params
        for group in _named(channels.groups(moment.model, moment.input_shape), layers):
            params = filters.softened(params, [group.layer], share(group, sparsity))
        return Change(params, moment.buffers, moment.memory)

    return Pruning(before, check=partial(_check, then, layers), removes=True)


def network_slimming(
    *, sparsity: Share = 0.5, strength: Annotated[float, Ge(0)] = 1e-4, at: At = 10, then: Then = "fine-tune"
) -> Pruning:
    """Network slimming: an L1 penalty on the scales of batch norm, then remove the channels with the smallest ones.

    Clients minimise ``loss + strength * sum |gamma|``. After ``at`` rounds the channels whose averaged ``|gamma|`` is
    among the lowest ``sparsity`` of the whole network go, so that layers end with different widths.

    Args:
        sparsity: share of all channels with a scale, in (0, 1); one of each layer stays.
        strength: of the penalty, >= 0, until the channels are removed and after.
        at: rounds before it, >= 1 and below ``train.rounds``.
        then: as for ``l1-filter``.

    Raises:
        ValueError: no channels that can go have a batch norm with a scale behind them.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", arXiv:1708.06519,
        eq. 1 and section 3. Differs: scales start at 1 where the authors' code has 0.5; the threshold is of the scales
        that the server has averaged.
    """

    def choose(moment: Moment, found: Sequence[Group]) -> Choice:
        scales = {group.layer: moment.params[_scale(moment.model, group)] for group in _scaled(moment.model, found)}
        return Choice(filters.slimmed(scales, sparsity), moment.params)

    def check(model: nn.Module, input_shape: tuple[int, ...]) -> None:
        if not _scaled(model, channels.groups(model, input_shape)):
            raise ValueError("needs layers with batch norm behind them whose channels can go: set model.norm to batch")
        check_scratch(then, model)

    penalty = bn_slimming(strength=strength)
    return Pruning(once(at, then, choose), bind=penalty.bind, check=check, removes=True)


def _scaled(model: nn.Module, found: Sequence[Group]) -> list[Group]:
    """The layers with a batch norm behind them that has a scale."""
    return [group for group in found if _scale(model, group)]


def _scale(model: nn.Module, group: Group) -> str:
    """Name of the scale behind a layer, "" if there is none."""
    norms = ((path, model.get_submodule(path)) for path in group.follows)
    scaled = (
        path for path, norm in norms if isinstance(norm, _BatchNorm) and norm.affine and norm.weight.requires_grad
    )
    return next((f"{path}.weight" for path in scaled), "")


def share(group: Group, sparsity: float) -> float:
    """The share of a layer's channels that goes: ``floor(out * sparsity)``, or fewer for a group norm's sake."""
    staying = group.out - filters.removed(group.out, sparsity)
    return 1 - min(-(-staying // group.multiple) * group.multiple, group.out) / group.out


def check_scratch(then: Then, model: nn.Module) -> None:
    """Refuse a model of which no small copy could be drawn anew.

    Raises:
        ValueError: says why.
    """
    if then == "scratch":
        try:
            redrawn(model, 0)
        except ValueError as error:
            raise ValueError(f"can train no such model from scratch: {error}") from error


def _check(then: Then, layers: Names | None, model: nn.Module, input_shape: tuple[int, ...]) -> None:
    _named(channels.groups(model, input_shape), layers)
    check_scratch(then, model)


def _weight(moment: Moment, group: Group) -> Tensor:
    """Of the layer, trained or frozen."""
    return {**moment.buffers, **moment.params}[f"{group.layer}.weight"]


def _named(found: Sequence[Group], layers: Names | None) -> Sequence[Group]:
    if layers is None:
        return found
    names = [group.layer for group in found]
    if unknown := [layer for layer in layers if layer not in names]:
        raise ValueError(f"layers must be among {', '.join(names)}, got {unknown[0]}")
    return [group for group in found if group.layer in layers]
