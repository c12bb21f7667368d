import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsim.data.credit import credit_default
from fedsim.errors import DataError

HEADER = (
    "ID,LIMIT_BAL,SEX,EDUCATION,MARRIAGE,AGE,PAY_0,PAY_2,PAY_3,PAY_4,PAY_5,PAY_6,"
    "BILL_AMT1,BILL_AMT2,BILL_AMT3,BILL_AMT4,BILL_AMT5,BILL_AMT6,"
    "PAY_AMT1,PAY_AMT2,PAY_AMT3,PAY_AMT4,PAY_AMT5,PAY_AMT6,default.payment.next.month"
)
ROWS = [  # made up; negative bills and codes that the description of the data leaves out
    "1,20000.0,2,2,1,24,2,2,-1,-1,-2,-2,3913.0,3102.0,689.0,0.0,0.0,0.0,0.0,689.0,0.0,0.0,0.0,0.0,1",
    "2,120000.0,1,0,2,26,-1,2,0,0,0,2,-2682.0,1725.0,2682.0,3272.0,-3455.5,3261.0,0,1000,1000,1000,0,2000,0",
    "3,90000.0,2,6,0,34,0,0,0,0,0,0,29239.0,14027.0,13559.0,14331.0,14948.0,15549.0,1518,1500,1000,1000,1000,5000,0",
    "4,50000,1,3,3,37,0,0,0,0,0,0,46990,48233,49291,28314,28959,29547,2000,2019,1200,1100,1069,1000,1",
]


def put(folder: Path, header: str = HEADER, rows: list[str] = ROWS) -> Path:
    (folder / "UCI_Credit_Card.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_codes_become_columns_and_numbers_are_standardised(tmp_path: Path) -> None:
    dataset = credit_default(put(tmp_path))
    assert (dataset.name, dataset.test, dataset.num_classes) == ("credit-default", None, 2)
    assert dataset.class_names == ("paid", "default")
    assert dataset.train.labels.tolist() == [1, 0, 0, 1]
    expected = []
    for name in HEADER.split(",")[1:-1]:
        at = HEADER.split(",").index(name)
        values = [float(row.split(",")[at]) for row in ROWS]
        codes = {"SEX": range(1, 3), "EDUCATION": range(7), "MARRIAGE": range(4)}.get(name)
        if codes:
            expected += [[1.0 if value == code else 0.0 for value in values] for code in codes]
        else:
            mean = sum(values) / 4
            sd = (sum((value - mean) ** 2 for value in values) / 4) ** 0.5
            expected.append([(value - mean) / sd for value in values])
    assert dataset.train.inputs.shape == (4, 33)
    assert np.abs(dataset.train.inputs.numpy() - np.array(expected).T).max() < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace("default.payment.next.month", "default payment next month"),
        lambda header: header.replace("default.payment.next.month", '"default payment next month"'),
        lambda header: "\ufeff" + header,
    ],
)
def test_the_headers_of_both_publishers_are_read(tmp_path: Path, change: Callable[[str], str]) -> None:
    one = credit_default(put(tmp_path))
    other = credit_default(put(tmp_path, change(HEADER)))
    assert np.array_equal(one.train.inputs, other.train.inputs)
    assert np.array_equal(one.train.labels, other.train.labels)


def test_columns_are_known_by_their_names_not_by_their_places(tmp_path: Path) -> None:
    one = credit_default(put(tmp_path))
    with (tmp_path / "UCI_Credit_Card.csv").open() as file:
        rows = [row[::-1] for row in csv.reader(file)]
    other = credit_default(put(tmp_path, ",".join(rows[0]), [",".join(row) for row in rows[1:]]))
    assert np.array_equal(one.train.inputs, other.train.inputs)


def test_the_file_is_found_in_a_subfolder_and_in_the_shared_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credit-default").mkdir()
    put(tmp_path / "credit-default")
    assert len(credit_default(tmp_path).train) == 4
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    assert len(credit_default().train) == 4


def test_a_missing_file_is_named_with_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "credit-default needs the file UCI_Credit_Card.csv in"
    with pytest.raises(DataError) as error:
        credit_default(tmp_path)
    assert str(error.value) == f"data.root: {rule} {tmp_path} or {tmp_path}/credit-default; it is not downloaded"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    with pytest.raises(DataError) as error:
        credit_default()
    assert str(error.value) == f"data.dataset: {rule} {tmp_path}/fedsim/credit-default; it is not downloaded"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",PAY_0,", ",PAY_1,", "line 1: needs the column PAY_0, got ID, LIMIT_BAL, "),
        ("default.payment.next.month", "y", "line 1: needs the column default.payment.next.month, got ID, "),
        ("ID,", "Id,", "line 1: needs the column ID, got Id, LIMIT_BAL, "),
        ("4,50000,1,3", "4,50000,3,3", "line 5, column SEX: must be one of 1, 2, got '3'"),
        ("4,50000,1,3", "4,50000,1,7", "line 5, column EDUCATION: must be one of 0, 1, 2, 3, 4, 5, 6, got '7'"),
        ("2,2,1,24", "2,2,1.5,24", "line 2, column MARRIAGE: must be one of 0, 1, 2, 3, got '1.5'"),
        ("-3455.5", "n/a", "line 3, column BILL_AMT5: must be a number between -1e30 and 1e30, got 'n/a'"),
        ("1069,1000,1", "1069,1000,2", "line 5, column default.payment.next.month: must be one of 0, 1, got '2'"),
        ("2,120000.0,1,", "2,120000.0,", "line 3: must have 25 cells, as the header has, got 24"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = put(tmp_path) / "UCI_Credit_Card.csv"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as error:
        credit_default(tmp_path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_column_too_many_is_named(tmp_path: Path) -> None:
    put(tmp_path, HEADER + ",default payment next month", [row + ",0" for row in ROWS])
    rule = "line 1: must have no column besides those of credit-default, got default payment next month"
    with pytest.raises(DataError, match=rule):
        credit_default(tmp_path)
