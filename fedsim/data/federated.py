"""A dataset and a partition put together: what clients train on, and what each of them is tested on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.data import allotment
from fedsim.data.heterogeneity import label_counts
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples, Indices, Partition

NOISE_CHUNK = 1 << 20  # entries of the inputs that get noise at once; bounds the float64 draws to some 50 MB


@dataclass(frozen=True)
class FederatedData:
    """Examples with their owners.

    train: what clients train on, with each owner's noise where the partition has any.
    test: what the global model is tested on; never noisy.
    partition, test_partition: who trains, and who is tested, on which examples.
    client_test: what ``test_partition`` points into: ``test`` itself, or a copy with the owners' noise.
    """

    train: Examples
    test: Examples
    partition: Partition
    test_partition: Partition
    client_test: Examples
    num_classes: int
    class_names: tuple[str, ...]

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.partition.num_clients

    def client(self, k: int) -> Examples:
        """What client k trains on, copied."""
        return self.train.take(torch.from_numpy(self.partition.client(k)))


def hold_out(dataset: Dataset, test_fraction: float, key: int) -> Dataset:
    """Give a dataset without a test set one, drawn from its training examples; any other comes back as it is.

    Args:
        dataset: id columns are split along with the examples.
        test_fraction: in (0, 1); ``round(fraction * n)`` examples, but at least 1 on either side.
        key: decides which. Both sides keep the dataset's order.

    Raises:
        DataError: fewer than two examples.
        ValueError: the fraction is not in (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be in (0, 1), got {test_fraction}")
    if dataset.test is not None:
        return dataset
    n = len(dataset.train)
    if n < 2:
        raise DataError(f"data.test_fraction: holding out a test set needs at least 2 examples, got {n}")
    is_test = torch.zeros(n, dtype=torch.bool)
    is_test[rng.choice(key, n, min(max(round(test_fraction * n), 1), n - 1))] = True
    test, train = torch.nonzero(is_test)[:, 0], torch.nonzero(~is_test)[:, 0]
    return replace(
        dataset,
        train=dataset.train.take(train),
        test=dataset.train.take(test),
        columns={name: ids[train.numpy()] for name, ids in dataset.columns.items()},
        test_columns={name: ids[test.numpy()] for name, ids in dataset.columns.items()},
    )


def assemble(dataset: Dataset, partition: Partition, key: int) -> FederatedData:
    """Put a dataset and a partition of its training examples together.

    Feature noise is drawn here, once: client k's inputs get ``noise_std[k] * N(0, 1)``, from a key per example.

    Args:
        dataset: with a test set.
        partition: of ``dataset.train``.
        key: for the test examples' owners and the noise.

    Raises:
        DataError: noise on inputs that are not floating point.
        ValueError: the dataset has no test set.
    """
    if dataset.test is None:
        raise ValueError(f"dataset {dataset.name} has no test set; hold one out first")
    test_partition = assign_test(
        dataset.train.labels, partition, dataset.test.labels, dataset.test_columns, rng.fold(key, "test owners")
    )
    return FederatedData(
        train=with_noise(dataset.train, partition, rng.fold(key, "train noise")),
        test=dataset.test,
        partition=partition,
        test_partition=test_partition,
        client_test=with_noise(dataset.test, test_partition, rng.fold(key, "test noise")),
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
    )


def assign_test(
    train_labels: Tensor,
    partition: Partition,
    test_labels: Tensor,
    test_columns: Mapping[str, Indices],
    key: int,
) -> Partition:
    """Whose local test set each test example is in; no example is in two.

    After a natural split, the owner named in the test set's id column, if it has that column. Otherwise the test
    examples of each class are dealt out in random order, in proportion to how many training examples of that class
    each client holds, so that a client is tested on its own label mix. Labels of sequences: in proportion to the
    clients' sizes. Whole numbers come from :func:`fedsim.data.allotment.share_out`, so that clients of one size get
    test sets of nearly one size, whatever their number. A client whose part of the test set is below one example may
    end up with none; that cannot be helped where there are more clients than test examples.

    Args:
        train_labels: int64 (n,) or (n, time).
        partition: of the n training examples.
        test_labels: int64 (m,) or (m, time).
        test_columns: id columns, int64 (m,) each.
        key: decides the order, and who gets one more where numbers are rounded.

    Returns:
        Partition of the m test examples with the noise of ``partition``; test examples of nobody's owner or class
        are left out.
    """
    ids = None if partition.column is None else test_columns.get(partition.column)
    if ids is not None and partition.owner_ids is not None:
        owner = _position_of(ids, partition.owner_ids)
    else:
        if test_labels.ndim == 1:
            unlabelled = 1 + max(int(train_labels.max()), int(test_labels.max()), -1)  # a class nobody holds
            groups = np.where(test_labels.numpy() < 0, unlabelled, test_labels.numpy())
            held = label_counts(train_labels, partition, unlabelled + 1)
        else:
            groups, held = np.zeros(len(test_labels), dtype=np.int64), partition.sizes()[:, None]
        totals = np.bincount(groups, minlength=held.shape[1])
        amounts = allotment.share_out(totals, held, rng.fold(key, "rounding"))
        owner = allotment.deal(groups, amounts, key)
    dealt = allotment.partition_from(owner, partition.num_clients, 0, key)
    return replace(dealt, noise_std=partition.noise_std, column=partition.column, owner_ids=partition.owner_ids)


def with_noise(examples: Examples, partition: Partition, key: int) -> Examples:
    """The examples with their owners' Gaussian noise on the inputs; the same object if the partition has none.

    Example i owned by client k becomes ``x_i + noise_std[k] * z_i``, ``z_i`` standard normal drawn from
    ``fold(key, i)``, so it does not depend on who else holds what. Examples without owner stay clean.

    Raises:
        DataError: inputs are not floating point.
    """
    if partition.noise_std is None:
        return examples
    inputs = examples.inputs
    if not inputs.is_floating_point():
        raise DataError(f"data.split: feature-noise needs floating-point inputs, got {inputs.dtype}")
    noisy = inputs.clone()
    indices = torch.from_numpy(partition.indices)
    std = torch.from_numpy(partition.noise_std[partition.owners()]).to(inputs.dtype)
    keys = rng.fold_tensor(rng.as_tensor(key), indices)
    shape = inputs.shape[1:]
    draw = torch.func.vmap(lambda one: rng.normal(one, *shape))  # (chunk, *shape)
    per_chunk = max(NOISE_CHUNK // max(math.prod(shape), 1), 1)
    for start in range(0, len(indices), per_chunk):
        chunk = slice(start, start + per_chunk)
        scale = std[chunk].reshape(-1, *[1] * len(shape))
        noisy[indices[chunk]] += scale * draw(keys[chunk]).to(inputs.dtype)
    return Examples(noisy, examples.labels)


def _position_of(ids: Indices, sorted_ids: Indices) -> Indices:
    """Index of each id in ``sorted_ids``, -1 where it is not there: int64 (m,)."""
    position = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[position] == ids, position, -1)
