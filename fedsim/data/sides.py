"""The tables of two parties: cut from a dataset, read from each party's own file, or drawn with a known overlap."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim import rng
from fedsim.data.columns import Side, cut
from fedsim.data.tabular import CsvTable, number, read_csv, standardised
from fedsim.errors import ConfigError, DataError
from fedsim.records import Examples

_ID, _LABEL = "id", "label"
_SIGNS = {0.0: -1, -1.0: -1, 1.0: 1}  # of a label in a file


@dataclass(frozen=True)
class Table:
    """Rows of one party.

    ids: one each, all different. inputs: float32 or float64 (n, *shape). labels: int8 (n,) of +1 and -1, or None.
    """

    ids: tuple[str, ...]
    inputs: Tensor
    labels: Tensor | None = None

    def take(self, rows: Tensor) -> "Table":
        """The rows at these indices, in this order, copied."""
        ids = tuple(self.ids[row] for row in rows.tolist())
        return Table(ids, self.inputs[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Sides:
    """What two parties have, as far as it is known here: on its own machine a party knows of its own.

    a: has labels. b: has none. held_out: B's columns of rows that nobody trained on, with labels, for scoring alone;
    None: there are none.
    """

    a: Table | None
    b: Table | None
    held_out: Table | None


# ---------------------------------------------------------------- cut from a dataset


def from_dataset(
    train: Examples,
    test: Examples,
    num_classes: int,
    *,
    overlap: int,
    share: float,
    positive: tuple[int, ...] | None,
    key: int,
) -> Sides:
    """Two parties that have different columns of partly the same rows of a dataset.

    Of the n rows, in random order, the first ``overlap`` are both parties'; of the others the first half, rounded up,
    is A's alone, and the rest B's alone. Then either party's rows get an order of their own.

    Args:
        train: one class each; columns are cut as by :func:`fedsim.data.columns.cut`.
        test: what is held out; its rows are in no party's table.
        num_classes: of the dataset.
        overlap: rows that both have, in [1, n].
        share: of A, of the columns, in (0, 1).
        positive: classes that become +1, all others -1; None: those of at least ``num_classes / 2``.
        key: of all draws.

    Returns:
        Ids ``row-<index>`` of rows of ``train``, and ``held-out-<index>`` of rows of ``test``.

    Raises:
        ConfigError: every one of these rules that is broken.
    """
    chosen = set(positive) if positive is not None else {c for c in range(num_classes) if 2 * c >= num_classes}
    count = len(train)
    problems = [*_overlap_problems(overlap, count), *_positive_problems(chosen, num_classes, positive)]
    if not all(map(_is_table, (train, test))):
        problems.append("data.dataset: must have columns of numbers and one class per row to be cut into two parties")
    if problems:
        raise ConfigError(problems)
    order = rng.permutation(rng.fold(key, "rows"), count)
    alone = overlap + (count - overlap + 1) // 2
    rows_a, rows_b = order[:alone], torch.cat([order[:overlap], order[alone:]])
    try:
        a = Table(_numbered("row", rows_a), cut(train.inputs, "a", share)[rows_a], _signs(train.labels[rows_a], chosen))
        b = Table(_numbered("row", rows_b), cut(train.inputs, "b", share)[rows_b])
        asked = cut(test.inputs, "b", share)
    except ValueError as error:
        raise ConfigError(f"transfer.{error}".replace(" must", ": must", 1)) from error
    held_out = Table(_numbered("held-out", torch.arange(len(test))), asked, _signs(test.labels, chosen))
    return Sides(_shuffled(a, rng.fold(key, "order", "a")), _shuffled(b, rng.fold(key, "order", "b")), held_out)


def _is_table(part: Examples) -> bool:
    numbers = part.inputs.ndim > 1 and part.inputs.is_floating_point()
    return numbers and part.labels.ndim == 1 and bool((part.labels >= 0).all())


def _overlap_problems(overlap: int, count: int) -> list[str]:
    if overlap < 1:
        return [f"transfer.overlap: must be >= 1, got {overlap}"]
    if overlap > count:
        return [f"transfer.overlap: must be <= the number of training rows ({count}), got {overlap}"]
    return []


def _positive_problems(chosen: set[int], num_classes: int, given: Sequence[int] | None) -> list[str]:
    unknown = sorted(one for one in chosen if not 0 <= one < num_classes)
    if unknown:
        return [f"transfer.positive: must be classes in [0, {num_classes}), got {unknown[0]}"]
    if not 0 < len(chosen) < num_classes:
        got = "null" if given is None else list(given)
        return [f"transfer.positive: must be at least one of the {num_classes} classes and not all, got {got}"]
    return []


def _signs(labels: Tensor, positive: set[int]) -> Tensor:
    return torch.where(torch.isin(labels, torch.tensor(sorted(positive))), 1, -1).to(torch.int8)


def _numbered(word: str, rows: Tensor) -> tuple[str, ...]:
    return tuple(f"{word}-{row}" for row in rows.tolist())


def _shuffled(table: Table, key: int) -> Table:
    return table.take(rng.permutation(key, len(table.ids)))


# ---------------------------------------------------------------- drawn


def overlap_tables(
    key: int,
    *,
    rows_a: int = 500,
    rows_b: int = 500,
    overlap: int = 200,
    held_out: int = 200,
    features_a: int = 10,
    features_b: int = 10,
    factors: int = 5,
    noise: float = 0.5,
) -> Sides:
    """Two parties with a known overlap, whose columns come of the same hidden factors.

    ``x_a = z W_a + noise e_a``, ``x_b = z W_b + noise e_b``, ``y = sign(z w)``, with standard normal z (people,
    factors), e and w, and entries ``W ~ N(0, 1 / factors)``, all drawn by key.

    Args:
        key: of all draws.
        rows_a, rows_b: of the two tables, >= overlap.
        overlap: people in both, >= 1.
        held_out: people in neither, of whom B's columns and the label are known, >= 0.
        features_a, features_b: columns, >= 1.
        factors: >= 1.
        noise: standard deviation, >= 0.

    Returns:
        Inputs float64; ids ``person-<six digits or more>``, whose numbers say nothing of who is where.

    Raises:
        ValueError: one of these rules is broken.
    """
    limits = {"overlap": (overlap, 1), "rows_a": (rows_a, overlap), "rows_b": (rows_b, overlap)}
    limits |= {"held_out": (held_out, 0), "features_a": (features_a, 1), "features_b": (features_b, 1)}
    for name, (value, least) in (limits | {"factors": (factors, 1)}).items():
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be >= 0 and finite, got {noise}")
    people = rows_a + rows_b - overlap + held_out
    z = _normal(key, "z", people, factors)
    x_a, x_b = (
        z @ _normal(key, f"weights {side}", factors, width) / factors**0.5
        + noise * _normal(key, f"noise {side}", people, width)
        for side, width in (("a", features_a), ("b", features_b))
    )
    labels = torch.where(z @ _normal(key, "label", factors) >= 0, 1, -1).to(torch.int8)
    ids = tuple(f"person-{one:06d}" for one in rng.permutation(rng.fold(key, "ids"), people).tolist())
    everybody = torch.arange(people)
    a = Table(ids, x_a, labels).take(everybody[:rows_a])
    b = Table(ids, x_b).take(torch.cat([everybody[:overlap], everybody[rows_a : people - held_out]]))
    asked = Table(ids, x_b, labels).take(everybody[people - held_out :]) if held_out else None
    return Sides(_shuffled(a, rng.fold(key, "order", "a")), _shuffled(b, rng.fold(key, "order", "b")), asked)


def _normal(key: int, name: str, *shape: int) -> Tensor:
    return rng.normal(rng.fold(key, name), *shape, dtype=torch.float64)


# ---------------------------------------------------------------- each party's own file


def from_files(a: Path | None, b: Path | None) -> Sides:
    """What the files hold that are here: both parties' in a simulation, one's own on a party's machine.

    Args:
        a, b: CSV files, by the rules of :func:`read_party`; None: not here.

    Raises:
        DataError: as :func:`read_party`; or a row that is held out has an id that party A trains on.
    """
    left = Sides(None, None, None) if a is None else read_party(a, "a")
    right = Sides(None, None, None) if b is None else read_party(b, "b")
    if left.a is not None and right.held_out is not None and b is not None:
        known = set(left.a.ids)
        if both := [one for one in right.held_out.ids if one in known]:
            table = read_csv(b)
            rule = f"a row with a label is held out, so its id must not be in {a}"
            raise table.wrong(table.texts(_ID).index(both[0]), _ID, rule)
    return Sides(left.a, right.b, right.held_out)


def read_party(path: Path, role: Side) -> Sides:
    """One party's own table, with nothing known of the other's.

    A CSV file with a header and a column ``id``; all columns but that and ``label`` are numbers, standardised by mean
    and standard deviation of the rows that train, which are 0 where a column is constant in those. Labels are 0 and 1,
    or -1 and 1. Party A has one in every row. Where party B has one, the row is held out, and the others train.

    Args:
        path: of the file.
        role: whose it is.

    Returns:
        Inputs float64 (n, columns), in the file's order.

    Raises:
        DataError: names the file, the line, the column, the rule and the value.
    """
    table = read_csv(path)
    for name in (_ID, _LABEL) if role == "a" else (_ID,):
        if name not in table.header:
            raise DataError(f"{path}: line 1: needs a column {name}, got {', '.join(table.header)}")
    features = [name for name in table.header if name not in (_ID, _LABEL)]
    if not features:
        raise DataError(f"{path}: line 1: needs a column besides id and label, got {', '.join(table.header)}")
    ids, labels = _ids(table), _file_labels(table, role)
    trains = np.array([role == "a" or label == 0 for label in labels])
    if not trains.any():
        raise DataError(
            f"{path}: column {_LABEL}: must be empty in a row or more, which train, got a label in every row"
        )
    numbers = np.stack([table.numbers(name) for name in features], 1)
    inputs = torch.from_numpy(standardised(numbers, numbers[trains]))
    whole = Table(ids, inputs, torch.tensor(labels, dtype=torch.int8))
    if role == "a":
        return Sides(whole, None, None)
    training, held_out = (whole.take(torch.from_numpy(np.flatnonzero(rows))) for rows in (trains, ~trains))
    return Sides(None, Table(training.ids, training.inputs), held_out if held_out.ids else None)


def _ids(table: CsvTable) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for row, one in enumerate(table.texts(_ID)):
        if not one:
            raise table.wrong(row, _ID, "must not be empty")
        if one in seen:
            raise table.wrong(row, _ID, f"must be there once, and is in line {table.lines[seen[one]]} too")
        seen[one] = row
    return tuple(seen)


def _file_labels(table: CsvTable, role: Side) -> list[int]:
    """+1 or -1 of each row, 0 where B's file has none."""
    if _LABEL not in table.header:
        return [0] * len(table.rows)
    found: list[int] = []
    negative: tuple[float, int] | None = None  # what -1 is written as, and in which line that was seen
    for row, text in enumerate(table.texts(_LABEL)):
        if role == "b" and not text.strip():
            found.append(0)
            continue
        value = number(text)
        if value is None or value not in _SIGNS:
            rule = "must be 0 or 1, or -1 or 1" + (", or empty" if role == "b" else "")
            raise table.wrong(row, _LABEL, rule)
        if value <= 0:
            negative = negative or (value, table.lines[row])
            if value != negative[0]:
                raise table.wrong(row, _LABEL, f"must be {negative[0]:g} or 1, as in line {negative[1]}")
        found.append(_SIGNS[value])
    return found


def party_files(root: Path | None = None, *, a: str | None = None, b: str | None = None) -> Sides:
    """Each party's own CSV file, for a transfer: column ``id``, at A also ``label`` (0 and 1, or -1 and 1), numbers.

    Args:
        root: where relative file names start; supplied by fedsim from ``data.root``.
        a, b: file names; a party's machine needs its own only, a simulation both.

    Raises:
        ValueError: none is given.
        DataError: see :func:`from_files`.
    """
    if a is None and b is None:
        raise ValueError("a must be a file, or b, or both, got neither")
    found = [None if name is None else (root or Path()) / Path(name).expanduser() for name in (a, b)]
    return from_files(found[0], found[1])


TWO_PARTIES: dict[str, Callable[..., Sides]] = {"overlap-tables": overlap_tables, "party-files": party_files}
