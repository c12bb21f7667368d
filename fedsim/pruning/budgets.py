"""How long a pruned model may train, and where it starts: the arms in which pruning is compared with training anew."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim import rng

_TINY = 1e-6  # so that 0.29 * 100 is 29 when rounded down


class Budget(NamedTuple):
    """Rounds to train, and after how many of them the learning rate falls: whole numbers, to compare as such."""

    rounds: int
    milestones: tuple[int, ...]


def fine_tune(rounds: int, share: float = 0.25) -> Budget:
    """Inherited weights: ``floor(rounds * share)`` rounds, one at least, at a constant rate.

    Args:
        rounds: of the large model, >= 1.
        share: of them, > 0; 40 of 160 epochs in the paper, at the large model's last rate (0.001).

    Raises:
        ValueError: a number out of range.

    Source: Liu et al. 2019, "Rethinking the Value of Network Pruning", arXiv:1810.05270, section 3. Differs: rounds
        instead of epochs.
    """
    _check_rounds(rounds)
    if not share > 0:
        raise ValueError(f"share must be > 0, got {share}")
    return Budget(max(int(rounds * share + _TINY), 1), ())


def scratch_e(rounds: int, milestones: Sequence[float] = (0.5, 0.75)) -> Budget:
    """New weights, as many rounds as the large model had.

    Args:
        rounds: of the large model, >= 1.
        milestones: shares of all rounds after which the rate falls, in [0, 1], ascending. Rounded down to whole rounds.

    Raises:
        ValueError: a number out of range.

    Source: as for :func:`fine_tune`. Differs: rounds instead of epochs; an odd number of epochs never meets the
        half of it in the authors' script, so that the rate does not fall; here it is rounded down.
    """
    _check_rounds(rounds)
    if not all(0 <= share <= 1 for share in milestones) or list(milestones) != sorted(milestones):
        raise ValueError(f"milestones must be ascending shares in [0, 1], got {tuple(milestones)}")
    return Budget(rounds, tuple(int(rounds * share + _TINY) for share in milestones))


def scratch_b(
    rounds: int,
    macs_large: int,
    macs_pruned: int,
    milestones: Sequence[float] = (0.5, 0.75),
    *,
    cap: float | None = None,
) -> Budget:
    """New weights, as much computation as the large model had: ``floor(rounds * macs_large / macs_pruned)`` rounds.

    In a federation that costs more messages, too: rounds are added, not local epochs.

    Args:
        rounds: of the large model, >= 1.
        macs_large: multiplications of one forward pass of the large model.
        macs_pruned: of the smaller one, of its smaller tensors, not of masks; in [1, macs_large].
        milestones: as for :func:`scratch_e`, shares of the new total.
        cap: at most so many times ``rounds``, >= 1; the paper has 2 on ImageNet, and none (None) on CIFAR.

    Raises:
        ValueError: a number out of range.

    Source: as for :func:`fine_tune`. Differs: rounds instead of epochs; exact in whole numbers.
    """
    _check_rounds(rounds)
    if not 1 <= macs_pruned <= macs_large:
        raise ValueError(f"macs_pruned must be in [1, {macs_large}], got {macs_pruned}")
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap must be >= 1, got {cap}")
    longer = rounds * macs_large // macs_pruned
    return scratch_e(longer if cap is None else min(longer, int(rounds * cap + _TINY)), milestones)


def rescaled(mask: Tensor, key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """New weights for a mask: normal with standard deviation ``sqrt(2 / n)``, ``n = kept entries / inputs``.

    Args:
        mask: bool (out, in, ...); of a whole convolution n is ``out * kh * kw``, He's fan-out.
        key: of this layer.
        dtype: of the result.

    Returns:
        Of the mask's shape, 0 where it is false.

    Raises:
        ValueError: fewer than two axes.

    Source: Liu et al. 2019, weight-level pruning, the authors' code. Differs: they rescale convolutions alone.
    """
    if mask.dim() < 2:
        raise ValueError(f"mask must have two axes or more, got shape {tuple(mask.shape)}")
    effective = int(mask.sum()) / mask.shape[1]
    scale = math.sqrt(2 / effective) if effective else 0.0
    drawn = rng.normal(key, *mask.shape, dtype=dtype).to(mask.device) * scale
    return drawn.masked_fill(~mask, 0.0)  # a product would leave -0.0


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
