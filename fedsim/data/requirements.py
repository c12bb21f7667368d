"""What every split asks of its arguments, in one wording."""

import math

import numpy as np
from torch import Tensor

from fedsim.errors import ConfigError, DataError
from fedsim.records import Indices


def check_range(name: str, value: float, low: float, high: float = math.inf, *, low_is_allowed: bool = True) -> None:
    """Refuse a value outside [low, high], or (low, high]; NaN and infinity never pass.

    Raises:
        ValueError: names the rule and the value.
    """
    is_above = value >= low if low_is_allowed else value > low
    if not (is_above and value <= high and math.isfinite(value)):
        lower = f"{'>=' if low_is_allowed else '>'} {low:g}"
        upper = f"<= {high:g}" if high < math.inf else "finite"
        raise ValueError(f"{name} must be {lower} and {upper}, got {value}")


def check_clients(split: str, num_clients: int | None, num_examples: int, min_examples: int) -> int:
    """The number of clients, once it is known that the examples suffice for them.

    Raises:
        ConfigError: the split needs data.clients and it is null.
        DataError: more clients, or a higher minimum, than the examples allow.
        ValueError: num_clients < 1 or min_examples < 0.
    """
    if num_clients is None:
        raise ConfigError(f"data.clients: the {split} split needs a number of clients, got null")
    check_range("num_clients", num_clients, 1)
    check_range("min_examples", min_examples, 0)
    if num_clients > num_examples:
        raise DataError(
            f"data.clients: {num_clients} clients but only {num_examples} training examples; "
            f"set data.clients to at most {num_examples}"
        )
    if num_clients * min_examples > num_examples:
        raise DataError(
            f"data.split.min_examples: {num_clients} clients with at least {min_examples} examples each "
            f"need {num_clients * min_examples}, but there are only {num_examples}"
        )
    return num_clients


def classes_of(split: str, labels: Tensor) -> tuple[Indices, Indices]:
    """The class of each example, renumbered without gaps, and the size of each class that occurs.

    Returns:
        int64 (n,) and int64 (classes,).

    Raises:
        DataError: labels are not one whole number per example.
    """
    if labels.ndim != 1:
        shape = ", ".join(["n", *map(str, labels.shape[1:])])
        raise DataError(f"data.split: {split} needs one label per example, got labels of shape ({shape})")
    if labels.is_floating_point():
        raise DataError(f"data.split: {split} needs whole-number labels, got {labels.dtype}")
    _, classes, sizes = np.unique(labels.numpy(), return_inverse=True, return_counts=True)
    return classes.astype(np.int64), sizes.astype(np.int64)
