import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data.cifar import cifar10, cifar100, unpickle
from fedsim.errors import DataError


class _Python2Pickler(pickle._Pickler):  # the C pickler cannot be taught another opcode
    """Writes strings as Python 2 did, in which the real archives were made."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, text: str | bytes) -> None:
        raw = text if isinstance(text, bytes) else text.encode("latin-1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    _Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


PIXELS = (np.arange(12 * 3072, dtype=np.int64) * 31 % 256).astype(np.uint8).reshape(12, 3072)
LABELS = [3, 9, 0, 0, 7, 1, 2, 5, 8, 4, 6, 9]


def batch(rows: slice, labels: str = "labels") -> bytes:
    return python2_pickle({"data": PIXELS[rows], labels: LABELS[rows], "batch_label": "one of five"})


TEN = {f"data_batch_{i}": batch(slice(2 * i - 2, 2 * i)) for i in range(1, 6)} | {
    "test_batch": batch(slice(10, 12)),
    "batches.meta": python2_pickle({"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072}),
}
HUNDRED = {
    "train": batch(slice(0, 9), "fine_labels"),
    "test": batch(slice(9, 12), "fine_labels"),
    "meta": python2_pickle({"fine_label_names": [f"class {i}" for i in range(100)]}),
}


def packed(folder: Path, archive: str, inner: str, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{inner}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def ten(folder: Path, **changed: bytes) -> Path:
    return packed(folder, "cifar-10-python.tar.gz", "cifar-10-batches-py", TEN | changed)


def test_cifar10_is_read_from_its_archive(tmp_path: Path) -> None:
    dataset = cifar10(ten(tmp_path))
    assert dataset.test is not None
    assert dataset.train.inputs.shape == (10, 3, 32, 32)
    assert dataset.train.labels.tolist() == LABELS[:10]
    assert dataset.test.labels.tolist() == LABELS[10:]
    assert dataset.class_names[3] == "class 3"
    # a row holds the red plane, then green, then blue, each line by line
    assert float(dataset.test.inputs[1, 2, 30, 5]) == pytest.approx(PIXELS[11, 2 * 1024 + 30 * 32 + 5] / 255)


def test_the_folder_the_archive_unpacks_to_may_be_in_the_root_or_be_the_root(tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "cifar-10-batches-py", TEN)
    of_archive = cifar10(ten(tmp_path / "packed"))
    for root in (tmp_path, folder):
        assert torch.equal(cifar10(root).train.inputs, of_archive.train.inputs)


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    dataset = cifar100(packed(tmp_path, "cifar-100-python.tar.gz", "cifar-100-python", HUNDRED))
    assert dataset.num_classes == 100
    assert dataset.train.labels.tolist() == LABELS[:9]
    assert len(dataset.class_names) == 100


def test_cifar10_is_downloaded_into_the_cache_when_no_root_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(urls: list[str], destination: Path, *, digest: str, progress: object) -> None:
        assert urls == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
        destination.parent.mkdir(parents=True)
        ten(destination.parent)

    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fedsim.data.download.fetch", fetch)
    assert len(cifar10().train) == 10
    monkeypatch.setattr("fedsim.data.download.fetch", lambda *args, **kwargs: pytest.fail("it is in the cache"))
    assert len(cifar10().train) == 10


class _Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    content = pickle.dumps({"data": _Hostile(tmp_path / "owned")}, protocol=2)
    with pytest.raises(DataError, match=r"data_batch_3: not a pickle of arrays: it names \w+\.mkdir"):
        cifar10(ten(tmp_path, data_batch_3=content))
    assert not (tmp_path / "owned").exists()
    pickle.loads(content)
    assert (tmp_path / "owned").exists(), "the pickle should have been a dangerous one"


@pytest.mark.parametrize("name", ["builtins eval", "builtins getattr", "numpy load", "numpy.core.multiarray scalar"])
def test_only_the_names_an_array_needs_are_known(name: str) -> None:
    module, attribute = name.split()
    with pytest.raises(DataError, match=f"it names {module}.{attribute}"):
        unpickle(f"c{module}\n{attribute}\n.".encode(), "here")


def test_pickles_of_todays_numpy_are_read_too() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    found = unpickle(pickle.dumps({b"data": array}, protocol=4), "here")
    assert found[b"data"].tolist() == array.tolist()


BAD = {
    "damaged": (TEN["data_batch_3"][:-40], "data_batch_3: not a pickle of arrays"),
    "no dict": (python2_pickle([1, 2]), "data_batch_3: expected a dict, got list"),
    "no data": (python2_pickle({"labels": [1]}), r"data_batch_3: b'data' must be a uint8 array \(n, 3072\)"),
    "wrong width": (python2_pickle({"data": PIXELS[:1, :9], "labels": [1]}), "data_batch_3: b'data' must be"),
    "counts differ": (
        python2_pickle({"data": PIXELS[:2], "labels": [1]}),
        "data_batch_3: b'labels' must be a list of 2",
    ),
    "out of range": (python2_pickle({"data": PIXELS[:2], "labels": [1, 10]}), r"data_batch_3.*\[0, 10\), got 10"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_batch_is_an_error_that_names_archive_and_batch(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    with pytest.raises(DataError, match=rf"cifar-10-python\.tar\.gz: {message}"):
        cifar10(ten(tmp_path, data_batch_3=content))


def test_a_truncated_archive_and_a_missing_member_are_errors_that_name_the_archive(tmp_path: Path) -> None:
    archive = ten(tmp_path) / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: (cannot be read|has no)"):
        cifar10(tmp_path)
    some = {name: content for name, content in TEN.items() if name != "data_batch_4"}
    packed(tmp_path, "cifar-10-python.tar.gz", "cifar-10-batches-py", some)
    with pytest.raises(DataError, match="has no data_batch_4"):
        cifar10(tmp_path)


def test_an_unpacked_folder_that_lacks_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = unpacked(tmp_path / "cifar-10-batches-py", TEN)
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match="test_batch: cannot be read"):
        cifar10(folder)
