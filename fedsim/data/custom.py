"""Your own data from a Python function, named in the config as ``dataset: package.module:function``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from fedsim.data.checks import check
from fedsim.data.files import Array, from_arrays
from fedsim.errors import DataError
from fedsim.records import Dataset

_ACCEPTED = (
    "a fedsim Dataset, a map-style torch Dataset or a pair (train, test) of them, arrays (x, y) or "
    "(x_train, y_train, x_test, y_test), or a dict of such names and column_<name>"
)


def from_callable(result: object, source: str) -> Dataset:
    """The dataset in what a user's function returned.

    Accepted: a :class:`fedsim.records.Dataset`, taken as it is; a map-style torch dataset of (input, label) pairs, or
    a pair (train, test) of them, read item by item; arrays or tensors ``(x, y)`` or ``(x_train, y_train, x_test,
    y_test)``; a dict with such names and columns. Everything but the first goes by the rules of
    :func:`fedsim.data.files.from_arrays`.

    Args:
        result: what the function returned.
        source: the function as the config names it; names the dataset, too.

    Raises:
        DataError: names ``source``, and says what came back or which rule it breaks.
    """
    if isinstance(result, Dataset):
        check(replace(result, name=source))
        return result
    return from_arrays(source, _arrays(result, source), source)


def _arrays(result: object, source: str) -> dict[str, Array]:
    match result:
        case Mapping():
            return {str(name): _array(value, f"{source}: {name}") for name, value in result.items()}
        case TorchDataset():
            return _stacked(result, "", source)
        case (TorchDataset() as train, TorchDataset() as test):
            return _stacked(train, "_train", source) | _stacked(test, "_test", source)
        case (x, y):
            named = {"x": x, "y": y}
        case (x_train, y_train, x_test, y_test):
            named = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        case _:
            raise DataError(f"{source}: must return {_ACCEPTED}; got {_described(result)}")
    return {name: _array(value, f"{source}: {name}") for name, value in named.items()}


def _stacked(dataset: TorchDataset[Any], suffix: str, source: str) -> dict[str, Array]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise DataError(f"{source}: a torch Dataset needs __len__ and __getitem__, {type(dataset).__name__} lacks them")
    inputs, labels = [], []
    for i in range(len(dataset)):
        item = dataset[i]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"{source}: item {i} must be a pair (input, label), got {_described(item)}")
        inputs.append(_array(item[0], f"{source}: input of item {i}"))
        labels.append(_array(item[1], f"{source}: label of item {i}"))
    if not inputs:
        raise DataError(f"{source}: {type(dataset).__name__} is empty")
    try:
        return {f"x{suffix}": np.stack(inputs), f"y{suffix}": np.stack(labels)}
    except ValueError as error:
        raise DataError(f"{source}: the items of {type(dataset).__name__} differ in shape") from error


def _array(value: object, what: str) -> Array:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{what} must be an array: {error}") from error
    if array.dtype.kind not in "fiuU":
        raise DataError(f"{what} must be an array of numbers, got {_described(value)}")
    return array


def _described(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(part).__name__ for part in value[:4])}"
    return f"{type(value).__name__} {value!r:.60}"
