"""MNIST and Fashion-MNIST: images and labels in IDX files, gzipped or not.

An IDX file is: two zero bytes, a type code (0x08: unsigned bytes), the number of axes, each axis as a big-endian
uint32, then the bytes in row-major order.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedsim.data import download, locations
from fedsim.data.checks import check, check_labels
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples

_UNSIGNED_BYTE = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_CLASSES = 10
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class _Source:
    """One of the two sets: where to download it and what its classes are called."""

    name: str
    mirrors: tuple[str, ...]
    digests: tuple[str, ...]  # of the gzipped files, in the order of _FILES
    class_names: tuple[str, ...]


_MNIST = _Source(
    name="mnist",
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    digests=(  # as published with torchvision's loader
        "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "md5:d53e105ee54ea40749a09fcbcd1e9432",
        "md5:9fb629c4189551a2d022fa330f9573f3",
        "md5:ec29112dd5afa0611ce80d1b7f02629c",
    ),
    class_names=tuple("0123456789"),
)
_FASHION_MNIST = _Source(
    name="fashion-mnist",
    mirrors=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
    digests=(  # images: the publisher's README; labels: computed from the publisher's files
        "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "md5:bef4ecab320f06d8554ea6380940ec79",
        "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)


def mnist(root: Path | None = None, progress: download.Progress = download.silent) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, 28 x 28, from IDX files or downloaded.

    Args:
        root: ``data.root``: folder with the four IDX files; None: ``$FEDSIM_DATA``, the user cache, then download.
        progress: told about a download.

    Returns:
        Inputs float32 (n, 1, 28, 28) in [0, 1]; labels 0-9.

    Raises:
        DataError: a file is missing or damaged, or a download failed.

    Source: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition".
        Differs: none.
    """
    return _load(_MNIST, root, progress)


def fashion_mnist(root: Path | None = None, progress: download.Progress = download.silent) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28 x 28, from IDX files or downloaded.

    Args:
        root: ``data.root``: folder with the four IDX files; None: ``$FEDSIM_DATA``, the folder of Debian's package
            dataset-fashion-mnist, the user cache, then download.
        progress: told about a download.

    Returns:
        Inputs float32 (n, 1, 28, 28) in [0, 1]; labels 0-9, 6,000 + 1,000 of each.

    Raises:
        DataError: a file is missing or damaged, or a download failed.

    Source: Xiao, Rasul, Vollgraf 2017, "Fashion-MNIST". arXiv:1708.07747.
        Differs: none.
    """
    return _load(_FASHION_MNIST, root, progress)


def read_idx(path: Path, axes: int) -> npt.NDArray[np.uint8]:
    """Unsigned bytes from one IDX file, gzipped or not (told by its content, not by its name).

    Args:
        path: of the file.
        axes: how many the array must have: 1 for labels, 3 for images.

    Returns:
        Read-only array of the shape in the file's header.

    Raises:
        DataError: the file is not readable, cut short, not IDX, of another type or shape, or longer than it says.
    """
    content = _content(path)
    magic = bytes((0, 0, _UNSIGNED_BYTE, axes))
    if content[:4] != magic:
        raise DataError(f"{path}: an IDX file of {axes} axes begins with {magic.hex(' ')}, got {content[:4].hex(' ')}")
    begin = 4 + 4 * axes
    if len(content) < begin:
        raise DataError(f"{path}: the header needs {begin} bytes, the file has {len(content)}")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, begin, 4)]
    needed = begin + int(np.prod(shape, dtype=object))  # Python integers: a forged header must not overflow
    if len(content) != needed:
        raise DataError(f"{path}: shape {tuple(shape)} needs {needed} bytes, the file has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content
    except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
        raise DataError(f"{path}: cannot be read: {error}") from error


def _load(source: _Source, root: Path | None, progress: download.Progress) -> Dataset:
    paths = locations.locate(source.name, root, [_spellings(file) for file in _FILES])
    if paths is None:
        paths = [locations.cache_folder(source.name) / f"{file}.gz" for file in _FILES]
        for path, digest in zip(paths, source.digests, strict=True):
            download.fetch([mirror + path.name for mirror in source.mirrors], path, digest=digest, progress=progress)
    train, test = _examples(*paths[:2]), _examples(*paths[2:])
    dataset = Dataset(source.name, train, test, _CLASSES, class_names=source.class_names)
    check(dataset)
    return dataset


def _spellings(file: str) -> list[str]:
    """``train-images-idx3-ubyte`` is also met as ``train-images.idx3-ubyte``; each with or without ``.gz``."""
    dotted = file.replace("-idx", ".idx")
    return [file, f"{file}.gz", dotted, f"{dotted}.gz"]


def _examples(images_path: Path, labels_path: Path) -> Examples:
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images in {images_path}, but {len(labels)} labels in {labels_path}")
    targets = torch.from_numpy(labels.astype(np.int64))
    check_labels(targets, _CLASSES, f"{labels_path}: labels")
    pixels = torch.from_numpy(images.astype(np.float32)).div_(255)  # (n, height, width)
    return Examples(pixels.unsqueeze(1), targets)
