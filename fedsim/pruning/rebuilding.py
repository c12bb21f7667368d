"""Structured pruning that looks at examples: the next layer chooses its inputs, and its weights make up for others."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from fedsim import rng
from fedsim.pruning import channels, reconstruction, slicing
from fedsim.pruning.channels import Consumer, Group
from fedsim.pruning.pruning import Moment, Pruning
from fedsim.pruning.reconstruction import MOST_INPUTS, Moments, columns_of, moments
from fedsim.pruning.structured import At, Choice, Choose, Share, Then, check_scratch, once, share
from fedsim.records import Params

Count = Annotated[int, Gt(0)]
Rebuild = Callable[[Moments, Tensor, int], tuple[Tensor, Tensor]]  # sums, weight (out, inputs), how many stay


def thinet(
    *, sparsity: Share = 0.5, at: At = 10, then: Then = "fine-tune", examples: Count = 512, positions: Count = 10
) -> Pruning:
    """ThiNet: remove the channels that the next layer misses least on some examples, and scale those that are left.

    From the input on, on the model pruned so far: of each layer the ``floor(out * sparsity)`` channels go, one by one,
    without which the next layer's sums ``sum_j W_j x_j`` change least; its weights for each other one get a factor.

    The server looks at training examples of one cohort, which a simulation can and separate machines cannot: refused
    there. Layers that several others read stay whole, and those read by a layer that is not trained, is neither linear
    nor a two-dimensional convolution, or has more than 5000 inputs.

    Args:
        sparsity: share of each layer's channels that goes, in (0, 1); one stays, and with group norm a multiple of its
            groups.
        at: rounds before it, >= 1 and below ``train.rounds``.
        then: as for ``l1-filter``, which leaves nothing of the factors if it is ``scratch``.
        examples: about so many, of the cohort of the round to come, as many of each client.
        positions: of each of them, drawn, at which a convolution is looked at.

    Raises:
        ValueError: the model has no channels that can go like this.

    Source: Luo, Wu, Lin 2017, "ThiNet", arXiv:1707.06342, algorithm 1 and eq. 7. Differs: no training between
        layers.
    """
    choose = partial(_choose, _scaled, sparsity, (examples, positions), toward_original=False)
    return _method(at, then, choose)


def channel_reconstruction(
    *, sparsity: Share = 0.5, at: At = 10, then: Then = "fine-tune", examples: Count = 512, positions: Count = 10
) -> Pruning:
    """Channel pruning by reconstruction: a LASSO chooses channels, least squares give the next layer's new weights.

    From the input on, on the model pruned so far: of each layer the channels stay whose ``beta_j`` are the last to be 0
    in ``min |y - sum_j beta_j W_j x_j|^2 / 2 + lambda |beta|_1``, and then ``W <- argmin |y - W x|^2`` for those. y is
    what the next layer returned before anything was pruned.

    Whose examples these are, and which layers stay whole: as for ``thinet``.

    Args:
        sparsity, at, then, examples, positions: as for ``thinet``.

    Raises:
        ValueError: the model has no channels that can go like this.

    Source: He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, eq. 2
        to 4. Differs: as many channels stay as ``sparsity`` says, the largest ones where the LASSO takes fewer;
        residual sums are not corrected for.
    """
    choose = partial(_choose, _refitted, sparsity, (examples, positions), toward_original=True)
    return _method(at, then, choose)


def _method(at: int, then: Then, choose: Choose) -> Pruning:
    return Pruning(once(at, then, choose), check=partial(_check, then), removes=True, looks=True)


def _choose(
    rebuild: Rebuild,
    sparsity: float,
    counts: tuple[int, int],
    moment: Moment,
    found: Sequence[Group],
    *,
    toward_original: bool,
) -> Choice:
    """Layer by layer: what stays of it, and the next one's weights.

    counts: examples, and positions of each.
    toward_original: whether the next layer is to return what it did before anything was pruned.
    """
    inputs = moment.examples(counts[0]).inputs
    whole = _loaded(moment.model, {**moment.params, **moment.buffers})
    original = copy.deepcopy(whole) if toward_original else None
    kept: dict[str, Tensor] = {}
    for group, reader in _single(moment.model, found):
        now, key = slicing.cut(whole, kept, found), rng.fold(moment.key, group.layer)
        sums = moments(now, reader.path, group.out, inputs, key, positions=counts[1], original=original)
        weight = whole.get_parameter(f"{reader.path}.weight")
        staying = round(group.out * (1 - share(group, sparsity)))
        kept[group.layer], new = rebuild(sums, weight.detach().flatten(1), staying)
        _write(weight, columns_of(kept[group.layer], weight[0].numel() // group.out), new)
    return Choice(kept, {name: whole.get_parameter(name).detach() for name in moment.params})


def _scaled(sums: Moments, weight: Tensor, staying: int) -> tuple[Tensor, Tensor]:
    """The channels that stay, and the next layer's weights for them: by ThiNet."""
    out = len(sums.gram)
    kept = reconstruction.thinet(sums.gram, 1 - staying / out)
    each = weight.shape[1] // out
    scales = reconstruction.thinet_scales(sums.gram, kept).repeat_interleave(each)
    return kept, weight[:, columns_of(kept, each)].double() * scales


def _refitted(sums: Moments, weight: Tensor, staying: int) -> tuple[Tensor, Tensor]:
    """The same by reconstruction."""
    out = len(sums.gram)
    kept = _filled(reconstruction.lasso_channels(sums.gram, sums.target, staying), sums.gram.diagonal(), staying)
    columns = columns_of(kept, weight.shape[1] // out)
    return kept, reconstruction.least_squares(sums.xx, sums.xy, columns)


def _filled(chosen: Tensor, sizes: Tensor, count: int) -> Tensor:
    """So many channels: those chosen, and the largest of the others; ascending."""
    ranks = sizes.clone()
    ranks[chosen] = torch.inf
    return torch.sort(ranks, descending=True, stable=True).indices[:count].sort().values


def _write(weight: nn.Parameter, columns: Tensor, new: Tensor) -> None:
    flat = weight.detach().flatten(1).clone()
    flat[:, columns] = new.to(flat)
    with torch.no_grad():
        weight.copy_(flat.view_as(weight))


def _loaded(model: nn.Module, tensors: Params) -> nn.Module:
    made = copy.deepcopy(model)
    made.load_state_dict(tensors, strict=False)
    return made


def _single(model: nn.Module, found: Sequence[Group]) -> list[tuple[Group, Consumer]]:
    """The layers with one reader whose weights can be set, a layer before those that read it."""
    usable = [(group, group.next[0]) for group in found if len(group.next) == 1 and _settable(model, group.next[0])]
    return sorted(usable, key=lambda pair: _depth(pair[0].layer, found))


def _settable(model: nn.Module, reader: Consumer) -> bool:
    layer = model.get_submodule(reader.path)
    if type(layer) not in (nn.Linear, nn.Conv2d):  # others compute their weight, or something else of it
        return False
    weight = layer.get_parameter("weight")
    return weight.requires_grad and weight[0].numel() <= MOST_INPUTS


def _depth(layer: str, found: Sequence[Group]) -> int:
    """How many layers are read on the way to it."""
    before = [group.layer for group in found if any(reader.path == layer for reader in group.next)]
    return 1 + max((_depth(one, found) for one in before), default=0)


def _check(then: Then, model: nn.Module, input_shape: tuple[int, ...]) -> None:
    if not _single(model, channels.groups(model, input_shape)):
        rule = "needs a layer that one other reads, which must be linear or a two-dimensional convolution"
        raise ValueError(f"{rule}, with {MOST_INPUTS} inputs at most")
    check_scratch(then, model)
