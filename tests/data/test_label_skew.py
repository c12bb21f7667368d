import numpy as np
import pytest
import torch

from fedsim import rng
from fedsim.data import label_skew
from fedsim.data.label_skew import dirichlet, label_quantity, shards
from fedsim.errors import DataError

SEQUENCES = torch.zeros((20, 80), dtype=torch.int64)


def counts_of(labels, partition, classes):
    """The slow way."""
    table = np.zeros((partition.num_clients, classes), dtype=int)
    for k in range(partition.num_clients):
        for i in partition.client(k):
            table[k, int(labels[i])] += 1
    return table


@pytest.mark.parametrize(
    ("split", "name", "parameters"),
    [
        (dirichlet, "dirichlet", {"alpha": 1.0}),
        (shards, "shards", {}),
        (label_quantity, "label-quantity", {"alpha": 1.0, "sigma": 1.0}),
    ],
)
def test_label_splits_need_one_whole_number_per_example(split, name, parameters):
    with pytest.raises(DataError, match=rf"data\.split: {name} needs one label per example, got .* \(n, 80\)"):
        split(SEQUENCES, 3, 1, **parameters)
    with pytest.raises(DataError, match=rf"data\.split: {name} needs whole-number labels, got torch.float32"):
        split(torch.zeros(20), 3, 1, **parameters)


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_dirichlet_parts_have_the_mean_and_variance_of_the_distribution(alpha):
    # 2000 keys, 4 clients, one class of 2000. A part p of Dirichlet(alpha x 4) is Beta(alpha, 3 alpha). Each client's
    # mean and mean squared deviation are tested at 5.5 standard errors (two-sided 4e-8 each, 16 tests: < 1e-6).
    # Rounding moves a part by < 1/2000, far below the standard error.
    keys, n = 2000, 2000
    labels = torch.zeros(n, dtype=torch.int64)
    parts = np.array([dirichlet(labels, 4, rng.fold(6, k), alpha=alpha, min_examples=0).sizes() for k in range(keys)])
    parts = parts / n
    mean = 1 / 4
    variance = mean * (1 - mean) / (4 * alpha + 1)
    for values, expected in ((parts, mean), ((parts - mean) ** 2, variance)):
        error = (values.mean(axis=0) - expected) / (values.std(axis=0) / np.sqrt(keys))
        assert np.abs(error).max() < 5.5


def test_dirichlet_shares_out_classes_independently():
    # 1000 keys, 2 clients, 2 classes: correlation of the first client's parts is 0 +- 1/sqrt(keys); 5 standard errors.
    labels = torch.arange(400) % 2
    parts = []
    for k in range(1000):
        partition = dirichlet(labels, 2, rng.fold(9, k), alpha=0.5, min_examples=0)
        first = labels[partition.client(0)]
        parts.append([int((first == 0).sum()), int((first == 1).sum())])
    assert abs(np.corrcoef(np.array(parts).T)[0, 1]) < 5 / np.sqrt(1000)


def test_a_tiny_alpha_gives_each_class_to_one_client():
    labels = torch.arange(600) % 6
    table = counts_of(labels, dirichlet(labels, 5, 2, alpha=1e-6, min_examples=0), 6)
    assert ((table == 0) | (table == 100)).all()


def test_a_huge_alpha_gives_each_client_the_same():
    labels = torch.arange(600) % 6
    table = counts_of(labels, dirichlet(labels, 5, 2, alpha=1e6), 6)
    assert np.abs(table - 20).max() <= 1


def slow_shards(order, total, num_clients, shard_client):
    n, held = len(order), [[] for _ in range(num_clients)]
    for shard in range(total):
        first, last = -(-shard * n // total), -(-(shard + 1) * n // total)
        held[shard_client[shard]] += [int(i) for i in order[first:last]]
    return [sorted(one) for one in held]


@pytest.mark.parametrize(("n", "clients", "per_client"), [(60, 5, 2), (61, 5, 2), (7, 7, 1), (50, 3, 4), (9, 1, 9)])
def test_shards_equal_a_slow_loop(n, clients, per_client):
    labels = rng.bits(4, n).remainder(4)
    partition = shards(labels, clients, 8, shards_per_client=per_client, min_examples=0)
    shuffled = rng.permutation(rng.fold(8, "sort"), n).tolist()
    order = sorted(shuffled, key=lambda i: int(labels[i]))
    dealt = [int(s) % clients for s in rng.permutation(rng.fold(8, "deal"), clients * per_client)]
    expected = slow_shards(order, clients * per_client, clients, dealt)
    assert [partition.client(k).tolist() for k in range(clients)] == expected


def test_two_shards_of_divisible_classes_give_at_most_two_labels_a_client():
    labels = torch.arange(600) % 10
    partition = shards(labels, 15, 3)
    assert partition.sizes().tolist() == [40] * 15
    assert ((counts_of(labels, partition, 10) > 0).sum(axis=1) <= 2).all()


def test_more_shards_than_examples_are_refused():
    with pytest.raises(DataError, match=r"data\.split\.shards_per_client: 10 clients with 4 .* 40 .* only 30"):
        shards(torch.arange(30) % 3, 10, 1, shards_per_client=4)
    with pytest.raises(ValueError, match="shards_per_client must be >= 1 and finite, got 0"):
        shards(torch.arange(30) % 3, 10, 1, shards_per_client=0)


def test_label_quantity_has_the_sizes_of_the_quantity_split():
    from fedsim.data.splits import quantity

    labels = rng.bits(4, 900).remainder(7)
    ours = label_quantity(labels, 12, 5, alpha=0.1, sigma=1.2, min_examples=3)
    assert ours.sizes().tolist() == quantity(labels, 12, 5, sigma=1.2, min_examples=3).sizes().tolist()


def test_label_quantity_mixes_have_the_moments_of_the_distribution():
    # Before any class runs out, a client's labels are a Dirichlet-multinomial sample: the share of class c has mean p_c
    # and variance p_c (1 - p_c) (1 + (m - 1) / (A + 1)) / m, A = alpha C, m its size. m varies by key, so each share is
    # standardised first. Requests that lose the lot redraw, which narrows the variance by a few percent, below the
    # tolerance here; a wrong A (alpha, or alpha C^2) is far above it.
    # 800 keys, 3 classes of shares 1/2, 1/3, 1/6; 5.5 standard errors, 6 tests: < 1e-6.
    labels = torch.tensor([0] * 900 + [1] * 600 + [2] * 300)
    p, alpha, keys = np.array([1 / 2, 1 / 3, 1 / 6]), 5.0, 800
    scores = []
    for k in range(keys):
        partition = label_quantity(labels, 40, rng.fold(12, k), alpha=alpha, sigma=1.0)
        median = int(np.argsort(partition.sizes())[20])
        m = int(partition.sizes()[median])
        share = np.bincount(labels[partition.client(median)], minlength=3) / m
        scores.append((share - p) / np.sqrt(p * (1 - p) * (1 + (m - 1) / (3 * alpha + 1)) / m))
    scores = np.array(scores)
    for values, expected in ((scores, 0.0), (scores**2, 1.0)):
        error = (values.mean(axis=0) - expected) / (values.std(axis=0) / np.sqrt(keys))
        assert np.abs(error).max() < 5.5


def test_label_quantity_with_a_tiny_alpha_gives_pure_clients_while_classes_last():
    labels = torch.arange(1000) % 10
    table = counts_of(labels, label_quantity(labels, 100, 5, alpha=1e-6, sigma=0.1), 10)
    assert np.median(table.max(axis=1) / table.sum(axis=1)) == 1.0


def test_classes_are_drawn_as_one_search_per_client_would():
    client = np.array([7, 2, 2, 7, 7, 4, 2])
    log_mix = np.log(rng.uniform(3, 9, 5).double().numpy() ** 6)
    u = rng.uniform(21, len(client), dtype=torch.float64).tolist()
    expected = []
    for k, x in zip(client, u, strict=True):
        mix, total, c = np.exp(log_mix[k]) / np.exp(log_mix[k]).sum(), 0.0, -1
        while total <= x:
            c += 1
            total += mix[c]
        expected.append(c)
    assert len(set(expected)) > 2
    assert label_skew._draw_classes(client, log_mix, 21).tolist() == expected


def test_requests_for_an_empty_class_are_served_from_the_others():
    only_first = np.array([[0.0, -900.0, -901.0]] * 3)  # all want class 0, then 1, then 2
    amounts = label_skew._served(np.array([2, 3, 4]), np.array([4, 3, 2]), only_first, 5)
    assert amounts.sum(axis=0).tolist() == [4, 3, 2]
    assert amounts.sum(axis=1).tolist() == [2, 3, 4]
