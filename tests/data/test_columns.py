import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_digits

from fedsim.data.checks import check
from fedsim.data.columns import columns, cut
from fedsim.data.datasets import DATASETS


@pytest.mark.parametrize(("share", "width"), [(0.5, 4), (0.25, 2), (0.3, 2), (0.9, 7), (0.6, 5)])
def test_images_are_cut_along_their_width(share: float, width: int) -> None:
    images = load_digits().images
    left = columns(0, of="digits", share=share).train
    right = columns(0, of="digits", side="b", share=share).train
    assert left.inputs.shape == (1797, 1, 8, width)
    assert right.inputs.shape == (1797, 1, 8, 8 - width)
    for row in (0, 5, 1796):
        for height in range(8):
            pixels = [value / 16 for value in images[row][height]]
            assert left.inputs[row, 0, height].tolist() == pixels[:width]
            assert right.inputs[row, 0, height].tolist() == pixels[width:]
    assert np.array_equal(left.labels, load_digits().target)
    assert np.array_equal(right.labels, load_digits().target)


def test_the_columns_of_a_table_are_the_first_and_the_rest() -> None:
    data, whole = load_breast_cancer().data, DATASETS["breast-cancer"]()
    a, b = (columns(0, of="breast-cancer", side=side, share=0.4) for side in ("a", "b"))
    assert (a.train.inputs.shape, b.train.inputs.shape) == ((569, 12), (569, 18))
    for at in range(30):
        got = a.train.inputs[:, at] if at < 12 else b.train.inputs[:, at - 12]
        assert np.corrcoef(got.numpy(), data[:, at])[0, 1] == pytest.approx(1, abs=1e-5)
    assert (a.test, a.num_classes, a.class_names) == (None, 2, whole.class_names)
    assert a.name == "columns of breast-cancer"


def test_test_set_and_owners_stay_and_the_key_is_the_other_datasets() -> None:
    whole, side = DATASETS["synthetic"](7), columns(7, of="synthetic", side="b", share=0.9)
    check(side)
    assert whole.test is not None
    assert side.test is not None
    for part, cut_part in ((whole.train, side.train), (whole.test, side.test)):
        assert np.array_equal(part.inputs.numpy()[:, 54:], cut_part.inputs)
        assert np.array_equal(part.labels, cut_part.labels)
    assert np.array_equal(whole.columns["device"], side.columns["device"])
    assert np.array_equal(whole.test_columns["device"], side.test_columns["device"])
    assert not torch.equal(side.train.labels[:50], columns(8, of="synthetic").train.labels[:50])


def test_the_root_is_the_other_datasets(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=rf"needs the file UCI_Credit_Card\.csv in {tmp_path}"):
        columns(0, tmp_path, of="credit-default")


@given(st.integers(1, 40), st.floats(0, 1, exclude_min=True, exclude_max=True), st.sampled_from([(), (3,), (2, 3)]))
def test_both_sides_together_are_the_whole(width: int, share: float, middle: tuple[int, ...]) -> None:
    whole = torch.arange(2 * math.prod(middle) * width, dtype=torch.float32).reshape(2, *middle, width)
    first = round(share * width)
    if first in (0, width):
        with pytest.raises(ValueError, match=f"share must leave each side one of the {width} columns or more, got "):
            cut(whole, "a", share)
        return
    a, b = cut(whole, "a", share), cut(whole, "b", share)
    assert a.shape == (2, *middle, first)
    assert np.array_equal(np.concatenate([a.numpy(), b.numpy()], -1), whole.numpy())
    a.zero_()
    assert float(whole.sum()) > 0, "a copy was cut, not the dataset itself"


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("digit", "of must be one of digits, .*, got digit"),
        ("columns", "of must be one of digits, .*, got columns"),
        ("npz", "of must be a dataset that needs no parameters, npz needs path"),
    ],
)
def test_another_dataset_that_cannot_be_is_named(of: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns(0, of=of)


def test_tokens_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = DATASETS["digits"]()
    inputs = torch.ones(len(digits.train), 4, dtype=torch.int64)
    tokens = type(digits)("text", type(digits.train)(inputs, digits.train.labels), None, 10)
    monkeypatch.setitem(DATASETS, "text", lambda: tokens)
    with pytest.raises(ValueError, match="of must be a dataset of numbers, text has tokens"):
        columns(0, of="text")


def test_what_has_no_columns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"inputs must have columns, got shape \(3,\)"):
        cut(torch.ones(3), "a", 0.5)
