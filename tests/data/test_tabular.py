import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.data.tabular import number, read_csv, standardised
from fedsim.errors import DataError


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_know_the_line_they_stand_in(tmp_path: Path) -> None:
    table = read_csv(written(tmp_path, '\ufeffid, x \r\n\r\nu,1\r\n"two\r\nlines",-2.5e3\r\n\r\n"v,w",+.5\r\n'))
    assert table.header == ("id", "x")
    assert table.texts("id") == ["u", "two\r\nlines", "v,w"]
    assert table.numbers("x").tolist() == [1, -2500, 0.5]
    assert table.lines == (3, 5, 7)
    assert table.numbers("x", (1, -2500, 0.5)).tolist() == [1, -2500, 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: must have the names of the columns, got an empty file"),
        ("x,,y\n1,2,3\n", "line 1, column 2: must have a name, got ''"),
        ("x,y, x\n1,2,3\n", "line 1: column names must be there once each, got 'x' twice"),
        ("\nx,y\n", "line 2: at least one row must follow the header, got none"),
        ("x,y\n1,2\n\n1\n", "line 4: must have 2 cells, as the header has, got 1"),
        ("x,y\n1,2,3\n", "line 2: must have 2 cells, as the header has, got 3"),
        ('x,y\n1,2\n"1"2,3\n', "line 3: not CSV: "),
        ('x,y\n1,2\n"1,2\n', "line 3: not CSV: "),
        (b"x,y\n1,2\n1,\xff\n", "line 3: must be UTF-8 text, got byte 0xff"),
    ],
)
def test_a_file_that_is_no_table_is_named_with_the_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError) as error:
        read_csv(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match=f"{path}: cannot be read: "):
            read_csv(path)


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "1e31", "-1.1e30", "1_0", "1,5", "0x10"])
def test_what_is_no_number_is_named_with_line_and_column(tmp_path: Path, text: str) -> None:
    assert number(text) is None
    table = read_csv(written(tmp_path, f'x,y\n1,2\n3,"{text}"\n'))
    rule = f"line 3, column y: must be a number between -1e30 and 1e30, got {text!r}"
    with pytest.raises(DataError) as error:
        table.numbers("y")
    assert str(error.value) == f"{table.path}: {rule}"


def test_a_value_that_is_not_allowed_is_named(tmp_path: Path) -> None:
    table = read_csv(written(tmp_path, "x\n1\n2.0\n3\n"))
    assert table.numbers("x", (1, 2, 3)).tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"line 4, column x: must be one of 1, 2, got '3'"):
        table.numbers("x", (1, 2))


@given(st.lists(st.lists(st.integers(-1000, 1000), min_size=3, max_size=3), min_size=1, max_size=12), st.data())
def test_standardised_is_what_a_loop_over_columns_gives(rows: list[list[int]], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(rows)))
    got = standardised(np.array(rows) / 8, np.array(rows[:count]) / 8)
    assert got.shape == (len(rows), 3)
    for column in range(3):
        over = [row[column] / 8 for row in rows[:count]]
        sd = statistics.pstdev(over)
        for row in range(len(rows)):
            expected = (rows[row][column] / 8 - statistics.fmean(over)) / sd if sd else 0
            assert got[row, column] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_constant_columns_are_zero_and_extremes_stay_finite() -> None:
    values = np.array([[0.1, 1e30, 1e-200], [0.1, -1e30, 0], [0.1, 0, 2e-200]])
    assert values[:, 0].std() > 0 or math.isclose(values[:, 0].mean(), 0.1)
    got = standardised(values)
    assert got[:, 0].tolist() == [0, 0, 0]
    assert got[:, 1] == pytest.approx([1.5**0.5, -(1.5**0.5), 0])
    assert np.isfinite(got).all()
    assert standardised(np.full((7, 1), 0.1)).tolist() == [[0]] * 7
    assert standardised(np.array([[1e30]]), np.array([[3.0], [4.0]])) == pytest.approx(2e30)
