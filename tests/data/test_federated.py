import numpy as np
import pytest
import scipy.stats
import torch

from fedsim import rng
from fedsim.data import federated
from fedsim.data.federated import assemble, assign_test, hold_out, with_noise
from fedsim.data.partition_files import from_lists
from fedsim.data.splits import dirichlet, feature_noise, iid, natural
from fedsim.errors import DataError
from fedsim.records import Dataset, Examples


def dataset(n=60, classes=4, with_test=False):
    inputs = torch.arange(n, dtype=torch.float32)[:, None].expand(n, 3).clone()
    labels = rng.bits(1, n).remainder(classes)
    columns = {"writer": rng.bits(2, n).remainder(7).numpy()}
    test = Examples(torch.zeros(20, 3), rng.bits(3, 20).remainder(classes)) if with_test else None
    test_columns = {"writer": rng.bits(4, 20).remainder(9).numpy()} if with_test else {}
    names = tuple("abcd"[:classes])
    return Dataset("toy", Examples(inputs, labels), test, classes, columns, test_columns, names)


def exact_deal(train_labels, partition, test_labels, classes):
    """Test examples of each class per client as fractions: in proportion to the training examples held."""
    exact = np.zeros((partition.num_clients, classes))
    for c in range(classes):
        held = [sum(int(train_labels[i]) == c for i in partition.client(k)) for k in range(partition.num_clients)]
        exact[:, c] = sum(int(label) == c for label in test_labels) * np.array(held) / max(sum(held), 1)
    return exact


def test_holding_out_splits_examples_and_columns_alike():
    whole = dataset()
    parts = hold_out(whole, 0.25, 5)
    assert (len(parts.train), len(parts.test)) == (45, 15)
    train, test = parts.train.inputs[:, 0].long(), parts.test.inputs[:, 0].long()
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(60))
    for ids, examples, columns in ((train, parts.train, parts.columns), (test, parts.test, parts.test_columns)):
        assert torch.equal(examples.labels, whole.train.labels[ids])
        assert np.array_equal(columns["writer"], whole.columns["writer"][ids.numpy()])
    assert torch.equal(hold_out(whole, 0.25, 5).test.inputs, parts.test.inputs)
    assert not torch.equal(hold_out(whole, 0.25, 6).test.inputs, parts.test.inputs)


def test_holding_out_keeps_a_test_set_that_exists():
    whole = dataset(with_test=True)
    assert hold_out(whole, 0.25, 5) is whole


@pytest.mark.parametrize(("fraction", "expected"), [(0.001, 1), (0.999, 9), (0.5, 5)])
def test_holding_out_leaves_an_example_on_both_sides(fraction, expected):
    assert len(hold_out(dataset(n=10), fraction, 1).test) == expected


@pytest.mark.parametrize("bad", [0.0, 1.0, -0.1, float("nan")])
def test_holding_out_refuses_a_fraction_outside_its_range(bad):
    with pytest.raises(ValueError, match=rf"test_fraction must be in \(0, 1\), got {bad}"):
        hold_out(dataset(), bad, 1)


def test_holding_out_refuses_a_single_example():
    with pytest.raises(DataError, match=r"data\.test_fraction: .* needs at least 2 examples, got 1"):
        hold_out(dataset(n=1), 0.5, 1)


def test_assembling_without_noise_shares_the_tensors():
    whole = dataset(with_test=True)
    partition = dirichlet(whole.train.labels, 5, 1, alpha=0.5)
    data = assemble(whole, partition, 3)
    assert data.train is whole.train
    assert data.client_test is data.test is whole.test
    assert (data.num_clients, data.num_classes, data.class_names) == (5, 4, ("a", "b", "c", "d"))
    assert data.client(2).inputs[:, 0].tolist() == partition.client(2).tolist()
    assert torch.equal(data.client(2).labels, whole.train.labels[partition.client(2)])


def test_assembling_needs_a_test_set():
    with pytest.raises(ValueError, match="dataset toy has no test set"):
        assemble(dataset(), iid(torch.zeros(60), 3, 1), 1)


@pytest.mark.parametrize("clients", [1, 3, 30])
def test_each_client_is_tested_on_its_own_label_mix(clients):
    train_labels, test_labels = rng.bits(1, 200).remainder(5), rng.bits(2, 77).remainder(6)  # class 5 only in the test
    partition = dirichlet(train_labels, clients, 1, alpha=0.3)
    dealt = assign_test(train_labels, partition, test_labels, {}, 4)
    exact = exact_deal(train_labels, partition, test_labels, 6)
    got = np.array([np.bincount(test_labels[dealt.client(k)], minlength=6) for k in range(clients)])
    assert np.abs(got - exact).max() < 1
    assert np.abs(got.sum(axis=1) - exact.sum(axis=1)).max() < 1.5
    assert len(set(dealt.indices.tolist())) == len(dealt.indices) == int((test_labels < 5).sum())
    assert not np.array_equal(dealt.indices, assign_test(train_labels, partition, test_labels, {}, 5).indices) or (
        clients == 1
    )


@pytest.mark.parametrize("shape", [(), (5,)])
@pytest.mark.parametrize("split", [iid, feature_noise])
def test_clients_with_low_numbers_are_tested_on_no_more_than_those_with_high_ones(shape, split):
    # n = 30 keys of 350 test examples, owned by the first half of the clients with probability 1/2 each, dependent so
    # that the count varies less than binomially: 4.9 standard deviations of that, false alarm < 1e-6.
    train, test = (rng.bits(k, n, *shape).remainder(10) for k, n in ((1, 1450), (2, 350)))
    first = 0
    for key in range(30):
        dealt = assign_test(train, split(train, 300, rng.fold(3, key)), test, {}, rng.fold(4, key))
        assert len(dealt.indices) == 350
        first += dealt.sizes()[:150].sum()
    assert abs(first - 30 * 175) < 4.9 * np.sqrt(30 * 350) / 2


def test_every_client_is_tested_where_its_part_of_the_test_set_is_an_example_or_more():
    train, test = rng.bits(1, 1450).remainder(10), rng.bits(2, 420).remainder(10)
    for key in range(5):
        sizes = assign_test(train, iid(train, 300, key), test, {}, key).sizes()
        assert set(sizes) <= {1, 2, 3}


def test_test_examples_without_label_belong_to_nobody():
    dealt = assign_test(torch.tensor([0, 1, -100]), from_lists([[0], [1, 2]]), torch.tensor([1, -100, 0]), {}, 4)
    assert [dealt.client(k).tolist() for k in range(2)] == [[2], [0]]


def test_sequences_are_dealt_in_proportion_to_client_sizes():
    partition = from_lists([range(6), [6, 7, 8], [9]])
    labels = torch.zeros((10, 5), dtype=torch.int64)
    dealt = assign_test(labels, partition, torch.zeros((20, 5), dtype=torch.int64), {}, 4)
    assert dealt.sizes().tolist() == [12, 6, 2]
    assert sorted(dealt.indices.tolist()) == list(range(20))


def test_natural_test_examples_go_to_their_owner_or_to_nobody():
    whole = dataset(with_test=True)
    partition = natural(4, 1, whole.columns, column="writer")
    data = assemble(whole, partition, 1)
    test_ids = whole.test_columns["writer"]
    for k, owner in enumerate(partition.owner_ids):
        assert data.test_partition.client(k).tolist() == np.flatnonzero(test_ids == owner).tolist()
    assert len(data.test_partition.indices) == np.isin(test_ids, partition.owner_ids).sum() < 20


def test_natural_without_a_test_column_is_dealt_by_label():
    whole = dataset(with_test=True)
    partition = natural(None, 1, whole.columns, column="writer")
    dealt = assign_test(whole.train.labels, partition, whole.test.labels, {}, 1)
    assert len(dealt.indices) == 20


def test_ten_thousand_clients_get_their_test_examples():
    labels = rng.bits(1, 60_000).remainder(10)
    dealt = assign_test(labels, iid(labels, 10_000, 1), labels[:10_000], {}, 1)
    assert sorted(dealt.indices.tolist()) == list(range(10_000))


def test_feature_noise_has_each_clients_deviation_and_leaves_the_global_test_clean():
    # n = 3000 normal draws a client, 4 clients: Kolmogorov-Smirnov, false alarm 1e-6 each.
    zeros = Examples(torch.zeros(4000, 3), rng.bits(1, 4000).remainder(4))
    test = Examples(torch.zeros(80, 3), rng.bits(2, 80).remainder(4))
    partition = feature_noise(zeros.labels, 4, 1, std=2.0)
    data = assemble(Dataset("toy", zeros, test, 4), partition, 3)
    for k, std in enumerate([0.5, 1.0, 1.5, 2.0]):
        values = data.client(k).inputs.flatten().double().numpy()
        assert scipy.stats.kstest(values / std, "norm").pvalue > 1e-6
        assert len(np.unique(values)) > 2990
    assert data.test is test
    assert not zeros.inputs.any()
    assert not test.inputs.any()
    assert data.client_test.inputs.all()
    assert torch.equal(data.client_test.labels, test.labels)


def test_noise_is_a_slow_loops_and_depends_on_neither_chunks_nor_neighbours(monkeypatch):
    examples = Examples(rng.normal(1, 9, 2, 3), torch.zeros(9, dtype=torch.int64))
    partition = feature_noise(examples.labels, 3, 1, std=0.3)
    expected = examples.inputs.clone()
    for k in range(3):
        for i in partition.client(k):
            expected[i] += float(partition.noise_std[k]) * rng.normal(rng.fold(8, int(i)), 2, 3)
    for chunk in (1, 13, 1 << 20):
        monkeypatch.setattr(federated, "NOISE_CHUNK", chunk)
        torch.testing.assert_close(with_noise(examples, partition, 8).inputs, expected, rtol=0, atol=1e-6)


def test_noise_on_whole_numbers_is_refused():
    tokens = Examples(torch.zeros(6, 3, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(DataError, match=r"feature-noise needs floating-point inputs, got torch\.int64"):
        with_noise(tokens, feature_noise(tokens.labels, 2, 1), 1)
