"""CIFAR-10 and CIFAR-100 from the official Python archives, packed or unpacked.

The archives hold pickles, and a pickle can run any code when it is loaded. These are loaded by an unpickler that knows
four names, all of them needed to build a numpy array, and refuses every other.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsim.data import download, locations
from fedsim.data.checks import check, check_labels
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


@dataclass(frozen=True)
class _Layout:
    """Where one of the two archives keeps what. Keys are bytes because Python 2 wrote the pickles."""

    name: str
    archive: str
    digest: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    labels: bytes
    class_names: bytes
    num_classes: int


_CIFAR10 = _Layout(
    name="cifar10",
    archive="cifar-10-python.tar.gz",
    digest="md5:c58f30108f718f92721af3b95e74349a",  # of the archive, as its publisher's page gives it
    folder="cifar-10-batches-py",
    train=("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"),
    test=("test_batch",),
    meta="batches.meta",
    labels=b"labels",
    class_names=b"label_names",
    num_classes=10,
)
_CIFAR100 = _Layout(
    name="cifar100",
    archive="cifar-100-python.tar.gz",
    digest="md5:eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train=("train",),
    test=("test",),
    meta="meta",
    labels=b"fine_labels",
    class_names=b"fine_label_names",
    num_classes=100,
)
_PUBLISHER = "https://www.cs.toronto.edu/~kriz/"


def cifar10(root: Path | None = None, progress: download.Progress = download.silent) -> Dataset:
    """CIFAR-10: 50,000 + 10,000 colour photographs of 10 classes, 32 x 32, from the official archive or downloaded.

    Args:
        root: ``data.root``: folder with cifar-10-python.tar.gz, or with or being the unpacked cifar-10-batches-py;
            None: ``$FEDSIM_DATA``, the user cache, then download.
        progress: told about a download.

    Returns:
        Inputs float32 (n, 3, 32, 32) in [0, 1], red, green, blue; labels 0-9.

    Raises:
        DataError: a file is missing or damaged, or a download failed.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images", chapter 3.
        Differs: none.
    """
    return _load(_CIFAR10, root, progress)


def cifar100(root: Path | None = None, progress: download.Progress = download.silent) -> Dataset:
    """CIFAR-100: 50,000 + 10,000 colour photographs of 100 classes, 32 x 32, from the official archive or downloaded.

    Args:
        root: ``data.root``: folder with cifar-100-python.tar.gz, or with or being the unpacked cifar-100-python;
            None: ``$FEDSIM_DATA``, the user cache, then download.
        progress: told about a download.

    Returns:
        Inputs float32 (n, 3, 32, 32) in [0, 1], red, green, blue; labels 0-99, the fine ones.

    Raises:
        DataError: a file is missing or damaged, or a download failed.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images", chapter 3.
        Differs: none.
    """
    return _load(_CIFAR100, root, progress)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and Python's own containers, numbers and strings. Refuses everything else."""

    _allowed: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012  (a constant)
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return self._allowed[module, name]


def unpickle(content: bytes, what: str) -> dict[bytes, Any]:
    """The dict in a pickle of arrays, without running code from it.

    Args:
        content: the pickle; strings written by Python 2 come out as bytes.
        what: named in errors.

    Raises:
        DataError: the pickle is damaged, names something beyond numpy arrays, or holds no dict.
    """
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (
        Exception
    ) as error:  # damaged pickles raise nearly anything: EOFError, KeyError, TypeError, UnicodeError, ...
        raise DataError(f"{what}: not a pickle of arrays: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{what}: expected a dict, got {type(found).__name__}")
    return found


def _load(layout: _Layout, root: Path | None, progress: download.Progress) -> Dataset:
    first = layout.train[0]
    paths = locations.locate(layout.name, root, [[f"{layout.folder}/{first}", layout.archive, first]])
    path = paths[0] if paths else locations.cache_folder(layout.name) / layout.archive
    if paths is None:
        download.fetch([_PUBLISHER + layout.archive], path, digest=layout.digest, progress=progress)
    wanted = (*layout.train, *layout.test, layout.meta)
    members = _from_archive(path, wanted) if path.name == layout.archive else _from_folder(path.parent, wanted)
    meta = unpickle(members[layout.meta], f"{path}: {layout.meta}")
    dataset = Dataset(
        layout.name,
        _examples(layout, members, layout.train, path),
        _examples(layout, members, layout.test, path),
        layout.num_classes,
        class_names=tuple(name.decode() for name in meta.get(layout.class_names, ())),
    )
    check(dataset)
    return dataset


def _from_folder(folder: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in wanted}
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _from_archive(path: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Members by their last name, in one pass; nothing is unpacked to disk."""
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if (name := Path(member.name).name) in wanted and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if missing := sorted(set(wanted) - found.keys()):
        raise DataError(f"{path}: has no {', '.join(missing)}")
    return found


def _examples(layout: _Layout, members: dict[str, bytes], names: Sequence[str], path: Path) -> Examples:
    batches = [_batch(members[name], f"{path}: {name}", layout) for name in names]
    pixels = np.concatenate([pixels for pixels, _ in batches])  # (n, 3072) uint8
    inputs = torch.from_numpy(pixels.reshape(-1, 3, _SIDE, _SIDE)).to(torch.float32).div_(255)
    return Examples(inputs, torch.cat([labels for _, labels in batches]))


def _batch(content: bytes, what: str, layout: _Layout) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], torch.Tensor]:
    batch = unpickle(content, what)
    pixels, labels = batch.get(b"data"), batch.get(layout.labels)
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        raise DataError(f"{what}: b'data' must be a uint8 array (n, {_PIXELS})")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(label) is int for label in labels):
        raise DataError(f"{what}: {layout.labels!r} must be a list of {len(pixels)} integers")
    targets = torch.tensor(labels, dtype=torch.int64)
    check_labels(targets, layout.num_classes, f"{what}: {layout.labels!r}")
    return pixels, targets
