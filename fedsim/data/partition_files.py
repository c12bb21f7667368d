"""Partitions from outside: checked, built from lists, and kept in files.

A file holds a fingerprint of the labels it was made for, so that it cannot be used on another dataset, another
held-out part or another order of the same examples without anybody noticing.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from annotated_types import Ge
from torch import Tensor

from fedsim.errors import DataError
from fedsim.records import Partition

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def check(partition: Partition, num_examples: int, num_clients: int | None, min_examples: int) -> None:
    """Refuse a partition that is not one: wrong arrays, indices out of range or twice, clients too small or too many.

    Args:
        partition: to check.
        num_examples: n; indices must lie in [0, n).
        num_clients: how many it must have; None for any number >= 1.
        min_examples: each client must have at least so many.

    Raises:
        DataError: names the rule and the first value that breaks it.
    """
    _check_arrays(partition)
    clients = partition.num_clients
    if clients < 1 or (num_clients is not None and clients != num_clients):
        wanted = "at least 1" if num_clients is None else num_clients
        raise DataError(f"data.clients: the partition has {clients} clients, expected {wanted}")
    indices, sizes = partition.indices, partition.sizes()
    outside = (indices < 0) | (indices >= num_examples)
    if outside.any():
        raise DataError(f"data.split: indices must lie in [0, {num_examples}), got {indices[outside][0]}")
    times = np.bincount(indices, minlength=num_examples)
    if (times > 1).any():
        example = int(np.argmax(times > 1))
        raise DataError(f"data.split: no example may be held twice, example {example} is held {times[example]} times")
    if (sizes < min_examples).any():
        client = int(np.argmax(sizes < min_examples))
        raise DataError(
            f"data.split.min_examples: each client needs at least {min_examples} examples, "
            f"client {client} has {sizes[client]}"
        )


def _check_arrays(partition: Partition) -> None:
    """Dtypes, shapes and the offsets."""
    offsets, indices = partition.offsets, partition.indices
    for name, array in (("offsets", offsets), ("indices", indices)):
        if array.dtype != np.int64 or array.ndim != 1:
            raise DataError(f"data.split: {name} must be int64 (n,), got {array.dtype} {array.shape}")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(indices) or (np.diff(offsets) < 0).any():
        raise DataError(f"data.split: offsets must ascend from 0 to {len(indices)}, got {offsets}")
    noise = partition.noise_std
    if noise is not None and (noise.shape != (len(offsets) - 1,) or not (np.isfinite(noise) & (noise >= 0)).all()):
        raise DataError(f"data.split: noise_std must be one finite number >= 0 per client, got {noise}")
    if partition.owner_ids is not None and partition.owner_ids.shape != (len(offsets) - 1,):
        raise DataError(f"data.split: owner_ids must be one id per client, got shape {partition.owner_ids.shape}")


def from_lists(lists: Sequence[npt.ArrayLike]) -> Partition:
    """A partition from one list, array or tensor of indices per client, as a user's own split may return it.

    Raises:
        DataError: a client's indices are not whole numbers in one dimension.

    >>> from_lists([[4, 0], [2]]).sizes().tolist()
    [2, 1]
    """
    arrays = [np.asarray(one) for one in lists]
    for client, array in enumerate(arrays):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            got = f"{array.dtype} {array.shape}"
            raise DataError(f"data.split: the indices of client {client} must be whole numbers (n,), got {got}")
    sizes = np.array([0, *map(len, arrays)], dtype=np.int64)
    indices = np.concatenate([np.empty(0, dtype=np.int64), *(array.astype(np.int64) for array in arrays)])
    return Partition(np.cumsum(sizes), indices)


def fingerprint(labels: Tensor) -> str:
    """SHA-256 of the labels' shape and values, in order."""
    digest = hashlib.sha256(repr(tuple(labels.shape)).encode())
    digest.update(np.ascontiguousarray(labels.numpy(), dtype="<i8").tobytes())
    return digest.hexdigest()


def save(partition: Partition, labels: Tensor, path: str | Path) -> None:
    """Write a partition of these labels to an .npz file, whole or not at all.

    Args:
        partition: to keep.
        labels: of the training examples that it splits.
        path: of the file; its folder must exist.
    """
    entries = {"offsets": partition.offsets, "indices": partition.indices, "fingerprint": np.array(fingerprint(labels))}
    optional = {"noise_std": partition.noise_std, "owner_ids": partition.owner_ids}
    entries |= {name: array for name, array in optional.items() if array is not None}
    if partition.column is not None:
        entries["column"] = np.array(partition.column)
    path = Path(path)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **entries)  # type: ignore[arg-type]
    unfinished.replace(path)


def load(path: str | Path, labels: Tensor, num_clients: int | None = None, min_examples: int = 0) -> Partition:
    """Read a partition that :func:`save` wrote, and refuse it where it does not fit.

    Args:
        path: of the file.
        labels: of the training examples now at hand; must be those it was saved with, in the same order.
        num_clients: how many it must have; None for any number.
        min_examples: each client must have at least so many.

    Raises:
        DataError: the file is missing, damaged, made for other labels, or fails :func:`check`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            entries = {name: file[name] for name in file.files}
        partition = Partition(
            offsets=entries["offsets"],
            indices=entries["indices"],
            noise_std=entries.get("noise_std"),
            column=str(entries["column"]) if "column" in entries else None,
            owner_ids=entries.get("owner_ids"),
        )
        made_for = str(entries["fingerprint"])
    except FileNotFoundError as error:
        raise DataError(f"data.split.path: file {path} does not exist") from error
    except _UNREADABLE as error:
        raise DataError(f"data.split.path: {path} is not a readable partition file: {error}") from error
    if made_for != fingerprint(labels):
        raise DataError(
            f"data.split.path: {path} was made for other training examples than these {len(labels)}, "
            "or for another order of them (another seed holds out another part; data.seed keeps it)"
        )
    check(partition, len(labels), num_clients, min_examples)
    return partition


def from_file(
    labels: Tensor,
    num_clients: int | None,
    *,
    path: str,
    min_examples: Annotated[int, Ge(1)] = 1,
) -> Partition:
    """A partition that was saved to a file; it must have been made for exactly these training examples.

    Args:
        labels: (n, ...) of the training examples.
        num_clients: how many the file must have; None for any number.
        path: of the .npz file.
        min_examples: each client must have at least so many.

    Raises:
        DataError: as :func:`load`.
    """
    return load(path, labels, num_clients, min_examples)
