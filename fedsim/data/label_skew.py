"""Splits that give each client its own mix of labels."""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedsim import rng
from fedsim.data import allotment
from fedsim.data.allotment import Floats
from fedsim.data.requirements import check_clients, check_range, classes_of
from fedsim.errors import DataError
from fedsim.records import Indices, Partition

ALPHA_RANGE = (1e-6, 1e6)  # beyond: one client per class, or proportions equal to a thousandth
SIGMA_RANGE = (0.0, 100.0)


def dirichlet(
    labels: Tensor,
    num_clients: int | None,
    key: int,
    *,
    alpha: Annotated[float, Ge(1e-6), Le(1e6)],
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """Label skew: each class is shared out over the clients in proportions drawn from a Dirichlet distribution.

    For each class c, ``p_c ~ Dirichlet(alpha, ..., alpha)`` over clients, and client k gets the part ``p_ck`` of the
    examples of c, rounded by largest remainder. Client sizes vary. Covers every example. Where
    a class has fewer examples than there are clients, most parts are below one example, and rounding gives one each to
    the clients with the largest parts.

    Args:
        labels: int64 (n,), one class per example.
        num_clients: 1 to n.
        key: a key.
        alpha: in [1e-6, 1e6]; small: few clients hold a class; large: close to iid.
        min_examples: per client, >= 1 (0 from Python only); clients below it take examples from the largest.

    Raises:
        DataError: too few examples, or labels of another shape.

    Source: Yurochkin et al. 2019, "Bayesian Nonparametric Federated Learning of Neural Networks", section 4,
        arXiv:1905.12022. (In Hsu et al. 2019 each client draws over classes instead: see ``label-quantity``.)
        Differs: largest remainder instead of cutting at floor; repair instead of redrawing until all are large enough.
    """
    check_range("alpha", alpha, *ALPHA_RANGE)
    clients = check_clients("dirichlet", num_clients, len(labels), min_examples)
    classes, class_sizes = classes_of("dirichlet", labels)
    log_weights = allotment.log_gamma_draws(rng.fold(key, "shares"), np.full((clients, len(class_sizes)), alpha))
    amounts = allotment.largest_remainder(class_sizes, allotment.shares_of(log_weights, axis=0))
    owner = allotment.deal(classes, amounts, rng.fold(key, "deal"))
    return allotment.partition_from(owner, clients, min_examples, rng.fold(key, "repair"))


def shards(
    labels: Tensor,
    num_clients: int | None,
    key: int,
    *,
    shards_per_client: Annotated[int, Ge(1)] = 2,
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """Label skew: examples sorted by label are cut into shards, and each client is dealt a few (pathological non-iid).

    With S = clients * shards_per_client shards, place i of n in the sorted order lies in shard ``floor(i S / n)``, so
    shard sizes differ by at most 1. Examples of one label are in random order. Covers every example.

    Args:
        labels: int64 (n,), one class per example.
        num_clients: 1 to n.
        key: a key.
        shards_per_client: >= 1; S must not pass n.
        min_examples: per client, >= 1 (0 from Python only); clients below it take examples from the largest.

    Raises:
        DataError: too few examples, or labels of another shape.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        section 3, arXiv:1602.05629. Differs: n need not be divisible.
    """
    clients = check_clients("shards", num_clients, len(labels), min_examples)
    check_range("shards_per_client", shards_per_client, 1)
    total, n = clients * shards_per_client, len(labels)
    if total > n:
        raise DataError(
            f"data.split.shards_per_client: {clients} clients with {shards_per_client} shards each "
            f"need at least {total} training examples, but there are only {n}"
        )
    classes, _ = classes_of("shards", labels)
    order = allotment.shuffled_by_group(classes, rng.fold(key, "sort"))
    client_of_shard = rng.permutation(rng.fold(key, "deal"), total).numpy() % clients
    owner = np.empty(n, dtype=np.int64)
    owner[order] = client_of_shard[np.arange(n, dtype=np.int64) * total // n]
    return allotment.partition_from(owner, clients, min_examples, rng.fold(key, "repair"))


def label_quantity(
    labels: Tensor,
    num_clients: int | None,
    key: int,
    *,
    alpha: Annotated[float, Ge(1e-6), Le(1e6)],
    sigma: Annotated[float, Gt(0), Le(100)],
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """Label and quantity skew: log-normal client sizes, and each client draws its own label mix.

    Sizes: ``s_k`` proportional to ``exp(sigma z_k)``, ``z_k ~ N(0, 1)``, rounded by largest remainder to sum to n and
    raised to min_examples. Mix: ``q_k ~ Dirichlet(alpha C p)``, p the label shares of the whole data, C the number of
    classes; so for balanced data each of the C parameters is alpha, as in ``dirichlet``. Then all clients draw the
    class of each of their ``s_k`` examples from ``q_k``; a class that is asked for more often than it has examples
    serves as many requests as it can, chosen by lot; the requests left draw again from ``q_k`` restricted to classes
    that still have examples. Covers every example; a round either serves all or empties a class, so there are at
    most C rounds.

    Args:
        labels: int64 (n,), one class per example.
        num_clients: 1 to n.
        key: a key.
        alpha: in [1e-6, 1e6]; small: a client holds few classes.
        sigma: in (0, 100]; 0.5 gives sizes within a factor 7 for 95 % of clients.
        min_examples: per client, >= 1 (0 from Python only).

    Raises:
        DataError: too few examples, or labels of another shape.

    Source: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification", section 3, arXiv:1909.06335. Differs: all clients have one size there; they draw one after
        another, we draw for all at once; their alpha is our alpha * C.
    """
    check_range("alpha", alpha, *ALPHA_RANGE)
    clients = check_clients("label-quantity", num_clients, len(labels), min_examples)
    classes, class_sizes = classes_of("label-quantity", labels)
    sizes = log_normal_sizes(len(labels), clients, sigma, rng.fold(key, "sizes"))
    sizes = allotment.raise_to(sizes, min_examples, rng.fold(key, "spare"))
    concentration = alpha * len(class_sizes) * class_sizes / len(labels)
    log_mix = allotment.log_gamma_draws(
        rng.fold(key, "mix"), np.broadcast_to(concentration, (clients, len(class_sizes)))
    )
    amounts = _served(sizes, class_sizes, log_mix, rng.fold(key, "requests"))
    owner = allotment.deal(classes, amounts, rng.fold(key, "deal"))
    return allotment.partition_from(owner, clients, min_examples, key)


def log_normal_sizes(num_examples: int, num_clients: int, sigma: float, key: int) -> Indices:
    """Sizes proportional to ``exp(sigma z)``, z standard normal, that sum to num_examples: int64 (clients,)."""
    check_range("sigma", sigma, *SIGMA_RANGE, low_is_allowed=False)
    z = rng.normal(key, num_clients, dtype=torch.float64).numpy()
    shares = allotment.shares_of(sigma * z[:, None], axis=0)
    return allotment.share_out(np.array([num_examples]), shares, rng.fold(key, "ties"))[:, 0]


def _served(sizes: Indices, class_sizes: Indices, log_mix: Floats, key: int) -> Indices:
    """How many examples of each class each client gets: int64 (clients, classes), rows sum to ``sizes``."""
    amounts = np.zeros(log_mix.shape, dtype=np.int64)
    supply = class_sizes.copy()
    client = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)  # one entry per open request
    for attempt in range(len(class_sizes)):
        is_open = np.flatnonzero(supply > 0)
        asked = is_open[_draw_classes(client, log_mix[:, is_open], rng.fold(key, attempt, "draw"))]
        wins = allotment.rank_in_group(asked, rng.fold(key, attempt, "lot")) < supply[asked]
        np.add.at(amounts, (client[wins], asked[wins]), 1)
        supply -= np.bincount(asked[wins], minlength=len(supply))
        client = client[~wins]
        if not len(client):
            break
    return amounts


def _draw_classes(client: Indices, log_mix: Floats, key: int) -> Indices:
    """One class per request from its client's mix, by inversion: int64 (requests,), columns of ``log_mix``."""
    asking, row = np.unique(client, return_inverse=True)
    cumulative = np.cumsum(allotment.shares_of(log_mix[asking], axis=1), axis=1)
    cumulative /= cumulative[:, -1:]
    # Row r of the flat table covers (r, r + 1], so that one search serves all rows.
    table = (cumulative + np.arange(len(asking))[:, None]).ravel()
    u = rng.uniform(key, len(client), dtype=torch.float64).numpy()
    found = np.searchsorted(table, row + u, side="right") - row * log_mix.shape[1]
    return np.asarray(np.clip(found, 0, log_mix.shape[1] - 1))
