from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from fedsim.data.custom import from_callable
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples

SOURCE = "my.module:load"
X = np.array([[0.5, -1.0], [2.0, 3.0], [-4.0, 0.0]])
Y = np.array([1, 0, 2])


class Images(TorchDataset[tuple[np.ndarray, int]]):
    """Items as torchvision gives them: an image of bytes, channels last, and a Python integer."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((6, 5, 3), 51 * index, np.uint8), index % 2


class Ragged(Images):
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.zeros(index + 1), 0


class Stream(IterableDataset[tuple[int, int]]):
    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(1, 2)])


@pytest.mark.parametrize(
    "result",
    [
        (X, Y),
        [torch.tensor(X), torch.tensor(Y)],
        (X.tolist(), Y.tolist()),
        {"x": X, "y": torch.tensor(Y)},
        TensorDataset(torch.tensor(X), torch.tensor(Y)),
    ],
    ids=["arrays", "tensors", "lists", "dict", "torch dataset"],
)
def test_one_part_in_any_form_is_the_same_dataset(result: object) -> None:
    dataset = from_callable(result, SOURCE)
    assert (dataset.name, dataset.num_classes, dataset.test) == (SOURCE, 3, None)
    assert torch.equal(dataset.train.inputs, torch.tensor(X, dtype=torch.float32))
    assert dataset.train.labels.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    "result",
    [
        (X, Y, X[:2], Y[:2]),
        {"x_train": X, "y_train": Y, "x_test": X[:2], "y_test": Y[:2]},
        (
            TensorDataset(torch.tensor(X), torch.tensor(Y)),
            TensorDataset(torch.tensor(X[:2]), torch.tensor(Y[:2])),
        ),
    ],
    ids=["arrays", "dict", "torch datasets"],
)
def test_two_parts_in_any_form_are_the_same_dataset(result: object) -> None:
    dataset = from_callable(result, SOURCE)
    assert dataset.test is not None
    assert torch.equal(dataset.test.inputs, torch.tensor(X[:2], dtype=torch.float32))
    assert dataset.test.labels.tolist() == [1, 0]


def test_items_of_a_torch_dataset_may_be_images_of_bytes() -> None:
    dataset = from_callable(Images(), SOURCE)
    assert dataset.train.inputs.shape == (3, 3, 6, 5)
    assert float(dataset.train.inputs[2, 0, 0, 0]) == pytest.approx(0.4)
    assert dataset.train.labels.tolist() == [0, 1, 0]


def test_columns_in_a_dict_give_owners() -> None:
    dataset = from_callable({"x": X, "y": Y, "column_site": ["b", "a", "b"]}, SOURCE)
    assert dataset.columns["site"].tolist() == [1, 0, 1]


def test_a_fedsim_dataset_is_taken_as_it_is_once_checked() -> None:
    good = Dataset("mine", Examples(torch.zeros(2, 6, 6), torch.tensor([0, 1])), None, 2)
    assert from_callable(good, SOURCE) is good, "a (n, time, features) sequence stays one"
    bad = Dataset("mine", Examples(torch.zeros(2, 6, 6), torch.tensor([0, 2])), None, 2)
    with pytest.raises(DataError, match=r"my\.module:load: train: labels must be in \[0, 2\), got 2"):
        from_callable(bad, SOURCE)


BAD: dict[str, tuple[Any, str]] = {
    "nothing": (None, "must return a fedsim Dataset, .*; got NoneType None"),
    "number": (3, "got int 3"),
    "three": ((X, Y, X), "got a tuple of 3: ndarray, ndarray, ndarray"),
    "words": (("train", "test"), "array y: must be integers"),
    "ragged list": (([[1.0], [1.0, 2.0]], Y), "x must be an array"),
    "ragged items": (Ragged(), "the items of Ragged differ in shape"),
    "stream": (Stream(), "Stream lacks them"),
    "single items": (TensorDataset(torch.tensor(X)), r"item 0 must be a pair \(input, label\), got a tuple of 1"),
    "empty": (TensorDataset(torch.empty(0, 2), torch.empty(0)), "TensorDataset is empty"),
    "nan": ((X * np.nan, Y), r"array x must be finite, got nan at index \(0, 0\)"),
    "float labels": ((X, Y / 2), "array y: must be integers"),
    "wrong names": ({"inputs": X, "labels": Y}, r"needs arrays x, y or .*, got \['inputs', 'labels'\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_anything_else_is_an_error_that_names_the_function_and_what_came_back(case: str) -> None:
    result, message = BAD[case]
    with pytest.raises(DataError, match=rf"^my\.module:load: .*({message})"):
        from_callable(result, SOURCE)
