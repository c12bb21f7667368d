"""How totals become whole numbers, and whole numbers become index arrays, for millions of clients at once.

While a split is being made, it is one *owner* array: owner[i] is the client of example i, -1 if nobody's. That form
cannot hold an example twice, and numpy can work on it without a loop over clients.
"""

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import gammaincinv, gammaln  # type: ignore[import-untyped]

from fedsim import rng
from fedsim.records import Indices, Partition

Floats = npt.NDArray[np.float64]

LOG_TINY = -40.0  # below e^-40 the first term of the incomplete gamma series is exact to double precision
SMALLEST_UNIFORM = 2.0**-54  # stands for a draw of 0: half the spacing of the draws


def largest_remainder(totals: Indices, weights: Indices | Floats) -> Indices:
    """Share out each total in whole numbers, in proportion to weights (Hamilton's method).

    Part k of group g gets ``floor(totals_g w_kg / sum_k w_kg)``; what is left goes, one each, to the largest
    remainders, the first part first where they tie. Whole-number weights are exact, but tie easily, and ties favour
    low numbers: see :func:`share_out`.

    Args:
        totals: int64 (groups,), >= 0. ``totals * weights`` has to fit the weights' type.
        weights: int64 or float64 (parts, groups), >= 0.

    Returns:
        int64 (parts, groups). Each column sums to its total, or to 0 where all of its weights are 0.

    >>> largest_remainder(np.array([7]), np.array([[2], [1], [1]])).ravel().tolist()
    [3, 2, 2]
    """
    sums = weights.sum(axis=0)
    totals = np.where(sums > 0, totals, 0)
    quotient, remainder = np.divmod(totals * weights, np.where(sums > 0, sums, 1))
    shares = quotient.astype(np.int64)
    rank = np.empty_like(shares)
    order = np.argsort(-remainder, axis=0, kind="stable")
    np.put_along_axis(rank, order, np.arange(len(shares), dtype=np.int64)[:, None], axis=0)
    return np.asarray(shares + (rank < totals - shares.sum(axis=0)))


def share_out(totals: Indices, weights: Indices | Floats, key: int) -> Indices:
    """Share out each total in whole numbers, in proportion to weights, so that each part's own sum comes out, too.

    As :func:`largest_remainder`, part k of group g gets ``floor(a_kg)`` or one more, ``a_kg = totals_g w_kg /
    sum_k w_kg``. But what is left of a group goes to those parts that are then owed most: their remainder here plus
    what rounding kept from them in the groups before. Groups are taken in random order and ties broken by lot, so
    that no part is better off for its number. With one group this is Hamilton's method.

    Args:
        totals: int64 (groups,), >= 0. ``totals * weights`` has to fit the weights' type.
        weights: int64 or float64 (parts, groups), >= 0.
        key: of the order and the lots.

    Returns:
        int64 (parts, groups). Each column sums to its total, or to 0 where all of its weights are 0; row k sums to
        nearly ``sum_g a_kg``.

    >>> share_out(np.array([2, 2]), np.array([[1, 1], [1, 1], [1, 1], [1, 1]]), key=5).sum(axis=1).tolist()
    [1, 1, 1, 1]
    """
    sums = weights.sum(axis=0)
    shares = np.zeros(weights.shape, dtype=np.int64)
    owed = np.zeros(len(weights))
    for group in rng.permutation(rng.fold(key, "order"), len(totals)).tolist():
        if sums[group] <= 0:
            continue
        quotient, remainder = np.divmod(totals[group] * weights[:, group], sums[group])
        shares[:, group] = quotient
        owed += remainder / sums[group]
        rounded = np.flatnonzero(remainder)
        drawn = rounded[rng.permutation(rng.fold(key, "lot", group), len(rounded)).numpy()]
        left_over = totals[group] - shares[:, group].sum()
        takers = drawn[np.argsort(-owed[drawn], kind="stable")][:left_over]
        shares[takers, group] += 1
        owed[takers] -= 1
    return shares


def shares_of(log_weights: Floats, axis: int) -> Floats:
    """``exp(x) / sum exp(x)`` along an axis, safe for any finite ``x``."""
    weights = np.exp(log_weights - log_weights.max(axis=axis, keepdims=True))
    return np.asarray(weights / weights.sum(axis=axis, keepdims=True))


def log_gamma_draws(key: int, shape_parameter: Floats) -> Floats:
    """Logarithms of Gamma(a, 1) draws by inversion: ``log P^-1(a, u)``, P the regularised lower incomplete gamma.

    For small a the draw underflows (a = 0.001: most are below 1e-308), the logarithm does not. There
    ``P(a, x) = x^a / Gamma(a + 1) * (1 - a x / (a + 1) + ...)``, so that ``log x = (log u + log Gamma(a + 1)) / a``.

    Args:
        key: a key.
        shape_parameter: float64, any shape, > 0.

    Returns:
        float64 of the same shape, finite for a >= 1e-300.
    """
    a = shape_parameter
    u = np.maximum(rng.uniform(key, a.size, dtype=torch.float64).numpy().reshape(a.shape), SMALLEST_UNIFORM)
    first_term = (np.log(u) + gammaln(a + 1)) / a
    is_tiny = first_term < LOG_TINY
    exact = np.log(gammaincinv(a, np.where(is_tiny, 0.5, u)), where=~is_tiny, out=np.zeros_like(u))
    return np.asarray(np.where(is_tiny, first_term, exact))


def rank_in_group(groups: Indices, key: int) -> Indices:
    """Place of each element among those of its group, from 0, in a random order: int64 (n,).

    Args:
        groups: int64 (n,), >= 0.
        key: decides the order.
    """
    order = shuffled_by_group(groups, key)
    sizes = np.bincount(groups)
    rank = np.empty_like(groups)
    rank[order] = np.arange(len(groups), dtype=np.int64) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def shuffled_by_group(groups: Indices, key: int) -> Indices:
    """Positions 0..n-1 sorted by group, in random order within each group: int64 (n,)."""
    order = rng.permutation(key, len(groups)).numpy()
    return np.asarray(order[np.argsort(groups[order], kind="stable")])


def deal(groups: Indices, amounts: Indices, key: int) -> Indices:
    """Deal the examples of each group to clients in random order, ``amounts[k, g]`` of group g to client k.

    Args:
        groups: int64 (n,): group of each example, in [0, number of groups).
        amounts: int64 (clients, number of groups), >= 0; no column sums to more than its group holds.
        key: decides the order.

    Returns:
        Owner array int64 (n,); -1 for examples that are left over.
    """
    left_over = np.bincount(groups, minlength=amounts.shape[1]) - amounts.sum(axis=0)
    who = np.append(np.arange(len(amounts), dtype=np.int64), -1)
    how_many = np.vstack([amounts, left_over])  # (clients + 1, groups)
    owner = np.empty(len(groups), dtype=np.int64)
    owner[shuffled_by_group(groups, key)] = np.repeat(np.tile(who, amounts.shape[1]), how_many.T.ravel())
    return owner


def raise_to(sizes: Indices, minimum: int, key: int) -> Indices:
    """The sizes after clients below a minimum took single examples from whoever was then the largest.

    Taking one at a time from the largest lowers all large clients to one level; the level is found by bisection, and
    where it does not come out even, some of them, chosen by lot, keep one more.

    Args:
        sizes: int64 (clients,), sum >= clients * minimum.
        minimum: >= 0.
        key: of the lot.

    Returns:
        int64 (clients,), same sum, none below the minimum.

    >>> raise_to(np.array([0, 9, 1, 6]), 3, key=1).tolist()
    [3, 5, 3, 5]
    """
    missing = int(np.maximum(minimum - sizes, 0).sum())
    low, high = minimum, int(sizes.max(initial=minimum))  # cutting at ``low`` always frees enough
    while low < high:
        level = (low + high + 1) // 2
        enough = int(np.maximum(sizes - level, 0).sum()) >= missing
        low, high = (level, high) if enough else (low, level - 1)
    spare = int(np.maximum(sizes - low, 0).sum()) - missing
    raised = np.clip(sizes, minimum, low)
    lowered = np.flatnonzero(sizes > low)
    raised[lowered[rng.choice(key, len(lowered), spare).numpy()]] += 1
    return raised


def partition_from(owner: Indices, num_clients: int, min_examples: int, key: int) -> Partition:
    """The partition that an owner array describes, repaired so that each client has its minimum.

    Repair: see :func:`raise_to` for how many examples move; which of a client's examples move, and to whom, is drawn
    with ``key``. A split that needs no repair is not touched.

    Args:
        owner: int64 (n,), in [-1, clients); at least clients * min_examples are owned.
        num_clients: >= 1.
        min_examples: >= 0.
        key: a key.

    Returns:
        Partition; each client's indices ascend.
    """
    owned = np.flatnonzero(owner >= 0)
    holder = owner[owned]
    sizes = np.bincount(holder, minlength=num_clients).astype(np.int64)
    if int(sizes.min()) < min_examples:
        wanted = raise_to(sizes, min_examples, rng.fold(key, "spare"))
        freed = rank_in_group(holder, rng.fold(key, "freed")) >= wanted[holder]
        takers = np.repeat(np.arange(num_clients, dtype=np.int64), np.maximum(wanted - sizes, 0))
        holder[freed] = takers[rng.permutation(rng.fold(key, "takers"), len(takers)).numpy()]
        sizes = wanted
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    return Partition(offsets, owned[np.argsort(holder, kind="stable")])
