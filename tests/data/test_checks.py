from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.data.checks import check
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples


def examples(n: int) -> Examples:
    return Examples(torch.arange(2.0 * n).reshape(n, 2) - n, torch.arange(n) % 3)


GOOD = Dataset(
    name="mine",
    train=examples(5),
    test=examples(4),
    num_classes=3,
    columns={"who": np.array([0, 1, 1, 0, 2])},
    test_columns={"who": np.array([7, 0, 0, 2])},
    class_names=("a", "b", "c"),
)


def test_a_good_dataset_passes_with_and_without_test_part_and_with_positions_left_out() -> None:
    check(GOOD)
    check(replace(GOOD, test=None, test_columns={}))
    check(replace(GOOD, test=None, test_columns={}, train=Examples(GOOD.train.inputs, torch.full((5, 2), -100))))


def train(inputs: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Dataset:
    kept = GOOD.train
    part = Examples(kept.inputs if inputs is None else inputs, kept.labels if labels is None else labels)
    return replace(GOOD, train=part)


def with_value(value: float) -> torch.Tensor:
    inputs = GOOD.train.inputs.clone()
    inputs[3, 1] = value
    return inputs


BAD = {
    "counts differ": (train(labels=torch.arange(4) % 3), "mine: train: 5 inputs but 4 labels"),
    "nothing": (train(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)), "mine: train: at least one example"),
    "scalar": (train(torch.tensor(1.0), torch.tensor(1)), "leading axis"),
    "float64": (train(GOOD.train.inputs.double()), "inputs must be float32 or int64, got torch.float64"),
    "float labels": (train(labels=torch.zeros(5)), "labels must be int64"),
    "image labels": (train(labels=torch.zeros(5, 2, 2, dtype=torch.int64)), "labels must be int64"),
    "nan": (train(with_value(float("nan"))), r"train: inputs must be finite, got nan at index \(3, 1\)"),
    "inf": (train(with_value(float("-inf"))), r"train: inputs must be finite, got -inf at index \(3, 1\)"),
    "label 3": (train(labels=torch.tensor([0, 1, 3, 2, 4])), r"labels must be in \[0, 3\), got 3 at index \(2,\)"),
    "label -1": (train(labels=torch.tensor([0, 1, 2, 2, -1])), r"labels must be in \[0, 3\), got -1 at index \(4,\)"),
    "test label": (
        replace(GOOD, test=Examples(GOOD.train.inputs[:4], torch.tensor([0, 1, 2, 9]))),
        r"mine: test: labels must be in \[0, 3\), got 9",
    ),
    "parts differ": (
        replace(GOOD, test=Examples(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))),
        r"inputs differ: train torch.float32 \(2,\), test torch.float32 \(3,\)",
    ),
    "column length": (replace(GOOD, columns={"who": np.zeros(4, np.int64)}), r"columns\['who'\] must be int64 \(5,\)"),
    "column dtype": (replace(GOOD, columns={"who": np.zeros(5)}), r"columns\['who'\] must be int64"),  # type: ignore[dict-item]
    "column id": (replace(GOOD, test_columns={"who": np.array([0, -2, 0, 0])}), "ids must be >= 0, got -2 at 1"),
    "stray test column": (replace(GOOD, columns={}), r"test_columns \['who'\] have no training column"),
    "column without test": (replace(GOOD, test=None), r"test_columns \['who'\] without a test part"),
    "class names": (replace(GOOD, class_names=("a",)), "1 class names for 3 classes"),
    "no classes": (replace(GOOD, num_classes=0), "num_classes must be >= 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_every_broken_rule_is_named(case: str) -> None:
    dataset, message = BAD[case]
    with pytest.raises(DataError, match=message):
        check(dataset)
