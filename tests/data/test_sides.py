from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from fedsim.data.datasets import digits
from fedsim.data.federated import hold_out
from fedsim.data.sides import Sides, Table, from_dataset, from_files, overlap_tables, read_party
from fedsim.errors import ConfigError, DataError
from fedsim.records import Examples


def examples(count: int, width: int = 5, classes: int = 3, start: int = 0) -> Examples:
    """Entry (row, column) is 100 row + column, so that every number tells where it came from."""
    inputs = 100.0 * torch.arange(start, start + count)[:, None] + torch.arange(width)
    return Examples(inputs, torch.arange(count) % classes)


def parts(sides: Sides) -> tuple[Table, Table, Table]:
    assert sides.a is not None
    assert sides.b is not None
    assert sides.held_out is not None
    return sides.a, sides.b, sides.held_out


def equal(one: Table, other: Table) -> bool:
    return (
        one.ids == other.ids
        and torch.equal(one.inputs, other.inputs)
        and (one.labels is None) == (other.labels is None)
        and (one.labels is None or other.labels is None or torch.equal(one.labels, other.labels))
    )


def cut(train: Examples, test: Examples, **asked: object) -> Sides:
    arguments = {"overlap": 3, "share": 0.4, "positive": None, "key": 1} | asked
    return from_dataset(train, test, 3, **arguments)  # type: ignore[arg-type]


# ---------------------------------------------------------------- cut from a dataset


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_parties_share_the_overlap_and_nothing_else(data: st.DataObject, count: int, key: int) -> None:
    overlap = data.draw(st.integers(1, count))
    train, test = examples(count), examples(4, start=1000)
    a, b, held_out = parts(cut(train, test, overlap=overlap, key=key))
    assert len(np.intersect1d(a.ids, b.ids)) == overlap
    assert set(a.ids) | set(b.ids) == {f"row-{row}" for row in range(count)}
    assert len(set(a.ids)) == len(a.ids) == overlap + -(-(count - overlap) // 2)
    assert len(set(b.ids)) == len(b.ids) == overlap + (count - overlap) // 2
    assert not set(held_out.ids) & (set(a.ids) | set(b.ids))
    for table, columns in ((a, [0, 1]), (b, [2, 3, 4])):
        for one, numbers in zip(table.ids, table.inputs.tolist(), strict=True):
            assert numbers == [100.0 * int(one.removeprefix("row-")) + column for column in columns]
    assert b.labels is None
    assert a.labels is not None
    for one, label in zip(a.ids, a.labels.tolist(), strict=True):
        assert label == (1 if int(one.removeprefix("row-")) % 3 == 2 else -1)
    assert held_out.ids == ("held-out-0", "held-out-1", "held-out-2", "held-out-3")
    assert held_out.inputs.tolist() == [[100.0 * row + column for column in (2, 3, 4)] for row in range(1000, 1004)]
    assert held_out.labels is not None
    assert held_out.labels.tolist() == [-1, -1, 1, -1]
    assert a.labels.dtype == held_out.labels.dtype == torch.int8


def test_digits_halves_are_the_images_cut_by_hand() -> None:
    dataset = hold_out(digits(), 0.2, 5)
    assert dataset.test is not None
    a, b, held_out = parts(
        from_dataset(dataset.train, dataset.test, 10, overlap=300, share=0.5, positive=(8, 0, 3), key=2)
    )
    known = {image.tobytes(): row for row, image in enumerate(dataset.train.inputs.numpy())}
    assert len(known) == len(dataset.train)
    b_rows = dict(zip(b.ids, b.inputs.numpy(), strict=True))
    common = [row for row, one in enumerate(a.ids) if one in b_rows]
    assert len(common) == 300
    for row in common:
        whole = np.concatenate([a.inputs[row].numpy(), b_rows[a.ids[row]]], axis=2)
        assert whole.shape == (1, 8, 8)
        assert a.ids[row] == f"row-{known[whole.tobytes()]}"
    assert a.inputs.dtype == b.inputs.dtype == torch.float32
    everything = {half.tobytes() for half in (load_digits().images[:, None, :, 4:] / 16).astype(np.float32)}
    assert all(half.tobytes() in everything for half in held_out.inputs.numpy())
    assert held_out.labels is not None
    expected = [1 if label in (0, 3, 8) else -1 for label in dataset.test.labels.tolist()]
    assert held_out.labels.tolist() == expected


def test_each_party_has_an_order_of_its_own() -> None:
    a, b, _ = parts(cut(examples(40), examples(2), overlap=40))
    common = set(a.ids) & set(b.ids)
    assert len(common) == 40
    assert [one for one in a.ids if one in common] != [one for one in b.ids if one in common]
    assert a.ids != tuple(sorted(a.ids))
    agreeing = sum(one == other for one, other in zip(a.ids, b.ids, strict=True))
    assert agreeing <= 8, "one is expected; more than 8 has a chance below 2e-6"


def test_the_overlap_is_not_the_first_rows_of_a_table() -> None:
    """Of 100 rows 50 are common; all of the first ten would be with a chance of 6e-4 in A's 75."""
    a, b, _ = parts(cut(examples(100), examples(2), overlap=50))
    assert not set(a.ids[:10]) <= set(b.ids)
    assert {int(one.removeprefix("row-")) for one in set(a.ids) & set(b.ids)} != set(range(50))


def test_the_key_decides_everything() -> None:
    train, test = examples(30), examples(5)
    one, same, other = (cut(train, test, key=key) for key in (1, 1, 2))
    assert all(equal(x, y) for x, y in zip(parts(one), parts(same), strict=True))
    assert parts(one)[0].ids != parts(other)[0].ids
    assert set(parts(one)[1].ids) != set(parts(other)[1].ids)


def test_the_tables_are_copies() -> None:
    train, test = examples(6), examples(2)
    a, b, held_out = parts(cut(train, test))
    for table in (a, b, held_out):
        table.inputs.fill_(-1)
    assert torch.equal(train.inputs, examples(6).inputs)
    assert torch.equal(test.inputs, examples(2).inputs)


@pytest.mark.parametrize(
    ("classes", "positive"), [(2, {1}), (3, {2}), (4, {2, 3}), (5, {3, 4}), (10, set(range(5, 10)))]
)
def test_the_upper_half_of_the_classes_is_positive(classes: int, positive: set[int]) -> None:
    data = examples(20, classes=classes)
    a, _, held_out = parts(from_dataset(data, data, classes, overlap=1, share=0.5, positive=None, key=0))
    assert a.labels is not None
    assert held_out.labels is not None
    assert [label == 1 for label in held_out.labels.tolist()] == [row % classes in positive for row in range(20)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"overlap": 7}, "transfer.overlap: must be <= the number of training rows (6), got 7"),
        ({"overlap": 0}, "transfer.overlap: must be >= 1, got 0"),
        ({"positive": (3,)}, "transfer.positive: must be classes in [0, 3), got 3"),
        ({"positive": (0, -1)}, "transfer.positive: must be classes in [0, 3), got -1"),
        ({"positive": ()}, "transfer.positive: must be at least one of the 3 classes and not all, got []"),
        (
            {"positive": (2, 0, 1, 2)},
            "transfer.positive: must be at least one of the 3 classes and not all, got [2, 0, 1, 2]",
        ),
        ({"share": 0.01}, "transfer.share: must leave each side one of the 5 columns or more, got 0.01"),
        (
            {"overlap": 9, "positive": (5,)},
            "transfer.overlap: must be <= the number of training rows (6), got 9\n"
            "transfer.positive: must be classes in [0, 3), got 5",
        ),
    ],
)
def test_what_cannot_be_is_named_with_key_rule_and_value(asked: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cut(examples(6), examples(2), **asked)
    assert str(error.value) == message


def test_a_single_class_has_no_halves() -> None:
    with pytest.raises(ConfigError, match="at least one of the 1 classes and not all, got null"):
        from_dataset(examples(6, classes=1), examples(2), 1, overlap=1, share=0.5, positive=None, key=0)


@pytest.mark.parametrize(
    "broken",
    [
        Examples(torch.ones(6, 5), torch.zeros(6, 2, dtype=torch.int64)),
        Examples(torch.ones(6, 5, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)),
        Examples(torch.ones(6), torch.zeros(6, dtype=torch.int64)),
        Examples(torch.ones(6, 5), torch.tensor([0, 1, 2, -100, 0, 1])),
    ],
)
def test_data_that_is_no_table_is_refused(broken: Examples) -> None:
    for train, test in ((broken, examples(2)), (examples(6), broken)):
        with pytest.raises(ConfigError, match=r"^data\.dataset: must have columns of numbers and one class per row"):
            cut(train, test)


# ---------------------------------------------------------------- drawn


ASKED = {"rows_a": 60, "rows_b": 45, "overlap": 20, "held_out": 15, "features_a": 4, "features_b": 7}


def test_drawn_tables_have_the_sizes_and_the_overlap_asked_for() -> None:
    a, b, held_out = parts(overlap_tables(3, **ASKED))
    assert (a.inputs.shape, b.inputs.shape, held_out.inputs.shape) == ((60, 4), (45, 7), (15, 7))
    assert a.inputs.dtype == torch.float64
    assert len(np.intersect1d(a.ids, b.ids)) == 20
    assert len({*a.ids, *b.ids, *held_out.ids}) == 60 + 45 - 20 + 15
    assert set(map(len, a.ids)) == {len("person-000123")}
    assert b.labels is None
    assert a.labels is not None
    assert held_out.labels is not None
    assert set(a.labels.tolist()) == {1, -1}
    common = set(a.ids) & set(b.ids)
    assert [one for one in a.ids if one in common] != [one for one in b.ids if one in common]
    assert not set(a.ids[:10]) <= common, "by chance in 3e-6 of all orders"
    assert not set(b.ids[:10]) <= common, "by chance in 6e-5 of all orders"


def test_parties_have_weights_of_their_own_that_keep_the_factors_variance() -> None:
    """The variance is about a mean of 400 squares of normal numbers: 1, with a deviation of 0.07."""
    widths = {"rows_a": 2000, "rows_b": 2000, "overlap": 2000, "features_a": 80, "features_b": 80}
    a, b, _ = parts(overlap_tables(6, **widths, factors=5, noise=0.0))
    at = {one: row for row, one in enumerate(b.ids)}
    assert not torch.allclose(a.inputs, b.inputs[[at[one] for one in a.ids]])
    for table in (a, b):
        assert table.inputs.numpy().var() == pytest.approx(1, abs=0.3)


def test_without_noise_both_sides_span_the_same_few_factors_that_decide_the_label() -> None:
    """Ranks by numpy; the label is then a linear rule of either party's columns, which least squares must fit."""
    a, b, held_out = parts(overlap_tables(4, **ASKED | {"features_a": 9}, factors=3, noise=0.0))
    assert np.linalg.matrix_rank(a.inputs.numpy()) == np.linalg.matrix_rank(b.inputs.numpy()) == 3
    at = {one: row for row, one in enumerate(b.ids)}
    pairs = [(row, at[one]) for row, one in enumerate(a.ids) if one in at]
    joined = np.array([[*a.inputs[i].tolist(), *b.inputs[j].tolist()] for i, j in pairs])
    assert joined.shape == (20, 16)
    assert np.linalg.matrix_rank(joined) == 3, "rows of one id are of one person"
    shifted = np.concatenate([a.inputs.numpy()[[i for i, _ in pairs]], b.inputs.numpy()[[j - 1 for _, j in pairs]]], 1)
    assert np.linalg.matrix_rank(shifted) == 6, "which is not so of rows that do not belong together"
    assert a.labels is not None
    assert held_out.labels is not None
    to_b = np.linalg.lstsq(joined[:, 9:], joined[:, :9], rcond=1e-9)[0]  # from B's columns to A's
    rebuilt = held_out.inputs.numpy() @ to_b
    basis = np.linalg.svd(a.inputs.numpy())[2][:3]  # three numbers a person, in which the label is one half space
    weights = perceptron(a.inputs.numpy() @ basis.T, a.labels.numpy())
    assert np.array_equal(np.sign(a.inputs.numpy() @ basis.T @ weights), a.labels.numpy())
    assert (np.sign(rebuilt @ basis.T @ weights) == held_out.labels.numpy()).mean() >= 14 / 15


def perceptron(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights that separate the rows; stops only when they do."""
    weights = np.zeros(x.shape[1])
    for _ in range(10_000):
        wrong = np.flatnonzero(np.sign(x @ weights) != y)
        if not len(wrong):
            return weights
        weights = weights + y[wrong[0]] * x[wrong[0]]
    raise AssertionError("the rows cannot be separated by a plane")


def test_noise_has_the_deviation_asked_for() -> None:
    """The difference to the same key without noise, over noise, is standard normal: 600 draws, within 5 sigma."""
    plain, noisy = (parts(overlap_tables(5, **ASKED | {"features_b": 40}, noise=noise))[2] for noise in (0.0, 0.7))
    assert plain.ids == noisy.ids
    difference = (noisy.inputs - plain.inputs).numpy() / 0.7
    assert abs(difference.std() - 1) < 5 / 1200**0.5
    assert abs(difference.mean()) < 5 / 600**0.5


def test_drawn_tables_are_decided_by_the_key_and_may_have_nobody_held_out() -> None:
    one, same, other = (overlap_tables(key, **ASKED) for key in (1, 1, 2))
    assert all(equal(x, y) for x, y in zip(parts(one), parts(same), strict=True))
    assert not torch.equal(parts(one)[0].inputs, parts(other)[0].inputs)
    assert set(parts(one)[0].ids) != set(parts(other)[0].ids)
    assert overlap_tables(1, **ASKED | {"held_out": 0}).held_out is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"overlap": 0}, "overlap must be >= 1, got 0"),
        ({"rows_a": 19}, "rows_a must be >= 20, got 19"),
        ({"rows_b": 19}, "rows_b must be >= 20, got 19"),
        ({"held_out": -1}, "held_out must be >= 0, got -1"),
        ({"features_b": 0}, "features_b must be >= 1, got 0"),
        ({"factors": 0}, "factors must be >= 1, got 0"),
        ({"noise": -0.5}, "noise must be >= 0 and finite, got -0.5"),
        ({"noise": float("nan")}, "noise must be >= 0 and finite, got nan"),
    ],
)
def test_sizes_that_cannot_be_are_named(asked: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlap_tables(0, **ASKED | asked)  # type: ignore[arg-type]


# ---------------------------------------------------------------- each party's own file


A = "age,id,same,label,pay\n30,ann,7,1,-1.5\n50,bob,7,0,2\n\n46,cid,7,1,4\n"
B = "id,label,x,flat\nbob,,1,0.1\neve,1,9,0.3\nann,,-2,0.1\nfay,0,2,0.1\ndan, ,4,0.1\n"


def file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


def test_party_a_reads_its_rows_and_labels_and_standardises_over_all(tmp_path: Path) -> None:
    sides = read_party(file(tmp_path, "a.csv", A), "a")
    assert sides.b is None
    assert sides.held_out is None
    assert sides.a is not None
    assert sides.a.ids == ("ann", "bob", "cid")
    assert sides.a.labels is not None
    assert sides.a.labels.tolist() == [1, -1, 1]
    ages, pays = np.array([30.0, 50, 46]), np.array([-1.5, 2, 4])
    expected = np.stack([(ages - 42) / 74.66666666666667**0.5, np.zeros(3), (pays - 1.5) / np.var(pays) ** 0.5], 1)
    assert sides.a.inputs.numpy() == pytest.approx(expected)
    assert sides.a.inputs.dtype == torch.float64


def test_party_b_trains_without_labels_and_holds_out_the_rows_that_have_one(tmp_path: Path) -> None:
    sides = read_party(file(tmp_path, "b.csv", B), "b")
    assert sides.a is None
    assert sides.b is not None
    assert sides.held_out is not None
    assert sides.b.ids == ("bob", "ann", "dan")
    assert sides.b.labels is None
    sd = 6.0**0.5  # of 1, -2 and 4 about 1: only these train
    assert sides.b.inputs.numpy() == pytest.approx(np.array([[0, 0], [-3 / sd, 0], [3 / sd, 0]]))
    assert sides.held_out.ids == ("eve", "fay")
    assert sides.held_out.inputs.numpy() == pytest.approx(np.array([[8 / sd, 0], [1 / sd, 0]]))
    assert sides.held_out.labels is not None
    assert sides.held_out.labels.tolist() == [1, -1]


@pytest.mark.parametrize("content", ["id,x\nu,1\nv,2\n", "id,x,label\nu,1,\nv,2,\n"])
def test_party_b_may_have_no_labels_at_all(tmp_path: Path, content: str) -> None:
    sides = read_party(file(tmp_path, "b.csv", content), "b")
    assert sides.held_out is None
    assert sides.b is not None
    assert sides.b.inputs.tolist() == [[-1], [1]]


@pytest.mark.parametrize(("zero", "one"), [("0", "1"), ("-1", "1"), ("-1", "+1"), ("-1.0", "1.0"), ("0.0", "1")])
def test_labels_may_be_written_either_way(tmp_path: Path, zero: str, one: str) -> None:
    sides = read_party(file(tmp_path, "a.csv", f"id,x,label\nu,1,{one}\nv,2,{zero}\nw,5,{one}\n"), "a")
    assert sides.a is not None
    assert sides.a.labels is not None
    assert sides.a.labels.tolist() == [1, -1, 1]


def test_each_machine_needs_its_own_file_only(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.csv", A), file(tmp_path, "b.csv", B)
    both, left, right = from_files(a, b), from_files(a, None), from_files(None, b)
    one, two, three = parts(both)
    assert left.a is not None
    assert right.b is not None
    assert right.held_out is not None
    assert (left.b, left.held_out, right.a) == (None, None, None)
    assert equal(one, left.a)
    assert equal(two, right.b)
    assert equal(three, right.held_out)
    assert np.intersect1d(one.ids, two.ids).tolist() == ["ann", "bob"]


def test_whoever_is_held_out_must_not_train_at_party_a(tmp_path: Path) -> None:
    a, b = file(tmp_path, "a.csv", A), file(tmp_path, "b.csv", B.replace("fay", "cid"))
    with pytest.raises(DataError) as error:
        from_files(a, b)
    rule = f"a row with a label is held out, so its id must not be in {a}"
    assert str(error.value) == f"{b}: line 5, column id: {rule}, got 'cid'"


@pytest.mark.parametrize(
    ("role", "old", "new", "message"),
    [
        ("a", ",label,", ",y,", "line 1: needs a column label, got age, id, same, y, pay"),
        ("a", ",id,", ",Id,", "line 1: needs a column id, got age, Id, same, label, pay"),
        ("a", "cid", "ann", "line 5, column id: must be there once, and is in line 2 too, got 'ann'"),
        ("a", "bob", "", "line 3, column id: must not be empty, got ''"),
        ("a", "1,4", ",4", "line 5, column label: must be 0 or 1, or -1 or 1, got ''"),
        ("a", "0,2", "2,2", "line 3, column label: must be 0 or 1, or -1 or 1, got '2'"),
        ("a", "1,4", "-1,4", "line 5, column label: must be 0 or 1, as in line 3, got '-1'"),
        ("a", "-1.5", "x", "line 2, column pay: must be a number between -1e30 and 1e30, got 'x'"),
        ("a", "-1.5", "", "line 2, column pay: must be a number between -1e30 and 1e30, got ''"),
        ("a", "46", "nan", "line 5, column age: must be a number between -1e30 and 1e30, got 'nan'"),
        ("b", "fay,0", "fay,yes", "line 5, column label: must be 0 or 1, or -1 or 1, or empty, got 'yes'"),
        ("b", "id,label", "name,label", "line 1: needs a column id, got name, label, x, flat"),
        ("b", "9,0.3", "9", "line 3: must have 4 cells, as the header has, got 3"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_line_and_column(
    tmp_path: Path, role: str, old: str, new: str, message: str
) -> None:
    content = {"a": A, "b": B}[role]
    assert content.count(old) == 1
    path = file(tmp_path, f"{role}.csv", content.replace(old, new))
    with pytest.raises(DataError) as error:
        read_party(path, role)  # type: ignore[arg-type]
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,label\nu,\n", "line 1: needs a column besides id and label, got id, label"),
        (
            "id,x,label\nu,1,1\nv,2,0\n",
            "column label: must be empty in a row or more, which train, got a label in every row",
        ),
    ],
)
def test_a_file_without_anything_to_train_on_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = file(tmp_path, "b.csv", content)
    with pytest.raises(DataError) as error:
        read_party(path, "b")
    assert str(error.value) == f"{path}: {message}"
