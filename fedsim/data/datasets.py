"""The table of datasets, and the first of them, which needs no files."""

from collections.abc import Callable

import numpy as np
import torch

from fedsim.data.breast_cancer import breast_cancer
from fedsim.data.checks import check
from fedsim.data.cifar import cifar10, cifar100
from fedsim.data.columns import columns
from fedsim.data.credit import credit_default
from fedsim.data.files import image_folder, npz
from fedsim.data.idx import fashion_mnist, mnist
from fedsim.data.synthetic import synthetic
from fedsim.data.text import shakespeare
from fedsim.records import Dataset, Examples

_BRIGHTEST = 16.0  # of load_digits


def digits() -> Dataset:
    """Handwritten digits, 1,797 of 8 x 8, that come with scikit-learn: no download.

    Returns:
        Inputs float32 (1797, 1, 8, 8) in [0, 1]; labels 0-9; no test set of its own.

    Source: Alpaydin, Kaynak 1998, "Optical recognition of handwritten digits", UCI repository (its test part).
        Differs: pixels are divided by 16.

    >>> digits().train.inputs.shape
    torch.Size([1797, 1, 8, 8])
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  (a second that other datasets need not wait)

    found = load_digits()
    inputs = torch.from_numpy((found.images / _BRIGHTEST).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(found.target.astype(np.int64))
    dataset = Dataset("digits", Examples(inputs, labels), None, 10, class_names=tuple("0123456789"))
    check(dataset)
    return dataset


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "shakespeare": shakespeare,
    "synthetic": synthetic,
    "breast-cancer": breast_cancer,
    "credit-default": credit_default,
    "columns": columns,
    "npz": npz,
    "image-folder": image_folder,
}
