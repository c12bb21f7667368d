"""The rules every dataset keeps, in one place: shapes, dtypes, label ranges, finite inputs, columns."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import DataError
from fedsim.records import IGNORED, Dataset, Examples, Indices


def check(dataset: Dataset) -> None:
    """Refuse a dataset that breaks one of the rules in :mod:`fedsim.records`.

    Rules: at least one training example; as many labels as inputs; inputs float32 or int64, and finite; labels int64
    in [0, num_classes), or -100 at positions to be left out; train and test alike in shape and dtype; one id >= 0 per
    example in each column, and a test column only next to the training column of that name.

    Args:
        dataset: of any size; every value is looked at once.

    Raises:
        DataError: names the dataset, the part, the rule and the first value that breaks it.
    """
    if dataset.num_classes < 1:
        raise DataError(f"{dataset.name}: num_classes must be >= 1, got {dataset.num_classes}")
    _check_examples(dataset.train, dataset.num_classes, f"{dataset.name}: train")
    _check_columns(dataset.columns, len(dataset.train), f"{dataset.name}: columns")
    if dataset.test is None:
        if dataset.test_columns:
            raise DataError(f"{dataset.name}: test_columns {sorted(dataset.test_columns)} without a test part")
    else:
        _check_examples(dataset.test, dataset.num_classes, f"{dataset.name}: test")
        _check_alike(dataset.train, dataset.test, dataset.name)
        _check_columns(dataset.test_columns, len(dataset.test), f"{dataset.name}: test_columns")
        if unknown := sorted(dataset.test_columns.keys() - dataset.columns.keys()):
            raise DataError(f"{dataset.name}: test_columns {unknown} have no training column of that name")
    if dataset.class_names and len(dataset.class_names) != dataset.num_classes:
        raise DataError(f"{dataset.name}: {len(dataset.class_names)} class names for {dataset.num_classes} classes")


def check_finite(inputs: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        DataError: names ``what`` and the index and value of the first.
    """
    if inputs.is_floating_point() and not bool((finite := torch.isfinite(inputs)).all()):
        index = tuple(torch.nonzero(~finite)[0].tolist())
        raise DataError(f"{what} must be finite, got {float(inputs[index])} at index {index}")


def check_labels(labels: Tensor, num_classes: int, what: str) -> None:
    """Refuse labels outside [0, num_classes) other than -100.

    Raises:
        DataError: names ``what`` and the index and value of the first.
    """
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != IGNORED)
    if bool(wrong.any()):
        index = tuple(torch.nonzero(wrong)[0].tolist())
        raise DataError(f"{what} must be in [0, {num_classes}), got {int(labels[index])} at index {index}")


def _check_examples(examples: Examples, num_classes: int, what: str) -> None:
    inputs, labels = examples.inputs, examples.labels
    if inputs.ndim == 0 or labels.ndim == 0:
        raise DataError(f"{what}: inputs and labels need a leading axis over examples")
    if inputs.shape[0] != labels.shape[0]:
        raise DataError(f"{what}: {inputs.shape[0]} inputs but {labels.shape[0]} labels")
    if len(labels) == 0:
        raise DataError(f"{what}: at least one example is needed, got none")
    if inputs.dtype not in (torch.float32, torch.int64):
        raise DataError(f"{what}: inputs must be float32 or int64, got {inputs.dtype}")
    if labels.dtype != torch.int64 or labels.ndim > 2:
        raise DataError(f"{what}: labels must be int64 (n,) or (n, time), got {labels.dtype} {tuple(labels.shape)}")
    check_finite(inputs, f"{what}: inputs")
    check_labels(labels, num_classes, f"{what}: labels")


def _check_alike(train: Examples, test: Examples, name: str) -> None:
    for part in ("inputs", "labels"):
        a, b = getattr(train, part), getattr(test, part)
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise DataError(
                f"{name}: {part} differ: train {a.dtype} {tuple(a.shape[1:])}, test {b.dtype} {tuple(b.shape[1:])} each"
            )


def _check_columns(columns: Mapping[str, Indices], length: int, what: str) -> None:
    for name, ids in columns.items():
        if ids.dtype != np.int64 or ids.shape != (length,):
            raise DataError(f"{what}[{name!r}] must be int64 ({length},), got {ids.dtype} {ids.shape}")
        if length and int(ids.min()) < 0:
            raise DataError(f"{what}[{name!r}]: ids must be >= 0, got {int(ids.min())} at {int(ids.argmin())}")
