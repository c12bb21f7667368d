import inspect
from typing import get_type_hints

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedsim.data.datasets import DATASETS, digits
from fedsim.records import Dataset

CONTEXT = {"root", "key", "progress"}


def test_digits_are_scikit_learns_scaled_to_one() -> None:
    dataset, (images, labels) = digits(), load_digits(return_X_y=True)
    assert dataset.test is None
    assert dataset.train.inputs.shape == (1797, 1, 8, 8)
    assert np.array_equal(dataset.train.inputs.reshape(1797, 64).numpy() * 16, images)
    assert np.array_equal(dataset.train.labels.numpy(), labels)
    assert float(dataset.train.inputs.max()) == 1.0


@pytest.mark.parametrize("name", DATASETS)
def test_every_factory_keeps_the_convention_the_config_layer_builds_on(name: str) -> None:
    factory = DATASETS[name]
    assert get_type_hints(factory)["return"] is Dataset
    for parameter in inspect.signature(factory).parameters.values():
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (parameter.name not in CONTEXT), parameter.name
        assert parameter.name in get_type_hints(factory)
    first_line = inspect.getdoc(factory).splitlines()[0]  # type: ignore[union-attr]
    assert first_line.endswith(".")
