"""Which channels the next layer can do without, and its weights for the rest: from second moments of what it reads.

At one output position the next layer reads ``x = (x_1, ..., x_C)``, P numbers of each channel, and returns
``y = sum_j W_j x_j`` (its bias stays out of it). With the sums over positions ``XX = sum x x^T`` and ``XY = sum x y^T``

    G_ij = sum <W_i x_i, W_j x_j> = <XX_ij, W_i^T W_j>        b_j = sum <y, W_j x_j> = <XY_j, W_j^T>

so that ``sum |y - sum_j beta_j W_j x_j|^2 = sum |y|^2 - 2 b^T beta + beta^T G beta``: greedy removal and the LASSO need
G and b alone, new weights XX and XY alone. All four are sums: of batches, and of clients, whose examples stay where
they are (the sums still tell something of them, and all of a client with fewer positions than inputs).
"""

import math
from typing import NamedTuple

import torch
from sklearn.linear_model import lars_path_gram
from torch import Tensor, nn
from torch.nn import functional as F

from fedsim import rng
from fedsim.pruning.filters import removed
from fedsim.pruning.following import in_evaluation

_RIDGE = 1e-8
MOST_INPUTS = 5000  # of a layer; XX is 200 MB then
_CHUNK = 8 * 2**20  # numbers of unfolded images at a time, 64 MB in float64


class Moments(NamedTuple):
    """Sums over output positions, float64 on the CPU.

    gram: G, (channels, channels). target: b, (channels,). xx: (channels * P, channels * P), a channel's side by side.
    xy: (channels * P, out). total: positions.
    """

    gram: Tensor
    target: Tensor
    xx: Tensor
    xy: Tensor
    total: int

    def plus(self, other: "Moments") -> "Moments":
        """The sums over the positions of both."""
        gram, target, xx, xy = (one + two for one, two in zip(self[:4], other[:4], strict=True))
        return Moments(gram, target, xx, xy, self.total + other.total)


def moments(
    model: nn.Module,
    path: str,
    channels: int,
    inputs: Tensor,
    key: int,
    *,
    positions: int = 10,
    original: nn.Module | None = None,
) -> Moments:
    """The sums for one layer and a batch of examples; the model is called in evaluation mode, and not changed.

    Args:
        model: gives x and W.
        path: of the layer that reads the channels: ``nn.Linear`` or ``nn.Conv2d`` of one group.
        channels: how many it reads; of a linear layer behind a flatten each has H * W inputs, side by side.
        inputs: (examples, ...).
        key: draws the positions; of this batch.
        positions: of each image, without replacement, >= 1; all if it has no more.
        original: gives y, if layers in front have been pruned already; None: the model itself, so that ``b = G 1``.

    Raises:
        ValueError: another kind of layer, of too many inputs or not so many channels, or one that is not called once.

    Source: Luo, Wu, Lin 2017, "ThiNet", section 3.2.1 (10 positions of each image). Differs: all filters of the layer
        at a position, where the paper draws one.
    """
    layer, read = _seen(model, path, inputs)
    _check(layer, path, channels, positions)
    weight = layer.weight.detach().flatten(1).double().cpu()
    source, before = (layer, read) if original is None else _seen(original, path, inputs)
    teacher = source.weight.detach().flatten(1).double().cpu()
    xx, xy, total = weight.new_zeros(weight.shape[1], weight.shape[1]), weight.new_zeros(weight.shape[::-1]), 0
    size = _chunk(layer, read, source, before)
    for number, start in enumerate(range(0, len(read), size)):
        part, drawn = slice(start, start + size), rng.fold(key, number)
        x = _rows(layer, read[part], positions, drawn)
        y = (x if original is None else _rows(source, before[part], positions, drawn)) @ teacher.T
        xx, xy, total = xx.addmm_(x.T, x), xy.addmm_(x.T, y), total + len(x)
    each = weight.shape[1] // channels
    target = (xy * weight.T).sum(1).reshape(channels, each).sum(1)
    return Moments(_gram(xx, weight, channels), target, xx, xy, total)


def thinet(gram: Tensor, sparsity: float) -> Tensor:
    """Greedy removal: one by one the channel goes with which ``sum_{i, j removed} G_ij`` grows least.

    Args:
        gram: G, (channels, channels).
        sparsity: in [0, 1]; ``floor(channels * sparsity)`` go, one stays.

    Returns:
        Channels that stay: int64, ascending. Of equal ones the last goes.

    Raises:
        ValueError: a matrix that is not square or has NaN, or a sparsity outside [0, 1].

    Source: Luo, Wu, Lin 2017, "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression",
        arXiv:1707.06342, eq. 6 and algorithm 1. Differs: from the Gram matrix.
    """
    matrix = _square(gram)
    added, left = matrix.diagonal().clone(), torch.ones(len(matrix), dtype=torch.bool)
    for _ in range(removed(len(matrix), sparsity)):
        costs = added.masked_fill(~left, math.inf)
        worst = int((costs == costs.min()).nonzero()[-1])
        left[worst] = False
        added += 2 * matrix[worst]
    return left.nonzero().flatten()


def thinet_scales(gram: Tensor, kept: Tensor) -> Tensor:
    """A factor for each channel that stays: ``argmin_w sum |y - sum_j w_j W_j x_j|^2``, ``G_KK w = G_K 1``.

    Args:
        gram: G, (channels, channels).
        kept: int64 (kept,).

    Returns:
        (kept,), float64, to multiply the channels' columns of the next layer's weight with. A tiny ridge (1e-8 of the
        mean of the diagonal) lets channels be multiples of others, or 0.

    Source: Luo, Wu, Lin 2017, eq. 7. Differs: the ridge.
    """
    matrix = _square(gram)
    return _solved(matrix[kept][:, kept], matrix[kept].sum(1, keepdim=True), _RIDGE)[:, 0]


def lasso_channels(gram: Tensor, target: Tensor, keep: int) -> Tensor:
    """Channels with ``beta_j != 0`` in ``min |y - sum_j beta_j W_j x_j|^2 / 2 + lambda |beta|_1``.

    lambda is the smallest on the path of solutions, at those values where beta_j leave or come to 0, for which at most
    ``keep`` are left.

    Args:
        gram: G, (channels, channels).
        target: b, (channels,).
        keep: in [1, channels]; ``channels`` keeps all.

    Returns:
        int64, ascending: at least one, at most ``keep``; fewer if channels are 0 or multiples of others.

    Raises:
        ValueError: a matrix that is not square or has NaN, or ``keep`` out of range.

    Source: He, Zhang, Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv:1707.06168, eq. 3.
        Differs: the whole path (least angle regression) instead of growing lambda; W_j are taken as they are, where
        the paper has norms of 1.
    """
    matrix = _square(gram)
    if not 1 <= keep <= len(matrix):
        raise ValueError(f"keep must be in [1, {len(matrix)}], got {keep}")
    toward = target.detach().double().cpu()
    if keep == len(matrix) or not bool(toward.any()):
        return torch.arange(keep)
    scale = toward.abs().max()  # the library stops at a lambda of 1e-7: the largest is 1 then
    _, _, betas = lars_path_gram(
        (toward / scale).numpy(),
        (matrix / scale).numpy(),
        n_samples=1,
        method="lasso",
        max_iter=max(500, 8 * len(matrix)),
    )
    chosen = torch.from_numpy(betas != 0)
    last = int(((chosen.sum(0) <= keep) & (chosen.sum(0) > 0)).nonzero()[-1])
    return torch.nonzero(chosen[:, last]).flatten()


def least_squares(xx: Tensor, xy: Tensor, columns: Tensor, *, ridge: float = _RIDGE) -> Tensor:
    """New weights of the next layer, ``argmin_W sum |y - W x_K|^2 = (XX_KK + r)^-1 XY_K``.

    Args:
        xx: XX, (inputs, inputs).
        xy: XY, (inputs, out).
        columns: int64, inputs that stay; P of each channel (:func:`columns_of`).
        ridge: share of the mean of XX's diagonal that is added to it, > 0: inputs may be 0, or depend on each other.
            Sums that were rounded to float32 need about 1e-6.

    Returns:
        (out, columns), float64, without an intercept: the bias stays.

    Source: He, Zhang, Sun 2017, eq. 4. Differs: the ridge.
    """
    matrix = _square(xx)
    return _solved(matrix[columns][:, columns], xy.detach().double().cpu()[columns], ridge).T


def columns_of(kept: Tensor, each: int) -> Tensor:
    """Inputs of the channels that stay, ``each`` side by side: int64 (kept * each,)."""
    return (kept[:, None] * each + torch.arange(each, device=kept.device)).flatten()


def _solved(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    mean = float(matrix.diagonal().mean())
    added = ridge * mean if mean > 0 else 1.0
    solution: Tensor = torch.linalg.solve(matrix + added * torch.eye(len(matrix), dtype=matrix.dtype), right)
    return solution


def _square(matrix: Tensor) -> Tensor:
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix) or bool(torch.isnan(matrix).any()):
        raise ValueError(f"needs a square matrix of numbers, got shape {tuple(matrix.shape)}, or NaN in it")
    return matrix.detach().double().cpu()


def _gram(xx: Tensor, weight: Tensor, channels: int) -> Tensor:
    """``G_ij = <XX_ij, W_i^T W_j>``, row by row: the product of all weights would be as large as XX."""
    each = weight.shape[1] // channels
    rows = []
    for start in range(0, weight.shape[1], each):
        own = slice(start, start + each)
        rows.append((xx[own] * (weight[:, own].T @ weight)).sum(0).reshape(channels, each).sum(1))
    return torch.stack(rows)


def _seen(model: nn.Module, path: str, inputs: Tensor) -> tuple[nn.Linear | nn.Conv2d, Tensor]:
    """The layer, and what it reads."""
    copied = in_evaluation(model)
    layer, seen = copied.get_submodule(path), list[Tensor]()
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise ValueError(f"{path} must be a linear layer or a Conv2d, got {type(layer).__name__}")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        copied(inputs)
    if len(seen) != 1:
        raise ValueError(f"{path} must be called once in a forward pass, got {len(seen)} calls")
    return layer, seen[0]


def _check(layer: nn.Linear | nn.Conv2d, path: str, channels: int, positions: int) -> None:
    wide = layer.weight[0].numel()
    if positions < 1:
        raise ValueError(f"positions must be >= 1, got {positions}")
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or channels != layer.in_channels):
        raise ValueError(f"{path} reads {layer.in_channels} channels in {layer.groups} groups, not {channels} in one")
    if channels < 1 or wide % channels:
        raise ValueError(f"{path} has {wide} inputs, not a multiple of {channels} channels")
    if wide > MOST_INPUTS:
        raise ValueError(f"{path} has {wide} inputs for each output; moments take {MOST_INPUTS} at most")


def _chunk(layer: nn.Module, read: Tensor, source: nn.Module, before: Tensor) -> int:
    """How many examples can be unfolded at a time."""
    if isinstance(layer, nn.Linear):
        return max(_CHUNK // max(read[0].numel(), before[0].numel()), 1)
    images = ((layer, read), (source, before))
    numbers = [len(_unfolded(one, x[:1])[0]) * one.weight[0].numel() for one, x in images if isinstance(one, nn.Conv2d)]
    return max(_CHUNK // max(numbers), 1)


def _rows(layer: nn.Linear | nn.Conv2d, read: Tensor, positions: int, key: int) -> Tensor:
    """What the layer reads at the positions drawn: (examples * positions, inputs), float64."""
    if isinstance(layer, nn.Linear):
        read = read.flatten(1, -2) if read.dim() > 2 else read[:, None]
    else:
        read = _unfolded(layer, read)
    if positions < read.shape[1]:
        drawn = torch.sort(rng.uniform(key, *read.shape[:2]), dim=1, stable=True).indices[:, :positions].to(read.device)
        read = read.gather(1, drawn[:, :, None].expand(-1, -1, read.shape[2]))
    return read.flatten(0, 1).double().cpu()


def _unfolded(layer: nn.Conv2d, read: Tensor) -> Tensor:
    """Patches: (examples, positions, inputs)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(read, layer._reversed_padding_repeated_twice, mode=mode)
    return F.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride).transpose(1, 2)
