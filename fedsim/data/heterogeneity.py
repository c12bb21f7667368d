"""How unlike the clients' label mixes are: numbers for tables and plots, from a table of label counts."""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedsim.records import Indices, Partition

Floats = npt.NDArray[np.float64]


def label_counts(labels: Tensor, partition: Partition, num_classes: int) -> Indices:
    """How often each client holds each label.

    Args:
        labels: int64 (n,), or (n, time) for one class per position; negative labels (padding, -100) do not count.
        partition: of these n examples.
        num_classes: labels lie below it.

    Returns:
        int64 (clients, num_classes).

    Raises:
        ValueError: a label is num_classes or more.
    """
    held = labels.numpy()[partition.indices]
    held = held.reshape(len(held), -1)  # (m, positions)
    if held.size and held.max() >= num_classes:
        raise ValueError(f"labels must be < num_classes = {num_classes}, got {held.max()}")
    cell = partition.owners()[:, None] * num_classes + held
    counts = np.bincount(cell[held >= 0], minlength=partition.num_clients * num_classes)
    return counts.reshape(partition.num_clients, num_classes).astype(np.int64)


def effective_classes(counts: Indices) -> Floats:
    """How many equally frequent classes a client's labels amount to: ``exp(-sum_c p_c ln p_c)``.

    Args:
        counts: int64 (clients, classes).

    Returns:
        float64 (clients,), 1 for one class, the number of classes for a balanced client; NaN without labels.

    >>> effective_classes(np.array([[5, 5, 0], [7, 0, 0]])).round(6).tolist()
    [2.0, 1.0]
    """
    p = _proportions(counts)
    return np.asarray(np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)))


def earth_movers_distance(counts: Indices) -> Floats:
    """Distance of each client's label distribution from that of all clients together: ``sum_c |p_c - q_c|``.

    In [0, 2): 0 for the same mix, 1.8 for a client with one class out of ten balanced ones. It is the earth mover's
    distance where moving from any class to any other costs 2, and twice the total variation distance.

    Args:
        counts: int64 (clients, classes).

    Returns:
        float64 (clients,); NaN for a client without labels.

    Source: Zhao et al. 2018, "Federated Learning with Non-IID Data", section 3, arXiv:1806.00582. Differs: none.

    >>> earth_movers_distance(np.array([[6, 0], [2, 4]])).round(6).tolist()
    [0.666667, 0.666667]
    """
    q = _proportions(counts.sum(axis=0, keepdims=True))
    return np.asarray(np.abs(_proportions(counts) - q).sum(axis=1))


def summary(counts: Indices) -> dict[str, float]:
    """Mean, least and greatest over the clients with labels.

    Args:
        counts: int64 (clients, classes), not all 0.

    Returns:
        ``clients``, ``clients_without_labels``, and ``labels``, ``effective_classes`` and ``emd`` each with
        ``_mean``, ``_min`` and ``_max``. All finite.

    Raises:
        ValueError: no client has a label.
    """
    held = counts[counts.sum(axis=1) > 0]
    if not len(held):
        raise ValueError("summary needs at least one client with labels")
    measures = {
        "labels": held.sum(axis=1),
        "effective_classes": effective_classes(held),
        "emd": earth_movers_distance(held),
    }
    result = {"clients": float(len(counts)), "clients_without_labels": float(len(counts) - len(held))}
    for name, values in measures.items():
        result |= {f"{name}_mean": float(values.mean()), f"{name}_min": float(values.min())}
        result[f"{name}_max"] = float(values.max())
    return result


def _proportions(counts: Indices) -> Floats:
    """Rows divided by their sums; NaN where a row is empty."""
    sums = counts.sum(axis=1, keepdims=True).astype(np.float64)
    return np.asarray(np.divide(counts, sums, out=np.full(counts.shape, np.nan), where=sums > 0))
