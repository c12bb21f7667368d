"""When pruning happens, and how far it has to have gone: functions of the round of the run, 1, 2, ..., or of a count.

The round is the server's. A client that counted for itself would start anew with every round.
"""

import math
from collections.abc import Mapping, Sequence

from fedsim.pruning import masks


def by_kind(
    shapes: Mapping[str, Sequence[int]], head: str, *, convolution: float, dense: float, output: float | None = None
) -> dict[str, float]:
    """Pruning rates by layer as the lottery ticket paper gives them: for convolutions, for dense layers, for the last.

    Args:
        shapes: of weights, by name; one of more than two axes is a convolution's.
        head: name of the last layer's weight.
        convolution, dense: rates in [0, 1].
        output: of ``head``, in [0, 1]; None: half of ``dense``.

    Returns:
        A rate for every name.

    Raises:
        ValueError: ``head`` has no shape, or a rate outside [0, 1].

    Source: Frankle, Carbin 2019, arXiv:1803.03635, figure 2 and section 2. Differs: none.
    """
    if head not in shapes:
        raise ValueError(f"head: no weight is called {head}; there are {', '.join(shapes)}")
    output = dense / 2 if output is None else output
    for what, rate in (("convolution", convolution), ("dense", dense), ("output", output)):
        masks.part(rate, what)
    rates = {name: convolution if len(shape) > 2 else dense for name, shape in shapes.items()}
    return {**rates, head: output}


def remaining_after(sizes: Mapping[str, int], rates: Mapping[str, float], times: int) -> float:
    """Share of all weights that remains when every layer has lost its rate of what it had so many times: the P_m.

    ``sum_l N_l (1 - s_l)^r / sum_l N_l``.

    Args:
        sizes: entries N_l, by name.
        rates: s_l in [0, 1], by name; 0 for layers without one.
        times: r >= 0.

    Returns:
        A share in [0, 1]. Masks, which lose whole entries, differ from it by rounding.

    Raises:
        ValueError: there are no entries, a rate outside [0, 1] or for no layer, or r < 0.

    Source: Frankle, Carbin 2019, arXiv:1803.03635, section 2. Differs: none.
    """
    if times < 0:
        raise ValueError(f"times must be >= 0, got {times}")
    if unknown := [name for name in rates if name not in sizes]:
        raise ValueError(f"{', '.join(unknown)}: no such layer; there are {', '.join(sizes)}")
    for name, rate in rates.items():
        masks.part(rate, f"{name}: rate")
    if sum(sizes.values()) < 1:
        raise ValueError("there are no weights to prune")
    left = sum(size * (1 - rates.get(name, 0.0)) ** times for name, size in sizes.items())
    return left / sum(sizes.values())


def cubic(round: int, start: int, end: int, final: float, *, initial: float = 0.0) -> float:
    """Sparsity that grows fast at first, and ever more slowly until it has come to its final value.

    ``final + (initial - final) * (1 - (round - start) / (end - start))^3``.

    Args:
        round: of the run.
        start, end: it is ``initial`` up to round ``start``, and ``final`` from round ``end`` on; start <= end, and if
            they are one round, it is ``final`` from there.
        final: in [0, 1].
        initial: in [0, final].

    Raises:
        ValueError: arguments out of range.

    Source: Zhu, Gupta 2017, "To prune, or not to prune", arXiv:1710.01878, eq. 1. Differs: none.
    """
    masks.part(final, "final")
    if not 0 <= initial <= final:
        raise ValueError(f"initial must be in [0, final], that is {final}, got {initial}")
    if start > end:
        raise ValueError(f"start must be <= end, that is {end}, got {start}")
    left = min(max(end - round, 0) / max(end - start, 1), 1.0)
    return final + (initial - final) * left**3


def cosine(round: int, end: int, start_share: float) -> float:
    """Share of weights that move, down half a cosine to 0 in round ``end`` and after it.

    ``start_share / 2 * (1 + cos(pi * round / end))``.

    Args:
        round: of the run, >= 0.
        end: >= 1.
        start_share: in [0, 1]; what round 0 would have.

    Raises:
        ValueError: arguments out of range.

    Source: Evci et al. 2020, "Rigging the lottery: making all tickets winners", section 3 (2). Differs: over rounds,
        not steps.
    """
    masks.part(start_share, "start_share")
    if end < 1 or round < 0:
        raise ValueError(f"needs round >= 0 and end >= 1, got {round} and {end}")
    return start_share / 2 * (1 + math.cos(math.pi * round / end)) if round < end else 0.0
