"""Splits: who holds which training example. The table ``SPLITS`` names them all.

A split is a pure function of labels (or id columns), a number of clients and a key. Each one ends, gives no example
to two clients, and gives every client at least ``min_examples`` or says why it cannot.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedsim import rng
from fedsim.data import allotment
from fedsim.data.label_skew import dirichlet, label_quantity, log_normal_sizes, shards
from fedsim.data.partition_files import from_file
from fedsim.data.requirements import check_clients, check_range
from fedsim.errors import ConfigError, DataError
from fedsim.records import Indices, Partition


def iid(
    labels: Tensor,
    num_clients: int | None,
    key: int,
    *,
    examples_per_client: Annotated[int, Ge(1)] | None = None,
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """Every client gets a random sample of the examples; sizes differ by at most 1.

    Args:
        labels: (n, ...); only n is used.
        num_clients: 1 to n.
        key: a key.
        examples_per_client: exactly so many each, the rest of the data unused; None uses every example.
        min_examples: per client, >= 1 (0 from Python only).

    Raises:
        DataError: too few examples.
    """
    clients, n = check_clients("iid", num_clients, len(labels), min_examples), len(labels)
    if examples_per_client is None:
        sizes = n // clients + (rng.permutation(rng.fold(key, "sizes"), clients).numpy() < n % clients)
    else:
        check_range("examples_per_client", examples_per_client, max(min_examples, 1))
        if clients * examples_per_client > n:
            raise DataError(
                f"data.split.examples_per_client: {clients} clients with {examples_per_client} examples each "
                f"need {clients * examples_per_client}, but there are only {n}"
            )
        sizes = np.full(clients, examples_per_client, dtype=np.int64)
    return _random_of_sizes(n, sizes, min_examples, key)


def quantity(
    labels: Tensor,
    num_clients: int | None,
    key: int,
    *,
    sigma: Annotated[float, Gt(0), Le(100)],
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """Quantity skew: client sizes are log-normal, the examples of each a random sample.

    ``s_k`` proportional to ``exp(sigma z_k)``, ``z_k ~ N(0, 1)``, rounded by largest remainder to sum to n.
    Covers every example.

    Args:
        labels: (n, ...); only n is used.
        num_clients: 1 to n.
        key: a key.
        sigma: in (0, 100], standard deviation of the logarithm of the size.
        min_examples: per client, >= 1 (0 from Python only); clients below it take examples from the largest.

    Raises:
        DataError: too few examples.
    """
    clients = check_clients("quantity", num_clients, len(labels), min_examples)
    sizes = log_normal_sizes(len(labels), clients, sigma, rng.fold(key, "sizes"))
    return _random_of_sizes(len(labels), sizes, min_examples, key)


def feature_noise(
    labels: Tensor,
    num_clients: int | None,
    key: int,
    *,
    std: Annotated[float, Ge(0)] = 0.3,
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """Feature skew: an iid split, and client k of K has Gaussian noise of deviation std * (k + 1) / K on its inputs.

    Args:
        labels: (n, ...); only n is used.
        num_clients: 1 to n.
        key: a key.
        std: >= 0, in units of the inputs; the noise of the last client.
        min_examples: per client, >= 1 (0 from Python only).

    Returns:
        Partition with ``noise_std``; the noise itself is added when the federated data is assembled.

    Raises:
        DataError: too few examples.

    Source: Li et al. 2022, "Federated Learning on Non-IID Data Silos: An Experimental Study", section IV-C,
        arXiv:2102.02079. Differs: sigma * i / N is a standard deviation here, as in the authors' code; that code counts
        clients from 0 to N - 1 and divides by N - 1.
    """
    check_range("std", std, 0)
    partition = iid(labels, num_clients, key, min_examples=min_examples)
    steps = np.arange(1, partition.num_clients + 1) / partition.num_clients
    return replace(partition, noise_std=(std * steps).astype(np.float32))


def natural(
    num_clients: int | None,
    key: int,
    columns: Mapping[str, Indices],
    *,
    column: str,
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """As the data came about: one client per owner (writer, speaker, user) in an id column of the dataset.

    Owners with fewer than min_examples examples are left out. Clients are in ascending order of id.

    Args:
        num_clients: None for all owners, or a number of owners chosen at random.
        key: a key.
        columns: the dataset's id columns, int64 (n,) each.
        column: which of them.
        min_examples: >= 1; owners with fewer are left out.

    Returns:
        Partition with ``column`` and ``owner_ids``.

    Raises:
        ConfigError: no such column.
        DataError: too few owners.
    """
    if column not in columns:
        known = ", ".join(sorted(columns)) or "none"
        raise ConfigError(f"data.split.column: the dataset has no id column {column!r}; it has: {known}")
    check_range("min_examples", min_examples, 0)
    ids, position, sizes = np.unique(columns[column], return_inverse=True, return_counts=True)
    eligible = np.flatnonzero(sizes >= min_examples)
    wanted = len(eligible) if num_clients is None else num_clients
    if not 1 <= wanted <= len(eligible):
        raise DataError(
            f"data.clients: {wanted} clients, but column {column!r} has {len(eligible)} owners "
            f"with at least {max(min_examples, 1)} examples"
        )
    chosen = eligible[rng.choice(key, len(eligible), wanted).numpy()]
    client_of = np.full(len(ids), -1, dtype=np.int64)
    client_of[chosen] = np.arange(wanted)
    partition = allotment.partition_from(client_of[position], wanted, min_examples, key)
    return replace(partition, column=column, owner_ids=ids[chosen].astype(np.int64))


def _random_of_sizes(num_examples: int, sizes: Indices, min_examples: int, key: int) -> Partition:
    """A random sample of ``sizes[k]`` examples for each client k."""
    one_group = np.zeros(num_examples, dtype=np.int64)
    owner = allotment.deal(one_group, sizes[:, None], rng.fold(key, "deal"))
    return allotment.partition_from(owner, len(sizes), min_examples, rng.fold(key, "repair"))


SPLITS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity": quantity,
    "label-quantity": label_quantity,
    "feature-noise": feature_noise,
    "natural": natural,
    "file": from_file,
}
