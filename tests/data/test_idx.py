import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.data.idx import fashion_mnist, mnist, read_idx
from fedsim.errors import DataError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


IMAGES = (np.arange(5 * 3 * 4) * 7 % 256).reshape(5, 3, 4)  # not square, so that swapped sides show
LABELS = np.array([9, 0, 3, 3, 1])
SMALL = dict(zip(NAMES, [idx(IMAGES), idx(LABELS), idx(IMAGES[:2]), idx(LABELS[:2])], strict=True))


@pytest.fixture(autouse=True)
def no_other_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither this machine's data folders nor the network take part."""
    monkeypatch.delenv("FEDSIM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fedsim.data.download.fetch", lambda *args, **kwargs: pytest.fail("no download is needed"))


def written(folder: Path, files: dict[str, bytes], name: Callable[[str], str] = str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        packed = gzip.compress(content) if name(file).endswith(".gz") else content
        (folder / name(file)).write_bytes(packed)
    return folder


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_found_and_has_the_published_counts() -> None:
    dataset = fashion_mnist()
    assert dataset.test is not None
    assert dataset.train.inputs.shape == (60_000, 1, 28, 28)
    assert dataset.test.inputs.shape == (10_000, 1, 28, 28)
    assert torch.bincount(dataset.train.labels).tolist() == [6_000] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [1_000] * 10
    assert (float(dataset.train.inputs.min()), float(dataset.train.inputs.max())) == (0.0, 1.0)
    # the well-known mean and standard deviation of this set's training pixels
    assert float(dataset.train.inputs.mean()) == pytest.approx(0.2860, abs=5e-5)
    assert float(dataset.train.inputs.std()) == pytest.approx(0.3530, abs=5e-5)
    assert dataset.class_names[int(dataset.train.labels[0])] == "Ankle boot"


@pytest.mark.parametrize(
    "name",
    [str, "{}.gz".format, lambda file: file.replace("-idx", ".idx"), lambda file: file.replace("-idx", ".idx") + ".gz"],
    ids=["plain", "gzip", "dot", "dot gzip"],
)
@pytest.mark.parametrize("below", ["", "mnist"])
def test_all_usual_names_are_read_from_the_root_or_its_subfolder(
    tmp_path: Path, name: Callable[[str], str], below: str
) -> None:
    written(tmp_path / "data" / below, SMALL, name)
    dataset = mnist(tmp_path / "data")
    assert dataset.test is not None
    assert dataset.train.inputs.shape == (5, 1, 3, 4)
    assert torch.equal(dataset.train.inputs[3, 0, 2], torch.tensor(IMAGES[3, 2] / 255, dtype=torch.float32))
    assert dataset.train.labels.tolist() == LABELS.tolist()
    assert dataset.test.labels.tolist() == [9, 0]


def test_gzip_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "labels.gz").write_bytes(idx(LABELS))
    (tmp_path / "labels").write_bytes(gzip.compress(idx(LABELS)))
    assert read_idx(tmp_path / "labels.gz", 1).tolist() == read_idx(tmp_path / "labels", 1).tolist() == LABELS.tolist()


def test_fedsim_data_and_the_cache_are_looked_at_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "cache" / "fedsim" / "mnist", SMALL)
    assert mnist().train.labels.tolist() == LABELS.tolist()
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    assert mnist().train.labels.tolist() == LABELS.tolist(), "an empty shared folder does not hide the cache"
    written(tmp_path / "shared" / "mnist", SMALL | {NAMES[1]: idx(LABELS[::-1])})
    assert mnist().train.labels.tolist() == LABELS[::-1].tolist()


def test_what_is_missing_is_downloaded_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def fetch(urls: list[str], destination: Path, *, digest: str, progress: object) -> None:
        asked.append((urls, digest))
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(gzip.compress(SMALL[destination.stem]))

    monkeypatch.setattr("fedsim.data.download.fetch", fetch)
    assert mnist().train.labels.tolist() == LABELS.tolist()
    assert [urls[0].rsplit("/", 1)[1] for urls, _ in asked] == [f"{name}.gz" for name in NAMES]
    assert all(url.startswith("https://") for urls, _ in asked for url in urls)
    assert len({digest for _, digest in asked}) == 4
    assert (tmp_path / "cache" / "fedsim" / "mnist" / "train-images-idx3-ubyte.gz").is_file()


def test_a_root_without_the_files_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: folder .*/nowhere does not exist"):
        mnist(tmp_path / "nowhere")
    folder = written(tmp_path / "data", {name: SMALL[name] for name in NAMES[:3]})
    with pytest.raises(DataError, match=r"data\.root: no t10k-labels-idx1-ubyte or .*leave data\.root out"):
        mnist(folder)


IMAGE_FILE, LABEL_FILE = NAMES[:2]
BAD = {
    "wrong magic": (
        IMAGE_FILE,
        b"\x00\x00\x0d\x03" + SMALL[IMAGE_FILE][4:],
        "begins with 00 00 08 03, got 00 00 0d 03",
    ),
    "labels for images": (IMAGE_FILE, SMALL[LABEL_FILE], "begins with 00 00 08 03, got 00 00 08 01"),
    "empty": (IMAGE_FILE, b"", "begins with"),
    "header only begun": (IMAGE_FILE, SMALL[IMAGE_FILE][:10], "the header needs 16 bytes, the file has 10"),
    "too short": (IMAGE_FILE, SMALL[IMAGE_FILE][:-1], "needs 76 bytes, the file has 75"),
    "too long": (LABEL_FILE, SMALL[LABEL_FILE] + b"\x01", "needs 13 bytes, the file has 14"),
    "forged size": (IMAGE_FILE, struct.pack(">4B3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "the file has 16"),
    "label out of range": (LABEL_FILE, idx(np.array([9, 0, 10, 3, 1])), r"labels must be in \[0, 10\), got 10"),
    "truncated gzip": (IMAGE_FILE, gzip.compress(SMALL[IMAGE_FILE])[:-12], "cannot be read"),
    "damaged gzip": (IMAGE_FILE, gzip.compress(SMALL[IMAGE_FILE])[:-8] + b"\x00" * 8, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, case: str) -> None:
    file, content, message = BAD[case]
    folder = written(tmp_path / "data", SMALL | {file: content})
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        mnist(folder)


def test_counts_that_differ_name_both_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", SMALL | {LABEL_FILE: idx(LABELS[:4])})
    with pytest.raises(DataError, match=f"5 images in .*{IMAGE_FILE}, but 4 labels in .*{LABEL_FILE}"):
        mnist(folder)


def test_no_examples_at_all_is_an_error(tmp_path: Path) -> None:
    folder = written(tmp_path / "data", SMALL | {IMAGE_FILE: idx(IMAGES[:0]), LABEL_FILE: idx(LABELS[:0])})
    with pytest.raises(DataError, match="at least one example is needed"):
        mnist(folder)
