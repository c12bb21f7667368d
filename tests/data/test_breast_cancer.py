import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

from fedsim.data.breast_cancer import breast_cancer
from fedsim.data.checks import check


def test_it_is_scikit_learns_table_standardised_as_scikit_learn_does() -> None:
    dataset, found = breast_cancer(), load_breast_cancer()
    check(dataset)
    inputs = dataset.train.inputs.numpy()
    assert (inputs.dtype, inputs.shape, dataset.test) == (np.float32, (569, 30), None)
    assert np.abs(inputs - StandardScaler().fit_transform(found.data)).max() < 2e-6
    assert inputs.astype(np.float64).mean(0) == pytest.approx(np.zeros(30), abs=1e-6)
    assert inputs.astype(np.float64).std(0) == pytest.approx(np.ones(30), abs=1e-6)


def test_labels_are_named_as_scikit_learn_counts_them() -> None:
    dataset = breast_cancer()
    assert np.bincount(dataset.train.labels.numpy()).tolist() == [212, 357]
    assert (dataset.num_classes, dataset.class_names) == (2, ("malignant", "benign"))
    radius = dataset.train.inputs[:, 0]
    assert radius[dataset.train.labels == 0].mean() > 0 > radius[dataset.train.labels == 1].mean()
