"""Tables of numbers: read from CSV files, with every problem named by file, line and column; and standardised."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsim.errors import DataError

Numbers = npt.NDArray[np.float64]

LARGEST = 1e30  # of a number in a file: its square, and what it is when standardised, stay far below the largest float


@dataclass(frozen=True)
class CsvTable:
    """A CSV file as text.

    header: names of columns, all different. rows: one text per column each. lines: where each row ends in the file.
    """

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def texts(self, column: str) -> list[str]:
        """What stands in a column."""
        at = self.header.index(column)
        return [row[at] for row in self.rows]

    def numbers(self, column: str, allowed: Sequence[float] | None = None) -> Numbers:
        """A column as float64 (rows,).

        Args:
            column: its name.
            allowed: the values that may occur; None: all.

        Raises:
            DataError: names the file, the line, the column, the rule and the value of the first that is no number, or
                not allowed, or beyond +-1e30.
        """
        rule = (
            "a number between -1e30 and 1e30" if allowed is None else f"one of {', '.join(f'{v:g}' for v in allowed)}"
        )
        found = np.empty(len(self.rows))
        for row, text in enumerate(self.texts(column)):
            value = number(text)
            if value is None or (allowed is not None and value not in allowed):
                raise self.wrong(row, column, f"must be {rule}")
            found[row] = value
        return found

    def wrong(self, row: int, column: str, rule: str) -> DataError:
        """What to say of a cell that breaks a rule."""
        got = self.rows[row][self.header.index(column)]
        return DataError(f"{self.path}: line {self.lines[row]}, column {column}: {rule}, got {got!r}")


def number(text: str) -> float | None:
    """The number that a text is, or None if it is none or beyond +-1e30."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST and "_" not in text else None  # NaN is not <=; Python reads 1_0 as 10


def read_csv(path: Path) -> CsvTable:
    """Read a CSV file: commas, UTF-8 with or without a byte order mark, a header. Empty lines are skipped.

    Raises:
        DataError: names the file, and the line where there is one: it cannot be read, has no header, a name that is
            empty or there twice, no row, or a row with more or fewer cells than the header.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}: line {line}: must be UTF-8 text, got byte 0x{error.object[error.start]:02x}"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    (line, names), *found = _lines(path, text) or [(1, [])]
    header = tuple(name.strip() for name in names)
    _check_header(path, line, header)
    for line, cells in found:
        if len(cells) != len(header):
            raise DataError(f"{path}: line {line}: must have {len(header)} cells, as the header has, got {len(cells)}")
    if not found:
        raise DataError(f"{path}: line {line}: at least one row must follow the header, got none")
    return CsvTable(path, header, tuple(tuple(cells) for _, cells in found), tuple(line for line, _ in found))


def _lines(path: Path, text: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not CSV: {error}") from error


def _check_header(path: Path, line: int, header: tuple[str, ...]) -> None:
    if not header:
        raise DataError(f"{path}: line {line}: must have the names of the columns, got an empty file")
    for at, name in enumerate(header):
        if not name:
            raise DataError(f"{path}: line {line}, column {at + 1}: must have a name, got {name!r}")
        if name in header[:at]:
            raise DataError(f"{path}: line {line}: column names must be there once each, got {name!r} twice")


def standardised(values: Numbers, over: Numbers | None = None) -> Numbers:
    """``(x - mean) / sd`` by column, and 0 where a column is constant.

    Args:
        values: (n, k).
        over: (m, k), m >= 1, whose mean and standard deviation (divisor m) are taken; None: ``values``.

    Returns:
        float64 (n, k).
    """
    over = values if over is None else over
    mean, sd = over.mean(0), over.std(0)
    varies = (over.max(0) > over.min(0)) & (sd > 0)  # sd alone can be a rounding error where all values are 0.1
    return np.where(varies, (values - mean) / np.where(varies, sd, 1.0), 0.0)
