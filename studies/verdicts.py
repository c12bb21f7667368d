"""When a difference between runs of the same seeds counts as shown; for all studies."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

Row = dict[str, Any]  # a result of a study
Pick = Callable[[Row], bool]
LEVEL = 0.95  # of the one-sided t-test over seeds, each way


def deviation(values: Sequence[float]) -> float:
    """Sample deviation; NaN of one value."""
    return stdev(values) if len(values) > 1 else math.nan


def verdict(differences: Sequence[float]) -> str:
    """By a one-sided t-test, each way, of differences that are positive where it is as claimed."""
    n = len(differences)
    if n < 2:
        return "not distinguishable"
    mean, error = fmean(differences), deviation(differences) / math.sqrt(n)
    t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    limit = float(stats.t.ppf(LEVEL, n - 1))
    return "holds" if t > limit else "does not hold here" if t < -limit else "not distinguishable"


def rows_of(arm: str, **keys: Any) -> Pick:
    """Whether a row is of this arm, and has these values."""
    return lambda row: row["arm"] == arm and all(row.get(key) == value for key, value in keys.items())
