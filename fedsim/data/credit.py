"""Default of credit card clients: 30,000 clients of a bank in Taiwan, from a CSV file that the user has."""

from pathlib import Path

import numpy as np
import torch

from fedsim.data import locations
from fedsim.data.checks import check
from fedsim.data.tabular import CsvTable, Numbers, read_csv, standardised
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples

_NAME, _FILE = "credit-default", "UCI_Credit_Card.csv"
_LABELS = ("default.payment.next.month", "default payment next month")  # in Kaggle's copy, and in UCI's
_CATEGORIES: dict[str, tuple[int, ...]] = {  # education and marriage have codes that their description leaves out
    "SEX": (1, 2),
    "EDUCATION": (0, 1, 2, 3, 4, 5, 6),
    "MARRIAGE": (0, 1, 2, 3),
}
_FEATURES = (
    *("LIMIT_BAL", *_CATEGORIES, "AGE", "PAY_0"),
    *(f"PAY_{month}" for month in range(2, 7)),
    *(f"BILL_AMT{month}" for month in range(1, 7)),
    *(f"PAY_AMT{month}" for month in range(1, 7)),
)


def credit_default(root: Path | None = None) -> Dataset:
    """Default of credit card clients, 30,000 rows, from UCI_Credit_Card.csv in root or a known place: no download.

    Args:
        root: folder that holds the file, or a subfolder ``credit-default`` with it; None: ``$FEDSIM_DATA``, then the
            user cache.

    Returns:
        Inputs float32 (n, 33), in the order of LIMIT_BAL, SEX, EDUCATION, MARRIAGE, AGE, PAY_*, BILL_AMT*, PAY_AMT*:
        of SEX, EDUCATION and MARRIAGE one column for each code (2, 7, 4), 1 where a row has it; the others of mean 0
        and standard deviation 1. Labels 0 paid, 1 default; no test set of its own.

    Raises:
        DataError: there is no such file; or names the file, the line, the column, the rule and the value.

    Source: Yeh, Lien 2009, "The comparisons of data mining techniques for the predictive accuracy of probability of
        default of credit card clients", Expert Systems with Applications 36, 2473-2480; UCI repository.
        Differs: codes become columns, numbers are standardised, over all rows, so also over those held out later.
    """
    table = read_csv(_found(root))
    label = _label(table)
    columns = [_column(table, name) for name in _FEATURES]
    inputs = torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))
    labels = torch.from_numpy(table.numbers(label, (0, 1)).astype(np.int64))
    dataset = Dataset(_NAME, Examples(inputs, labels), None, 2, class_names=("paid", "default"))
    check(dataset)
    return dataset


def _found(root: Path | None) -> Path:
    places = locations.folders(_NAME, root)
    for folder in places:
        if (folder / _FILE).is_file():
            return folder / _FILE
    key = "data.root" if root is not None else "data.dataset"
    where = " or ".join(map(str, places))
    raise DataError(f"{key}: {_NAME} needs the file {_FILE} in {where}; it is not downloaded")


def _label(table: CsvTable) -> str:
    """Name of the column of labels, once the header is known to be right."""
    label = next((name for name in _LABELS if name in table.header), _LABELS[0])
    wanted = {"ID", *_FEATURES, label}
    if missing := sorted(wanted - set(table.header)):
        raise DataError(f"{table.path}: line 1: needs the column {missing[0]}, got {', '.join(table.header)}")
    if unknown := sorted(set(table.header) - wanted):
        raise DataError(f"{table.path}: line 1: must have no column besides those of {_NAME}, got {unknown[0]}")
    return label


def _column(table: CsvTable, name: str) -> Numbers:
    """What becomes of a column of the file: (n, 1), or (n, codes)."""
    if name not in _CATEGORIES:
        return standardised(table.numbers(name)[:, None])
    codes = _CATEGORIES[name]
    found: Numbers = np.equal(table.numbers(name, codes)[:, None], codes).astype(np.float64)
    return found
