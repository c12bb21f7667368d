"""Your own data from files: arrays in one ``.npz``, or a folder of images. Also the rules for arrays in general."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Interval
from torch import Tensor

from fedsim.data.checks import check, check_finite, check_labels
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples, Indices

Array = npt.NDArray[Any]

_WHOLE = ("x", "y")
_SPLIT = ("x_train", "y_train", "x_test", "y_test")
_COLUMN = "column_"
_CHANNELS = (1, 3, 4)
_SMALLEST_SIDE = 5  # below this (n, 4, 4, 3) could as well be 4 channels of 4 x 3
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def npz(root: Path | None = None, *, path: str) -> Dataset:
    """Your own arrays from one .npz file: x and y, or x_train, y_train, x_test and y_test; column_<name> for owners.

    Args:
        root: ``data.root``, which a relative path starts from; None: the current folder.
        path: of the file.

    Returns:
        Inputs, labels and columns by the rules of :func:`from_arrays`.

    Raises:
        DataError: names the file, the array and the rule it breaks.
    """
    file = _below(root, path)
    if file.is_file() and not zipfile.is_zipfile(file):
        raise DataError(f"{file}: not an .npz archive of named arrays, as numpy.savez writes it")
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return from_arrays(file.stem, arrays, str(file))


def from_arrays(name: str, arrays: Mapping[str, Array], what: str) -> Dataset:
    """A dataset from named arrays.

    Inputs: floats become float32; uint8 becomes float32 / 255; other integers are tokens, int64. Floats and uint8 of
    shape (n, height, width) become (n, 1, height, width); (n, height, width, channels) with 1, 3 or 4 channels and
    sides above 4 becomes (n, channels, height, width); every other shape stays. Labels: integers (n,) or (n, time),
    from 0 (-100: left out); there are as many classes as the largest label asks for. Columns: integers or strings,
    numbered in sorted order.

    Args:
        name: of the dataset.
        arrays: ``x``, ``y``, any ``column_<name>``; or ``x_train``, ``y_train``, ``x_test``, ``y_test``, any
            ``column_<name>_train`` with its ``column_<name>_test``.
        what: named in errors.

    Raises:
        DataError: an array is missing, has a name not listed above, or breaks a rule.
    """
    columns = {key for key in arrays if key.startswith(_COLUMN)}
    names = arrays.keys() - columns
    if names not in (set(_WHOLE), set(_SPLIT)):
        raise DataError(f"{what}: needs arrays {', '.join(_WHOLE)} or {', '.join(_SPLIT)}, got {sorted(names)}")
    suffixes = ("",) if names == set(_WHOLE) else ("_train", "_test")
    labels = [_labels(arrays[f"y{suffix}"], f"{what}: array y{suffix}") for suffix in suffixes]
    num_classes = max((int(part.max()) + 1 for part in labels if part.numel()), default=1)
    for part, suffix in zip(labels, suffixes, strict=True):
        check_labels(part, max(num_classes, 1), f"{what}: array y{suffix}")
    inputs = [_inputs(arrays[f"x{suffix}"], f"{what}: array x{suffix}") for suffix in suffixes]
    parts = [Examples(x, y) for x, y in zip(inputs, labels, strict=True)]
    numbered = _columns({key: arrays[key] for key in columns}, suffixes, what)
    dataset = Dataset(name, parts[0], parts[1] if len(parts) > 1 else None, num_classes, numbered[0], numbered[1])
    check(replace(dataset, name=what))
    return dataset


def image_folder(
    root: Path | None = None,
    *,
    path: str,
    size: Annotated[int, Interval(ge=1, le=4096)] = 32,
    color: bool = True,
) -> Dataset:
    """Your own images from a folder with one subfolder per class, or with train/ and test/ that hold such subfolders.

    Args:
        root: ``data.root``, which a relative path starts from; None: the current folder.
        path: of the folder. Files that are no images by their suffix, and hidden ones, are left out.
        size: side the images are resized to (bilinear, without keeping proportions), in [1, 4096].
        color: three channels; else one, the luminance.

    Returns:
        Inputs float32 (n, 3 or 1, size, size) in [0, 1]; labels: classes in the order of their folders' names.

    Raises:
        DataError: names the folder or file and what is wrong with it.
    """
    folder = _below(root, path)
    if not folder.is_dir():
        raise DataError(f"{folder}: folder does not exist")
    split = (folder / "train").is_dir()
    train = folder / "train" if split else folder
    classes = _subfolders(train)
    if not classes:
        raise DataError(f"{train}: needs one subfolder per class, has none")
    test = folder / "test" if split and (folder / "test").is_dir() else None
    if test and (unknown := sorted(set(_subfolders(test)) - set(classes))):
        raise DataError(f"{test}: classes {unknown} are not in {train}")
    dataset = Dataset(
        folder.name,
        _images(train, classes, size, color),
        _images(test, classes, size, color) if test else None,
        len(classes),
        class_names=tuple(classes),
    )
    check(dataset)
    return dataset


def _below(root: Path | None, path: str) -> Path:
    if root is not None and not root.is_dir():
        raise DataError(f"data.root: folder {root} does not exist")
    return (root or Path()) / Path(path).expanduser()


def _inputs(array: Array, what: str) -> Tensor:
    kind = array.dtype.kind
    if kind not in "fiu":
        raise DataError(f"{what}: must hold numbers, got {array.dtype}")
    native = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if kind != "f" and array.dtype != np.uint8:
        return native.to(torch.int64)
    values = native.to(torch.float32)
    check_finite(values, what)
    if array.dtype == np.uint8:
        values = values / 255
    if values.ndim == 3:
        return values.unsqueeze(1)
    if values.ndim == 4 and values.shape[3] in _CHANNELS and min(values.shape[1:3]) >= _SMALLEST_SIDE:
        return values.permute(0, 3, 1, 2).contiguous()
    return values


def _labels(array: Array, what: str) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise DataError(f"{what}: must be integers (n,) or (n, time), got {array.dtype} {array.shape}")
    return torch.from_numpy(array.astype(np.int64))


def _columns(columns: Mapping[str, Array], suffixes: Sequence[str], what: str) -> tuple[dict[str, Indices], ...]:
    """Ids per part; one number means one owner in all parts."""
    parts: tuple[dict[str, Indices], ...] = ({}, {})
    for name in sorted({_column_name(key, suffixes, what) for key in columns}):
        try:
            arrays = [columns[f"{_COLUMN}{name}{suffix}"] for suffix in suffixes]
        except KeyError as error:
            raise DataError(f"{what}: array {error.args[0]} is missing") from error
        for array, suffix in zip(arrays, suffixes, strict=True):
            if array.dtype.kind not in "iuU" or array.ndim != 1:
                got = f"{array.dtype} {array.shape}"
                raise DataError(f"{what}: array {_COLUMN}{name}{suffix} must be integers or strings (n,), got {got}")
        ids = np.unique(np.concatenate(arrays), return_inverse=True)[1].astype(np.int64)
        for part, own in zip(parts, np.split(ids, np.cumsum([len(array) for array in arrays])[:-1]), strict=False):
            part[name] = own
    return parts


def _column_name(key: str, suffixes: Sequence[str], what: str) -> str:
    for suffix in suffixes:
        if key.endswith(suffix):
            return key.removeprefix(_COLUMN).removesuffix(suffix)
    raise DataError(f"{what}: array {key} must end in {' or '.join(suffixes)}")


def _subfolders(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(folder: Path, classes: Sequence[str], size: int, color: bool) -> Examples:
    files = [(file, label) for label, name in enumerate(classes) for file in _image_files(folder / name)]
    pixels = np.empty((len(files), 3 if color else 1, size, size), np.uint8)
    for row, (file, _) in zip(pixels, files, strict=True):
        row[:] = _pixels(file, size, color)
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Examples(torch.from_numpy(pixels).to(torch.float32).div_(255), labels)


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []  # the test part may lack a class
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))


def _pixels(file: Path, size: int, color: bool) -> Array:
    """One image: uint8 (channels, size, size)."""
    from PIL import Image  # noqa: PLC0415  (most runs read no image files)

    try:
        with Image.open(file) as image:
            resized = image.convert("RGB" if color else "L").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: not a readable image: {error}") from error
    return np.asarray(resized).reshape(size, size, -1).transpose(2, 0, 1)
