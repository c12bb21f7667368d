"""Breast cancer: a small table that comes with scikit-learn."""

import numpy as np
import torch

from fedsim.data.checks import check
from fedsim.data.tabular import standardised
from fedsim.records import Dataset, Examples


def breast_cancer() -> Dataset:
    """Breast cancer, 569 cell samples of 30 measurements, malignant or benign, with scikit-learn: no download.

    Returns:
        Inputs float32 (569, 30), columns of mean 0 and standard deviation 1; labels 0 malignant (212), 1 benign (357);
        no test set of its own.

    Source: Street, Wolberg, Mangasarian 1993, "Nuclear feature extraction for breast tumor diagnosis", UCI repository
        (Breast Cancer Wisconsin, Diagnostic).
        Differs: columns are standardised, over all rows, so also over those that are held out later.

    >>> breast_cancer().train.inputs.shape
    torch.Size([569, 30])
    """
    from sklearn.datasets import load_breast_cancer  # noqa: PLC0415  (a second that other datasets need not wait)

    found = load_breast_cancer()
    inputs = torch.from_numpy(standardised(found.data).astype(np.float32))
    labels = torch.from_numpy(found.target.astype(np.int64))
    names = tuple(str(name) for name in found.target_names)
    dataset = Dataset("breast-cancer", Examples(inputs, labels), None, 2, class_names=names)
    check(dataset)
    return dataset
