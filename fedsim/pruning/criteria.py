"""What is removed: how many entries of which layer, and which of them; and what grows in its place.

A *score* says how much an entry is worth: whatever the criterion, those of lowest score go first. ``layerwise``,
``to_sparsity`` and ``globally`` say how many go from each layer, and ``lowest`` removes that many. Scores, masks and
parameters are tensors by name; entries that are removed already are never looked at.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.targeted import Kind, candidates
from fedsim.pruning import masks
from fedsim.records import Params


def magnitude(params: Params, names: Iterable[str]) -> Params:
    """``|w|``."""
    return {name: params[name].abs() for name in names}


def random(params: Params, names: Iterable[str], key: int) -> Params:
    """Uniform draws, float64: the control that removes as many entries as a criterion does, anywhere.

    Args:
        params: give the shapes.
        names: to score.
        key: each parameter draws from the key that its name makes of this one.
    """
    return {
        name: rng.uniform(rng.fold(key, name), *params[name].shape, dtype=torch.float64).to(params[name].device)
        for name in names
    }


def snip(params: Params, grads: Params) -> Params:
    """``|g w| / sum |g w|``, the sum over all entries of all named layers.

    Args:
        params: weights w.
        grads: gradients g of the loss at w, for the layers to be scored.

    Returns:
        Scores for the layers of ``grads``; they add up to 1.

    Raises:
        ValueError: every product is 0, so that there is nothing to rank.

    Source: Lee, Ajanthan, Torr 2019, "SNIP: Single-shot network pruning based on connection sensitivity", eq. 5 and 6,
        at masks of ones. Differs: none.
    """
    products = {name: (grad * params[name]).abs() for name, grad in grads.items()}
    total = sum(float(product.double().sum()) for product in products.values())
    if total == 0:
        raise ValueError("snip: gradient times weight is 0 everywhere, which ranks nothing")
    return {name: product / total for name, product in products.items()}


def grasp(params: Params, hessian_grad: Params) -> Params:
    """``w * (H g)``: how much of the squared norm of the gradient is lost, to first order and halved, with an entry.

    Entries whose removal would strengthen the gradient have negative scores and go first.

    Args:
        params: weights w.
        hessian_grad: the Hessian of the loss at w times its gradient, for the layers to be scored.

    Returns:
        Scores for the layers of ``hessian_grad``.

    Raises:
        ValueError: every score is 0, so that there is nothing to rank.

    Source: Wang, Zhang, Grosse 2020, "Picking winning tickets before training by preserving gradient flow", eq. 8.
        Differs: the opposite sign. The paper's is ``S = -w * (H g)``, and the highest go; here, as ever, the lowest.
    """
    scores = {name: params[name] * product for name, product in hessian_grad.items()}
    if not any(bool(score.any()) for score in scores.values()):
        raise ValueError("grasp: weight times Hessian times gradient is 0 everywhere, which ranks nothing")
    return scores


def layerwise(kept: Params, rates: Mapping[str, float]) -> dict[str, int]:
    """How many to remove from each layer: a part of what remains there.

    ``round(rate * remaining)``, the nearest integer, halves to the even one, as in ``torch.nn.utils.prune``; one entry
    of a layer always stays.

    Args:
        kept: masks.
        rates: by name, in [0, 1]; layers without one lose nothing.

    Returns:
        Counts for the names in ``rates``.

    Raises:
        ValueError: a rate outside [0, 1], or one for a layer without a mask.
    """
    _check_names(rates, kept)
    left = masks.counts({name: kept[name] for name in rates})
    return {
        name: min(round(masks.part(rate, f"{name}: rate") * left[name]), max(left[name] - 1, 0))
        for name, rate in rates.items()
    }


def to_sparsity(kept: Params, sparsity: float | Mapping[str, float]) -> dict[str, int]:
    """How many to remove from each layer until ``round(sparsity * entries)`` of it are gone; one entry always stays.

    Args:
        kept: masks.
        sparsity: share of each layer's entries to be gone, in [0, 1]; one for all, or by name.

    Returns:
        Counts, 0 for layers that are as sparse already; for the names in ``sparsity`` if it has any.

    Raises:
        ValueError: a sparsity outside [0, 1], or one for a layer without a mask.
    """
    targets = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(kept, sparsity)
    _check_names(targets, kept)
    left = masks.counts({name: kept[name] for name in targets})
    return {name: _until(target, left[name], kept[name].numel(), name) for name, target in targets.items()}


def to_overall(kept: Params, sparsity: float) -> int:
    """How many to remove from all layers together until ``round(sparsity * entries)`` of all are gone; at least 0.

    Args:
        kept: masks.
        sparsity: share of all named entries to be gone, in [0, 1].

    Raises:
        ValueError: a sparsity outside [0, 1].
    """
    entries = p.num_entries(kept)
    gone = entries - sum(masks.counts(kept).values())
    return max(round(masks.part(sparsity, "sparsity") * entries) - gone, 0)


def globally(scores: Params, kept: Params, count: int, *, at_least: int = 1) -> dict[str, int]:
    """How many to remove from each layer if ``count`` go, by one ranking of all layers.

    Equal scores go in the order of layers, then of entries. Scores of different layers must be comparable.

    Args:
        scores: for every layer of ``kept``.
        kept: masks.
        count: how many go, >= 0.
        at_least: entries of each layer, those of highest score, that stay; 0 lets whole layers go.

    Returns:
        Counts for every layer of ``kept``, for :func:`lowest`; they add up to ``count``.

    Raises:
        ValueError: ``at_least`` lets fewer go, a negative number, or scores that are missing, of another shape, or NaN.
    """
    if at_least < 0:
        raise ValueError(f"at_least must be >= 0, got {at_least}")
    values = {name: _values(scores, kept, name) for name in kept}
    free = [v[first_lowest(v, max(len(v) - at_least, 0))] for v in values.values()]
    sizes = [len(v) for v in free]
    if not 0 <= count <= sum(sizes):
        raise ValueError(f"count must be in [0, {sum(sizes)}], as {at_least} of each layer stay, got {count}")
    if count == 0:
        return dict.fromkeys(kept, 0)
    taken = torch.split(first_lowest(torch.cat(free), count), sizes)
    return {name: int(part.sum()) for name, part in zip(kept, taken, strict=True)}


def lowest(scores: Params, kept: Params, remove: Mapping[str, int]) -> Params:
    """Masks with exactly so many entries fewer: in each layer those of lowest score, of equal ones the first.

    Args:
        scores: for the layers in ``remove``.
        kept: masks.
        remove: how many go, by name, in [0, what remains]; layers that are not named keep their masks.

    Returns:
        New masks, subsets of ``kept``.

    Raises:
        ValueError: a count out of range, a name without a mask, or scores that are missing, of another shape, or NaN.
    """
    _check_names(remove, kept)
    return {name: _without(scores, kept, name, remove[name]) if name in remove else kept[name] for name in kept}


def by_column(params: Params, kept: Params, share: float, *, kind: Kind = "weight") -> Params:
    """Masks without the candidates of targeted dropout: ``floor(share * fan_in)`` of lowest magnitude in every filter.

    Args:
        params: weights, those that are pruned already 0, so that they are the first candidates.
        kept: masks.
        share: of all entries of a filter, pruned or not, in [0, 1]; 1 leaves nothing.
        kind: ``unit`` removes whole filters, ``floor(share * filters)`` of lowest norm.

    Returns:
        New masks, subsets of ``kept``. Equal entries that would be too many are all kept.

    Raises:
        ValueError: the masks do not fit, or a share outside [0, 1].

    Source: Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout", arXiv:1905.13678, weight and unit
        pruning. Differs: none.
    """
    masks.check(kept, params)
    masks.part(share, "share")
    return {name: mask & ~candidates(params[name], share, kind=kind) for name, mask in kept.items()}


def dropped_and_grown(params: Params, grads: Params, kept: Params, share: float) -> tuple[Params, Params]:
    """RigL: in each layer the weights of lowest magnitude make room for those of highest gradient.

    ``round(share * remaining)`` entries of lowest ``|w|`` are dropped, one at least staying; then as many are grown, of
    highest ``|g|`` among all that are not kept now. These include the ones just dropped, which may come back and then
    keep their values. Of equal ones the first are taken, in both.

    Args:
        params: weights, 0 where pruned.
        grads: the dense gradient at ``params``, pruned entries too, for every layer of ``kept``.
        kept: masks.
        share: of what remains in a layer, in [0, 1].

    Returns:
        New masks, which keep as many of each layer as before, and bool tensors that are true for what is new in them.
        Weights start at 0 there, which they are in ``params``; what a server rule remembers of them has to be cleared.

    Raises:
        ValueError: a share outside [0, 1], masks that do not fit, or gradients that are missing, of another shape, or
            NaN.

    Source: Evci, Gale, Menick, Castro, Elsen 2020, "Rigging the lottery: making all tickets winners", algorithm 1, and
        the authors' code (google-research/rigl), where dropped weights may come back, too. Differs: the code rounds the
        number down, and adds noise of 1e-5 to magnitudes.
    """
    masks.check(kept, params)
    remove = layerwise(kept, dict.fromkeys(kept, share))
    stay = lowest(magnitude(params, kept), kept, remove)
    absent = {name: ~mask for name, mask in stay.items()}
    rest = lowest({name: -grad.abs() for name, grad in grads.items()}, absent, remove)  # absent, less what grows
    now = {name: ~mask for name, mask in rest.items()}
    return now, {name: now[name] & ~kept[name] for name in kept}


def erdos_renyi(shapes: Mapping[str, Sequence[int]], sparsity: float, *, kernel: bool = True) -> dict[str, float]:
    """Densities of layers, higher for smaller ones, that make up one sparsity.

    ``density_l = min(1, epsilon * (n_out + n_in + h + w) / (n_out * n_in * h * w))``, with the one epsilon for which
    ``sum density_l N_l = (1 - sparsity) sum N_l``. Layers that would be denser than whole are whole, and epsilon grows
    for the others until no more are.

    Args:
        shapes: of weights, (out, in, ...), by name.
        sparsity: of all entries together, in [0, 1).
        kernel: count the kernel's sides, as above; else ``(n_out + n_in) / (n_out * n_in)``.

    Returns:
        Share of entries to keep, in (0, 1], by name. ``1 - density`` is what :func:`to_sparsity` takes.

    Raises:
        ValueError: a sparsity outside [0, 1), no shapes, or one of fewer than two axes or without entries.

    Source: Evci et al. 2020, section 3 (1), after Mocanu et al. 2018, "Scalable training of artificial neural networks
        with adaptive sparse connectivity inspired by network science", eq. 3. Differs: none.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if bad := [name for name, shape in shapes.items() if len(shape) < 2 or min(shape) < 1] or (not shapes and ["-"]):
        raise ValueError(f"needs shapes of two axes or more, none of length 0: {', '.join(bad)}")
    sides = {name: shape if kernel else shape[:2] for name, shape in shapes.items()}
    raw = {name: sum(side) / math.prod(side) for name, side in sides.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = (1 - sparsity) * sum(sizes.values())
    free = set(shapes)
    while free:  # a layer made whole leaves less for the others, so that the next epsilon is larger: it stays whole
        epsilon = (left - sum(sizes[n] for n in shapes if n not in free)) / sum(raw[n] * sizes[n] for n in free)
        if not (whole := {n for n in free if epsilon * raw[n] >= 1}):
            break
        free -= whole
    return {name: epsilon * raw[name] if name in free else 1.0 for name in shapes}


def first_lowest(values: Tensor, count: int) -> Tensor:
    """Marks the ``count`` lowest of a vector, of equal ones the first: bool (n,). A sort would take longer.

    Args:
        values: (n,), no NaN.
        count: in [0, n].

    >>> first_lowest(torch.tensor([2.0, 1.0, 3.0, 1.0, 1.0]), 2).int()
    tensor([0, 1, 0, 1, 0], dtype=torch.int32)
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    edge = torch.kthvalue(values, count).values
    below, at = values < edge, values == edge
    return below | (at & (at.cumsum(0) <= count - below.sum()))


def _without(scores: Params, kept: Params, name: str, count: int) -> Tensor:
    values = _values(scores, kept, name)
    if not 0 <= count <= len(values):
        raise ValueError(f"{name}: {len(values)} entries remain, cannot remove {count}")
    mask = kept[name].clone()
    mask[kept[name]] = ~first_lowest(values, count)
    return mask


def _values(scores: Params, kept: Params, name: str) -> Tensor:
    """The scores of what remains, in flat order."""
    if name not in scores or scores[name].shape != kept[name].shape:
        shape = tuple(scores[name].shape) if name in scores else "none"
        raise ValueError(f"{name}: needs scores of shape {tuple(kept[name].shape)}, got {shape}")
    values = scores[name].detach()[kept[name]]
    if bool(torch.isnan(values).any()):
        raise ValueError(f"{name}: scores must be numbers, got NaN; has the training diverged?")
    return values


def _until(sparsity: float, left: int, entries: int, name: str) -> int:
    target = min(round(masks.part(sparsity, f"{name}: sparsity") * entries), entries - 1)
    return max(target - (entries - left), 0)


def _check_names(asked: Mapping[str, object], kept: Params) -> None:
    if unknown := [name for name in asked if name not in kept]:
        raise ValueError(f"{', '.join(unknown)}: no such mask; there are {', '.join(kept)}")
