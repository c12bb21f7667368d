import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import rng
from fedsim.data.synthetic import synthetic
from fedsim.records import Dataset


def device(dataset: Dataset, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples of one device, train then test."""
    assert dataset.test is not None
    mine, held = dataset.columns["device"] == k, dataset.test_columns["device"] == k
    inputs = torch.cat([dataset.train.inputs[mine], dataset.test.inputs[held]])
    return inputs, torch.cat([dataset.train.labels[mine], dataset.test.labels[held]])


@pytest.mark.parametrize("iid", [False, True])
def test_labels_are_the_largest_score_of_the_devices_own_model(iid: bool) -> None:
    dataset = synthetic(11, alpha=0.5, beta=1.0, owners=3, iid=iid)
    for k in range(3):
        # entry by entry from the device's draws: size, u, B, v (60), then W and b row by row (10 x 61)
        key = rng.fold(11, "synthetic", "device", 0 if iid else k)
        z = rng.normal(key, 673, dtype=torch.float64).tolist()
        shift = 0.0 if iid else 0.5 * z[1]
        inputs, labels = device(dataset, k)
        for x, label in zip(inputs[:40].tolist(), labels[:40].tolist(), strict=True):
            rows = [[shift + entry for entry in z[63 + 61 * c : 63 + 61 * (c + 1)]] for c in range(10)]
            scores = [sum(w * v for w, v in zip(row, [*x, 1.0], strict=True)) for row in rows]
            assert label == scores.index(max(scores))


def test_sizes_are_fifty_plus_a_lognormal_and_a_fifth_of_each_device_is_test() -> None:
    dataset = synthetic(5, owners=200, max_examples=3_000)
    train, test = np.bincount(dataset.columns["device"]), np.bincount(dataset.test_columns["device"])
    sizes = train + test
    assert sizes.min() >= 50
    assert sizes.max() == 3_000
    assert np.array_equal(test, sizes // 5)
    # n = 200: the median of sizes - 50 is exp(4) = 54.6; fewer than 60 or more than 140 below it has odds < 1e-6
    assert 60 <= int((sizes - 50 < math.exp(4)).sum()) <= 140


def test_inputs_have_the_stated_variances_around_a_mean_of_their_device() -> None:
    dataset = synthetic(3, owners=20, beta=2.0)
    inputs = torch.cat([x - x.mean(0) for x in (device(dataset, k)[0] for k in range(20))])
    # n > 2,000 per feature: a variance estimate has std < 0.032 and bias < 0.01 (20 means), relative; 0.2 is 6 of these
    # away, for one of 60 features odds < 1e-6
    variances = inputs.double().var(0)
    expected = torch.arange(1, 61, dtype=torch.float64) ** -1.2
    assert len(inputs) > 2_000
    assert float((variances / expected - 1).abs().max()) < 0.2


def test_beta_sets_the_spread_of_device_means_and_zero_leaves_unit_spread() -> None:
    def overall_means(beta: float) -> torch.Tensor:
        dataset = synthetic(8, owners=100, beta=beta, max_examples=50)
        return torch.stack([device(dataset, k)[0].double().mean() for k in range(100)])

    # mean over 60 features of v ~ N(B, 1): variance beta^2 + 1 / 60 (+ at most 0.001 from the inputs)
    # n = 100: a variance estimate leaves [0.4, 2.0] of the truth with odds < 1e-6 (chi-square, 99 degrees)
    for beta in (0.0, 3.0):
        ratio = float(overall_means(beta).var()) / (beta**2 + 1 / 60)
        assert 0.4 < ratio < 2.0


def test_alpha_zero_still_gives_every_device_its_own_model_and_iid_gives_one_to_all() -> None:
    def agreement(dataset: Dataset) -> float:
        """Share of device 1's labels that a model fitted to device 0 by least squares gets right."""
        (x, y), (other_x, other_y) = device(dataset, 0), device(dataset, 1)
        with_one = torch.cat([x, torch.ones(len(x), 1)], 1).double()
        fitted = torch.linalg.lstsq(with_one, torch.nn.functional.one_hot(y, 10).double(), driver="gelsd").solution
        scores = torch.cat([other_x, torch.ones(len(other_x), 1)], 1).double() @ fitted
        return float((scores.argmax(1) == other_y).double().mean())

    key = next(k for k in range(100) if min(np.bincount(synthetic(k, owners=2).columns["device"])) > 200)
    assert agreement(synthetic(key, alpha=0.0, beta=0.0, owners=2, iid=True)) > 0.5
    assert agreement(synthetic(key, alpha=0.0, beta=0.0, owners=2)) < 0.35


def test_alpha_shifts_all_scores_alike_and_so_changes_no_label() -> None:
    one, other = synthetic(9, alpha=0.0, owners=5), synthetic(9, alpha=4.0, owners=5)
    assert torch.equal(one.train.inputs, other.train.inputs)
    assert torch.equal(one.train.labels, other.train.labels)


def test_iid_inputs_are_centred_at_zero_and_alpha_and_beta_do_not_matter() -> None:
    dataset = synthetic(4, iid=True, alpha=0.0, beta=0.0, owners=10)
    other = synthetic(4, iid=True, alpha=7.0, beta=5.0, owners=10)
    assert torch.equal(dataset.train.inputs, other.train.inputs)
    assert torch.equal(dataset.train.labels, other.train.labels)
    n = len(dataset.train)
    # 60 means of variance j^-1.2 / n <= 1 / n: one beyond 6 standard deviations has odds < 1.2e-7
    assert float(dataset.train.inputs.double().mean(0).abs().max()) < 6 / math.sqrt(n)


@settings(deadline=None, max_examples=10)
@given(key=st.integers(0, 2**64 - 1), owners=st.integers(2, 6))
def test_a_devices_data_do_not_depend_on_how_many_devices_there_are(key: int, owners: int) -> None:
    many, few = synthetic(key, owners=owners, max_examples=60), synthetic(key, owners=1, max_examples=60)
    for a, b in zip(device(many, 0), device(few, 0), strict=True):
        assert torch.equal(a, b)


def test_another_key_gives_other_data() -> None:
    one, other = synthetic(1, max_examples=50), synthetic(2, max_examples=50)
    assert not torch.equal(one.train.inputs, other.train.inputs)


@pytest.mark.parametrize(("name", "value"), [("alpha", -1.0), ("beta", -0.5), ("owners", 0), ("max_examples", 49)])
def test_wrong_arguments_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= "):
        synthetic(1, **{name: value})
