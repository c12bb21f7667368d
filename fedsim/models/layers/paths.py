"""Layers that drop or shake whole branches of a network, each from its key."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedsim import rng
from fedsim.models.layers.keyed import Keyed

Mode = Literal["batch", "row"]  # one draw for the whole batch, or one for each example
Scaling = Literal["eval", "inverted"]
Level = Literal["batch", "image", "channel", "pixel"]
_AXES = {"batch": 0, "image": 1, "channel": 2}  # leading axes along which a draw varies


class StochasticDepth(Keyed):
    """A branch that is there or not: ``y = b x`` in training, ``b ~ Bernoulli(1 - p)``; ``(1 - p) x`` in evaluation.

    With ``scaling="inverted"`` it is ``b x / (1 - p)`` in training, and the identity in evaluation.

    The branch is computed all the same: clients that train side by side do not drop the same branches. So nothing is
    saved, and batch norms in a dropped branch see the batch.

    Args:
        p: probability that the branch is dropped, in [0, 1).
        mode: ``batch``, one draw for all rows; ``row``, one for each.
        scaling: where the expectation is put right.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382, eq. 2 and 5 (numbers
        unverified). Differs: the branch is computed where it is dropped; ``row`` and ``inverted`` are
        ``torchvision.ops.stochastic_depth``'s.
    """

    def __init__(self, p: float, *, mode: Mode = "batch", scaling: Scaling = "eval") -> None:
        super().__init__()
        self.p, self.mode, self.scaling = p, mode, scaling

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) to the same shape."""
        survival = 1.0 - self.p
        if not self.training:
            return x * survival if self.scaling == "eval" else x
        rows = len(x) if self.mode == "row" else 1
        kept = rng.uniform(self.key, rows).reshape(rows, *[1] * (x.dim() - 1)) >= self.p
        return torch.where(kept, x if self.scaling == "eval" else x / survival, 0.0)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p:.4g}, mode={self.mode}, scaling={self.scaling}"


class ShakeDrop(Keyed):
    """A branch times ``b + alpha - b alpha`` forward, and times ``b + beta - b beta`` backward, in training.

    ``b ~ Bernoulli(1 - p)``, one draw for the batch; ``alpha`` and ``beta`` are uniform and independent. So the branch
    is a plain one where b = 1, and else is scaled by alpha, and its gradient by beta. In evaluation it is multiplied by
    the mean of the forward factor, ``1 - p + p E[alpha]``.

    Args:
        p: probability of b = 0, in [0, 1).
        alpha, beta: lower and upper ends.
        level: what has an alpha and a beta of its own: the ``batch``, each ``image`` (example), each ``channel`` of
            each example, or each ``pixel`` (number) of each channel.

    Source: Yamada et al. 2018, "ShakeDrop Regularization", arXiv:1802.02375, eq. 6 (number unverified).
        Differs: none known.
    """

    def __init__(
        self, p: float, *, alpha: tuple[float, float], beta: tuple[float, float], level: Level = "image"
    ) -> None:
        super().__init__()
        self.p, self.alpha, self.beta, self.level = p, alpha, beta, level

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ...) to the same shape."""
        if not self.training:
            return x * (1.0 - self.p + self.p * sum(self.alpha) / 2)
        kept = rng.uniform(rng.fold_tensor(self.key, 0)) >= self.p
        alpha, beta = self._drawn(1, self.alpha, x), self._drawn(2, self.beta, x)
        # beta x has the slope beta; the rest, which has none, makes it alpha x
        return torch.where(kept, x, beta * x + ((alpha - beta) * x).detach())

    def _drawn(self, number: int, ends: tuple[float, float], x: Tensor) -> Tensor:
        """Uniform between the ends, in a shape that broadcasts against ``x``."""
        axes = min(_AXES.get(self.level, x.dim()), x.dim())
        u = rng.uniform(rng.fold_tensor(self.key, number), *x.shape[:axes], *[1] * (x.dim() - axes))
        return (ends[0] + (ends[1] - ends[0]) * u).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p:.4g}, alpha={self.alpha}, beta={self.beta}, level={self.level}"


class PathDraws(NamedTuple):
    """How paths are drawn.

    p: probability that a join drops an input, in [0, 1). share_global: probability that only one column of the whole
    network is there, in [0, 1]. mode: one draw of everything for the batch, or one for each example.
    """

    p: float
    share_global: float
    mode: Mode


class DropPath(Keyed):
    """Draws which inputs the joins of a fractal network take: for all joins in one call, since they share a column.

    - local, with probability ``1 - share_global``: each join drops each of its inputs with probability p; where none
      is left, one of them, drawn uniformly, is kept. What is left is averaged.
    - global: one column of the whole network is drawn, and joins take its input only.

    A join that the drawn column does not come to has no say in what the network returns, and takes the mean.

    Args:
        columns: of the network.
        joins: for each join, in the order of the calls, the columns that come to it: 0, 1, ...
        draws: how.

    Source: Larsson, Maire, Shakhnarovich 2017, "FractalNet", arXiv:1605.07648, section 3. Differs: none known.
    """

    def __init__(self, columns: int, joins: Sequence[Sequence[int]], draws: PathDraws) -> None:
        super().__init__()
        self.columns, self.joins, self.draws = columns, tuple(tuple(join) for join in joins), draws

    def forward(self, x: Tensor) -> list[Tensor]:
        """Weights of the inputs of each join: (rows, inputs), each row of sum 1; rows is batch, or 1.

        x: (batch, ...), whose dtype the weights have.
        """
        rows = len(x) if self.draws.mode == "row" else 1
        alone = rng.uniform(rng.fold_tensor(self.key, 0), rows, 1) < self.draws.share_global
        column = _index(rng.fold_tensor(self.key, 1), rows, self.columns)
        found = []
        for number, join in enumerate(self.joins):
            own = column == torch.tensor(join, device=x.device)
            comes = own.any(1, keepdim=True)
            local = self._local(rng.fold_tensor(rng.fold_tensor(self.key, 2), number), rows, len(join))
            kept = torch.where(alone, own | ~comes, local).to(x.dtype)
            found.append(kept / kept.sum(1, keepdim=True))
        return found

    def _local(self, key: Tensor, rows: int, inputs: int) -> Tensor:
        """Which inputs a join keeps by itself: (rows, inputs), at least one in each row."""
        kept = rng.uniform(rng.fold_tensor(key, 0), rows, inputs) >= self.draws.p
        forced = _index(rng.fold_tensor(key, 1), rows, inputs) == torch.arange(inputs, device=key.device)
        return kept | (forced & ~kept.any(1, keepdim=True))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return ", ".join(f"{name}={value}" for name, value in self.draws._asdict().items())


def _index(key: Tensor, rows: int, n: int) -> Tensor:
    """Uniform on 0, ..., n - 1: int64 (rows, 1)."""
    return (rng.uniform(key, rows, 1) * n).long().clamp(max=n - 1)
