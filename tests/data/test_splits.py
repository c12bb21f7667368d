import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import rng
from fedsim.data import partition_files
from fedsim.data.splits import SPLITS, feature_noise, iid, natural, quantity
from fedsim.errors import ConfigError, DataError

COVERING = {
    "iid": {},
    "dirichlet": {"alpha": 0.3},
    "shards": {"shards_per_client": 1},
    "quantity": {"sigma": 1.5},
    "label-quantity": {"alpha": 0.2, "sigma": 1.0},
    "feature-noise": {"std": 0.5},
}
POSITIVE_PARAMETERS = [
    ("dirichlet", "alpha", {}),
    ("quantity", "sigma", {}),
    ("label-quantity", "alpha", {"sigma": 1.0}),
    ("label-quantity", "sigma", {"alpha": 1.0}),
]


def same(a, b):
    return np.array_equal(a.offsets, b.offsets) and np.array_equal(a.indices, b.indices)


def random_labels(n, classes, key=1):
    return rng.bits(key, n).remainder(classes)


@pytest.mark.parametrize("name", COVERING)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_split_is_disjoint_covering_and_repeatable_and_honours_the_minimum(name, data):
    n = data.draw(st.integers(1, 60))
    clients = data.draw(st.sampled_from([1, n]) | st.integers(1, n))
    minimum = data.draw(st.integers(0, n // clients))
    labels = torch.tensor(data.draw(st.lists(st.sampled_from([0, 1, 4, 9]), min_size=n, max_size=n)))
    key = data.draw(st.integers(0, 2**64 - 1))
    partition = SPLITS[name](labels, clients, key, **COVERING[name], min_examples=minimum)
    partition_files.check(partition, n, clients, minimum)
    assert sorted(partition.indices.tolist()) == list(range(n))
    assert same(partition, SPLITS[name](labels, clients, key, **COVERING[name], min_examples=minimum))


@pytest.mark.parametrize("name", COVERING)
def test_another_key_gives_another_split(name):
    labels = random_labels(300, 5)
    assert not same(SPLITS[name](labels, 6, 1, **COVERING[name]), SPLITS[name](labels, 6, 2, **COVERING[name]))


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("extreme", [1e-6, 50.0])
def test_sixty_thousand_examples_over_ten_thousand_clients(name, extreme):
    parameters = {k: extreme if k in ("alpha", "sigma") else v for k, v in COVERING[name].items()}
    partition = SPLITS[name](random_labels(60_000, 10), 10_000, 3, **parameters, min_examples=2)
    partition_files.check(partition, 60_000, 10_000, 2)
    assert len(partition.indices) == 60_000


@pytest.mark.parametrize("name", COVERING)
def test_every_split_works_on_real_digits(name):
    from sklearn.datasets import load_digits

    labels = torch.from_numpy(load_digits().target).long()
    partition = SPLITS[name](labels, 20, 7, **COVERING[name], min_examples=5)
    partition_files.check(partition, 1797, 20, 5)
    assert len(partition.indices) == 1797


@pytest.mark.parametrize("name", COVERING)
def test_more_clients_than_examples_are_refused(name):
    with pytest.raises(DataError, match=r"data\.clients: 2000 clients but only 1437 training examples"):
        SPLITS[name](random_labels(1437, 10), 2000, 1, **COVERING[name])


@pytest.mark.parametrize("name", COVERING)
def test_a_minimum_that_cannot_be_met_is_refused_with_the_numbers(name):
    with pytest.raises(DataError, match=r"data\.split\.min_examples: 10 clients .* 7 .* need 70, but .* only 60"):
        SPLITS[name](random_labels(60, 3), 10, 1, **COVERING[name], min_examples=7)


@pytest.mark.parametrize("name", COVERING)
def test_a_missing_number_of_clients_is_refused(name):
    with pytest.raises(ConfigError, match=r"data\.clients: the .* split needs a number of clients, got null"):
        SPLITS[name](random_labels(60, 3), None, 1, **COVERING[name])


@pytest.mark.parametrize("name", COVERING)
def test_no_clients_and_a_negative_minimum_are_refused(name):
    with pytest.raises(ValueError, match="num_clients must be >= 1 and finite, got 0"):
        SPLITS[name](random_labels(60, 3), 0, 1, **COVERING[name])
    with pytest.raises(ValueError, match="min_examples must be >= 0 and finite, got -1"):
        SPLITS[name](random_labels(60, 3), 3, 1, **COVERING[name], min_examples=-1)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "parameter", "others"), POSITIVE_PARAMETERS)
def test_parameters_that_are_not_positive_and_finite_are_refused(name, parameter, others, bad):
    with pytest.raises(ValueError, match=rf"{parameter} must be .*, got {bad}"):
        SPLITS[name](random_labels(60, 3), 3, 1, **others, **{parameter: bad})


def test_iid_sizes_differ_by_at_most_one():
    assert sorted(iid(torch.zeros(11), 4, 1).sizes().tolist()) == [2, 3, 3, 3]


@pytest.mark.parametrize(("split", "parameters"), [(iid, {}), (quantity, {"sigma": 1e-18})])
def test_who_gets_one_more_than_others_is_drawn_by_lot(split, parameters):
    # n = 2000 keys, 2 of 5 clients get 5 of 22 examples, the others 4. Each client's mean is off by 0.08 with
    # probability 2 exp(-2 n 0.08^2) < 1e-10 (Hoeffding).
    sizes = np.array([split(torch.zeros(22), 5, rng.fold(6, k), **parameters).sizes() for k in range(2000)])
    assert set(sizes.ravel()) == {4, 5}
    assert np.abs(sizes.mean(axis=0) - 4.4).max() < 0.08


def test_iid_takes_sequences():
    assert iid(torch.zeros(10, 80, dtype=torch.int64), 3, 1).num_clients == 3


def test_iid_may_use_a_part_of_the_data():
    partition = iid(torch.zeros(100), 7, 1, examples_per_client=4)
    partition_files.check(partition, 100, 7, 4)
    assert partition.sizes().tolist() == [4] * 7


def test_iid_refuses_to_give_more_than_there_is():
    with pytest.raises(
        DataError, match=r"data\.split\.examples_per_client: 7 clients with 15 .* need 105, .* only 100"
    ):
        iid(torch.zeros(100), 7, 1, examples_per_client=15)
    with pytest.raises(ValueError, match="examples_per_client must be >= 3 and finite, got 2"):
        iid(torch.zeros(100), 7, 1, examples_per_client=2, min_examples=3)


def test_iid_labels_are_independent_of_clients():
    # n = 5000 examples, 8 clients x 5 classes: chi-squared with 28 degrees of freedom; false alarm 1e-6.
    labels = random_labels(5000, 5)
    partition = iid(labels, 8, 3)
    table = np.zeros((8, 5))
    for k in range(8):
        for label in labels[partition.client(k)].tolist():
            table[k, label] += 1
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-6


def test_quantity_sizes_are_log_normal():
    # n = 1000 log sizes; false alarm 1e-6 each. The mean size of 1000 hides the rounding.
    sizes = quantity(torch.zeros(1_000_000), 1000, 5, sigma=0.7).sizes()
    logs = np.log(sizes)
    assert abs(logs.std() - 0.7) < 4.9 * 0.7 / np.sqrt(2 * 1000)  # 4.9 standard errors
    assert scipy.stats.kstest((logs - logs.mean()) / logs.std(), "norm").pvalue > 1e-6


def test_feature_noise_rises_to_std_at_the_last_client():
    partition = feature_noise(torch.zeros(20), 4, 1, std=2.0)
    assert partition.noise_std.dtype == np.float32
    assert partition.noise_std.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert same(partition, iid(torch.zeros(20), 4, 1))


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_feature_noise_refuses_a_deviation_that_is_none(bad):
    with pytest.raises(ValueError, match=rf"std must be >= 0 and finite, got {bad}"):
        feature_noise(torch.zeros(20), 4, 1, std=bad)


WRITERS = {"writer": np.array([5, 2, 5, 0, 2, 5, 9, 0, 2, 2])}


def test_natural_makes_one_client_per_owner_in_order_of_id():
    partition = natural(None, 1, WRITERS, column="writer")
    partition_files.check(partition, 10, 4, 1)
    assert partition.column == "writer"
    assert partition.owner_ids.tolist() == [0, 2, 5, 9]
    assert [partition.client(k).tolist() for k in range(4)] == [[3, 7], [1, 4, 8, 9], [0, 2, 5], [6]]


def test_natural_leaves_small_owners_out():
    assert natural(None, 1, WRITERS, column="writer", min_examples=2).owner_ids.tolist() == [0, 2, 5]
    assert natural(None, 1, WRITERS, column="writer", min_examples=0).owner_ids.tolist() == [0, 2, 5, 9]


def test_natural_chooses_among_the_owners_that_are_large_enough():
    seen = set()
    for key in range(40):
        partition = natural(2, key, WRITERS, column="writer", min_examples=2)
        assert partition.num_clients == 2
        for k, owner in enumerate(partition.owner_ids):
            assert (WRITERS["writer"][partition.client(k)] == owner).all()
        seen.add(tuple(partition.owner_ids.tolist()))
    assert seen == {(0, 2), (0, 5), (2, 5)}
    assert same(natural(2, 3, WRITERS, column="writer"), natural(2, 3, WRITERS, column="writer"))


def test_natural_refuses_more_clients_than_owners_and_an_unknown_column():
    with pytest.raises(DataError, match=r"data\.clients: 4 clients, but column 'writer' has 3 owners with at least 2"):
        natural(4, 1, WRITERS, column="writer", min_examples=2)
    with pytest.raises(DataError, match="has 0 owners with at least 5"):
        natural(None, 1, WRITERS, column="writer", min_examples=5)
    with pytest.raises(ConfigError, match=r"data\.split\.column: .* no id column 'user'; it has: writer"):
        natural(None, 1, WRITERS, column="user")
