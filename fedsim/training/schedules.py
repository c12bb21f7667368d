"""How the step size changes from round to round: functions from the global round to a factor on ``lr``.

Every schedule may begin with a linear warm-up: in round r of ``warmup`` rounds the factor is ``r / (warmup + 1)``. What
follows starts at 1 in the round after it; below, ``s`` = 0, 1, ... counts rounds from there, and ``n`` is their number,
``rounds - warmup``. ``rounds`` is ``train.rounds``; a run that is resumed with more of them follows the new total.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

from annotated_types import Ge, Gt, Le

Schedule = Callable[[int], float]  # round, 1 to rounds -> factor on lr
Warmup = Annotated[int, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]


def unchanged(round: int) -> float:
    """1 in every round."""
    return 1.0


def constant(rounds: int, *, warmup: Warmup = 0) -> Schedule:
    """The same step size in every round.

    Args:
        rounds: of the run, >= 1; supplied by fedsim.
        warmup: rounds of linear warm-up before, >= 0, < rounds.

    Returns:
        The schedule.

    Raises:
        ValueError: the run would end before the warm-up.
    """
    return _after(warmup, rounds, unchanged)


def linear(rounds: int, *, floor: Share = 0.0, warmup: Warmup = 0) -> Schedule:
    """Down a straight line, from lr towards floor * lr.

    ``factor = floor + (1 - floor) * (1 - s / n)``.

    The round after the last would reach ``floor``. A run resumed with more rounds follows the line of the new total,
    so that its next factor may be larger than its last one.

    Args:
        rounds: of the run, >= 1; supplied by fedsim.
        floor: factor at the end, in [0, 1].
        warmup: rounds of linear warm-up before, >= 0, < rounds.

    Returns:
        The schedule.

    Raises:
        ValueError: the run would end before the warm-up.
    """
    return _after(warmup, rounds, partial(_linear, n=rounds - warmup, floor=floor))


def cosine(rounds: int, *, floor: Share = 0.0, warmup: Warmup = 0) -> Schedule:
    """Down half a cosine, from lr towards floor * lr.

    ``factor = floor + (1 - floor) * (1 + cos(pi * s / n)) / 2``.

    The round after the last would reach ``floor``. A run resumed with more rounds follows the cosine of the new total,
    so that its next factor may be larger than its last one.

    Args:
        rounds: of the run, >= 1; supplied by fedsim.
        floor: factor at the end, in [0, 1].
        warmup: rounds of linear warm-up before, >= 0, < rounds.

    Returns:
        The schedule.

    Raises:
        ValueError: the run would end before the warm-up.

    Source: Loshchilov and Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5. Differs: no
        restarts; over rounds, not steps.
    """
    return _after(warmup, rounds, partial(_cosine, n=rounds - warmup, floor=floor))


def step(
    rounds: int, *, every: Annotated[int, Ge(1)], gamma: Annotated[float, Gt(0), Le(1)] = 0.1, warmup: Warmup = 0
) -> Schedule:
    """Down by the factor gamma every so many rounds.

    ``factor = gamma ^ floor(s / every)``.

    Args:
        rounds: of the run, >= 1; supplied by fedsim.
        every: rounds between two drops, >= 1.
        gamma: factor of a drop, in (0, 1].
        warmup: rounds of linear warm-up before, >= 0, < rounds.

    Returns:
        The schedule.

    Raises:
        ValueError: the run would end before the warm-up.
    """
    return _after(warmup, rounds, partial(_step, every=every, gamma=gamma))


def exponential(rounds: int, *, gamma: Annotated[float, Gt(0), Le(1)], warmup: Warmup = 0) -> Schedule:
    """Down by the factor gamma every round.

    ``factor = gamma ^ s``.

    Args:
        rounds: of the run, >= 1; supplied by fedsim.
        gamma: factor of a round, in (0, 1].
        warmup: rounds of linear warm-up before, >= 0, < rounds.

    Returns:
        The schedule.

    Raises:
        ValueError: the run would end before the warm-up.
    """
    return _after(warmup, rounds, partial(_step, every=1, gamma=gamma))


def _after(warmup: int, rounds: int, shape: Callable[[int], float]) -> Schedule:
    """The schedule that warms up, then takes ``shape`` of the number of rounds since."""
    if warmup >= rounds:
        raise ValueError(f"warmup must be < rounds ({rounds}), got {warmup}")
    return partial(_factor, warmup=warmup, shape=shape)


def _factor(round: int, *, warmup: int, shape: Callable[[int], float]) -> float:
    return round / (warmup + 1) if round <= warmup else shape(round - warmup - 1)


def _linear(s: int, *, n: int, floor: float) -> float:
    return floor + (1 - floor) * (1 - s / n)


def _cosine(s: int, *, n: int, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * s / n)) / 2


def _step(s: int, *, every: int, gamma: float) -> float:
    return float(gamma ** (s // every))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": step,
    "exponential": exponential,
}
