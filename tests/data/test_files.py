import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedsim import rng
from fedsim.data.files import from_arrays, image_folder, npz
from fedsim.errors import DataError

X = np.linspace(-1, 1, 12).reshape(4, 3)
Y = np.array([2, 0, 1, 0])


def saved(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "mine.npz", **arrays)
    return str(folder / "mine.npz")


def test_x_and_y_become_float32_and_int64_without_a_test_part(tmp_path: Path) -> None:
    dataset = npz(path=saved(tmp_path, x=X, y=Y.astype(np.uint8)))
    assert (dataset.name, dataset.num_classes, dataset.test) == ("mine", 3, None)
    assert torch.equal(dataset.train.inputs, torch.tensor(X, dtype=torch.float32))
    assert dataset.train.labels.dtype == torch.int64
    assert dataset.train.labels.tolist() == [2, 0, 1, 0]


def test_four_arrays_give_a_test_part_and_classes_count_over_both(tmp_path: Path) -> None:
    path = saved(tmp_path, x_train=X, y_train=Y, x_test=-X[:2], y_test=np.array([4, 1]))
    dataset = npz(path=path)
    assert dataset.test is not None
    assert dataset.num_classes == 5
    assert torch.equal(dataset.test.inputs, torch.tensor(-X[:2], dtype=torch.float32))


def test_a_relative_path_starts_from_the_root_or_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, x=X, y=Y)
    assert len(npz(tmp_path, path="mine.npz").train) == 4
    monkeypatch.chdir(tmp_path)
    assert len(npz(path="mine.npz").train) == 4
    with pytest.raises(DataError, match=r"data\.root: folder .*nowhere does not exist"):
        npz(tmp_path / "nowhere", path="mine.npz")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 7), (2, 7)),
        ((2, 6, 9), (2, 1, 6, 9)),
        ((2, 6, 9, 3), (2, 3, 6, 9)),
        ((2, 6, 9, 1), (2, 1, 6, 9)),
        ((2, 6, 9, 2), (2, 6, 9, 2)),
        ((2, 3, 32, 32), (2, 3, 32, 32)),
        ((2, 4, 9, 3), (2, 4, 9, 3)),
        ((2, 5, 5, 4), (2, 4, 5, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.float16])
def test_images_become_channel_first_and_bytes_become_fractions(
    shape: tuple[int, ...], expected: tuple[int, ...], dtype: type
) -> None:
    x = (np.arange(np.prod(shape)) % 256).reshape(shape).astype(dtype)
    inputs = from_arrays("a", {"x": x, "y": np.array([0, 1])}, "here").train.inputs
    assert tuple(inputs.shape) == expected
    assert inputs.dtype == torch.float32
    last = tuple(side - 1 for side in shape[1:])
    moved = (last[2], last[0], last[1]) if shape[1:] != expected[1:] and len(shape) == 4 else last
    got = inputs[(1, *((0,) * (len(expected) - len(shape))), *moved)]
    assert float(got) == pytest.approx(float(x[(1, *last)]) / (255 if dtype is np.uint8 else 1))


def test_integers_other_than_bytes_are_tokens_and_big_endian_arrays_are_read() -> None:
    x = np.array([[1, 70_000], [3, 4]], dtype=">i4")
    train = from_arrays("a", {"x": x, "y": np.array([[0, 1], [1, -100]])}, "here").train
    assert train.inputs.dtype == torch.int64
    assert train.inputs.tolist() == [[1, 70_000], [3, 4]]
    assert train.labels.tolist() == [[0, 1], [1, -100]]


@settings(deadline=None, max_examples=40)
@given(
    train=st.lists(st.text("ab\u00e9", max_size=2), min_size=1),
    test=st.lists(st.text("ab\u00e9", max_size=2), min_size=1),
)
def test_string_columns_number_the_same_owner_alike_in_both_parts(train: list[str], test: list[str]) -> None:
    parts = {"train": train, "test": test}
    arrays: dict[str, Any] = {f"x_{part}": np.zeros((len(who), 2)) for part, who in parts.items()}
    arrays |= {f"y_{part}": np.zeros(len(who), np.int64) for part, who in parts.items()}
    arrays |= {f"column_writer_{part}": np.array(who) for part, who in parts.items()}
    dataset = from_arrays("a", arrays, "here")
    number = {who: i for i, who in enumerate(sorted(set(train + test)))}
    assert dataset.columns["writer"].tolist() == [number[who] for who in train]
    assert dataset.test_columns["writer"].tolist() == [number[who] for who in test]


def test_integer_columns_are_numbered_from_zero() -> None:
    arrays = {"x": X, "y": Y, "column_site": np.array([40, -3, 40, 7]), "column_a_b": np.array([1, 0, 0, 0])}
    columns = from_arrays("a", arrays, "here").columns
    assert {name: ids.tolist() for name, ids in columns.items()} == {"site": [2, 0, 2, 1], "a_b": [1, 0, 0, 0]}


def hole(value: float) -> np.ndarray:
    x = X.copy()
    x[2, 1] = value
    return x


SPLIT = {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"x": hole(np.nan), "y": Y}, r"array x must be finite, got nan at index \(2, 1\)"),
    "beyond float32": ({"x": hole(1e300), "y": Y}, r"array x must be finite, got inf at index \(2, 1\)"),
    "nan in test": (SPLIT | {"x_test": hole(np.nan)}, "array x_test must be finite"),
    "float labels": ({"x": X, "y": Y / 2}, r"array y: must be integers \(n,\) or \(n, time\), got float64"),
    "negative label": ({"x": X, "y": Y - 1}, r"array y must be in \[0, 2\), got -1 at index \(1,\)"),
    "counts differ": ({"x": X, "y": Y[:3]}, "train: 4 inputs but 3 labels"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "at least one example"),
    "strings": ({"x": np.array(["a"]), "y": Y[:1]}, "array x: must hold numbers, got <U1"),
    "no y": ({"x": X}, r"needs arrays x, y or x_train, .*, got \['x'\]"),
    "stray": ({"x": X, "y": Y, "z": X}, r"got \['x', 'y', 'z'\]"),
    "half a split": ({"x_train": X, "y_train": Y}, "needs arrays"),
    "short column": ({"x": X, "y": Y, "column_a": Y[:3]}, r"columns\['a'\] must be int64 \(4,\)"),
    "float column": ({"x": X, "y": Y, "column_a": X[:, 0]}, r"array column_a must be integers or strings \(n,\)"),
    "column without test": (SPLIT | {"column_a_train": Y}, "array column_a_test is missing"),
    "column of no part": (SPLIT | {"column_a": Y}, "array column_a must end in _train or _test"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_array_that_breaks_a_rule_is_named_with_its_file(tmp_path: Path, case: str) -> None:
    arrays, message = BAD[case]
    with pytest.raises(DataError, match=rf"mine\.npz: .*{message}"):
        npz(path=saved(tmp_path, **arrays))


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_files_that_are_no_archives_of_plain_arrays_are_errors_that_name_them(tmp_path: Path) -> None:
    path = saved(tmp_path, x=np.array([_Hostile(tmp_path / "owned")], dtype=object), y=Y[:1])
    with pytest.raises(DataError, match=r"mine\.npz: cannot be read: Object arrays"):
        npz(path=path)
    assert not (tmp_path / "owned").exists()
    whole = Path(saved(tmp_path, x=X, y=Y)).read_bytes()
    for content in (b"", b"rubbish", whole[:-30], whole.replace(X.tobytes(), (X + 1).tobytes())):
        Path(path).write_bytes(content)
        with pytest.raises(DataError, match=r"mine\.npz: "):
            npz(path=path)
    np.save(tmp_path / "mine.npy", X)
    with pytest.raises(DataError, match=r"mine\.npy: not an \.npz archive"):
        npz(path=str(tmp_path / "mine.npy"))
    with pytest.raises(DataError, match=r"other\.npz: cannot be read"):
        npz(path=str(tmp_path / "other.npz"))


def painted(folder: Path, colors: dict[str, tuple[int, int, int]], size: tuple[int, int] = (9, 6)) -> Path:
    for name, color in colors.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(folder / name)
    return folder


COLORS = {"cats/b.png": (255, 0, 0), "cats/a.bmp": (0, 51, 0), "dogs/x.PNG": (0, 0, 255), "dogs/y.gif": (255, 255, 255)}


def test_a_folder_of_images_has_a_class_per_subfolder(tmp_path: Path) -> None:
    painted(tmp_path / "pets", COLORS)
    (tmp_path / "pets" / "cats" / "notes.txt").write_text("no image")
    (tmp_path / "pets" / ".hidden").mkdir()
    dataset = image_folder(tmp_path, path="pets", size=4)
    assert (dataset.name, dataset.class_names, dataset.test) == ("pets", ("cats", "dogs"), None)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.inputs.shape == (4, 3, 4, 4)
    expected = [[0, 0.2, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert torch.allclose(dataset.train.inputs.mean((2, 3)), torch.tensor(expected, dtype=torch.float32))


def test_without_color_there_is_one_channel_of_luminance(tmp_path: Path) -> None:
    dataset = image_folder(path=str(painted(tmp_path, COLORS)), size=2, color=False)
    assert dataset.train.inputs.shape == (4, 1, 2, 2)
    assert float(dataset.train.inputs[1, 0, 0, 0]) == pytest.approx(0.299, abs=0.5 / 255)  # red, ITU-R 601


def test_rows_and_columns_keep_their_places(tmp_path: Path) -> None:
    pixels = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    inputs = image_folder(path=str(tmp_path), size=5).train.inputs
    assert inputs[0, 2, 4, 1] * 255 == pytest.approx(float(pixels[4, 1, 2]))


def test_train_and_test_subfolders_are_the_two_parts(tmp_path: Path) -> None:
    painted(tmp_path / "train", COLORS)
    painted(tmp_path / "test", {"dogs/z.png": (9, 9, 9)})
    dataset = image_folder(path=str(tmp_path), size=2)
    assert dataset.test is not None
    assert dataset.test.labels.tolist() == [1], "a class without test images keeps the numbers of the others"
    painted(tmp_path / "test", {"birds/z.png": (9, 9, 9)})
    with pytest.raises(DataError, match=r"test: classes \['birds'\] are not in"):
        image_folder(path=str(tmp_path), size=2)


def test_folders_and_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: folder does not exist"):
        image_folder(path=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="needs one subfolder per class"):
        image_folder(path=str(tmp_path))
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="at least one example"):
        image_folder(path=str(tmp_path))
    painted(tmp_path, COLORS)
    Image.frombytes("L", (64, 64), rng.bits(1, 512).numpy().tobytes()).save(tmp_path / "cats" / "b.png")
    for content in (b"", b"rubbish", (tmp_path / "cats" / "b.png").read_bytes()[:2000]):
        (tmp_path / "cats" / "b.png").write_bytes(content)
        with pytest.raises(DataError, match=r"b\.png: not a readable image"):
            image_folder(path=str(tmp_path))
