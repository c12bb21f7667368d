import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from fedsim import rng
from fedsim.data.heterogeneity import earth_movers_distance, effective_classes, label_counts, summary
from fedsim.data.partition_files import from_lists

COUNTS = np.array([[7, 0, 3, 1], [0, 4, 0, 0], [2, 2, 2, 2], [1, 9, 30, 0]])


def transport_cost(p, q):
    """Cheapest way of turning p into q when moving from one class to another costs 2, by linear programming."""
    size = len(p)
    cost = 2.0 * (1 - np.eye(size)).ravel()
    leaves = np.kron(np.eye(size), np.ones(size))
    arrives = np.kron(np.ones(size), np.eye(size))
    plan = scipy.optimize.linprog(cost, A_eq=np.vstack([leaves, arrives]), b_eq=np.concatenate([p, q]))
    return plan.fun


def test_label_counts_equal_a_slow_loop():
    labels = rng.bits(3, 50).remainder(6)
    partition = from_lists([[3, 1, 4], [], range(5, 30), [49, 0]])
    expected = np.zeros((4, 6), dtype=int)
    for k in range(4):
        for i in partition.client(k):
            expected[k, labels[i]] += 1
    assert label_counts(labels, partition, 6).tolist() == expected.tolist()


def test_label_counts_of_sequences_leave_padding_out():
    # The late client matters: there, padding must not land in the cell of a client 33 before it.
    labels = torch.tensor([[0, 2, -100], [1, -100, -100], [2, 2, -100], [0, 0, 0]])
    counts = label_counts(labels, from_lists([[0, 1], *[[]] * 40, [2]]), 3)
    assert counts[[0, 41]].tolist() == [[1, 1, 1], [0, 0, 2]]
    assert not counts[1:41].any()


def test_label_counts_refuse_a_label_that_is_too_large():
    with pytest.raises(ValueError, match="labels must be < num_classes = 3, got 3"):
        label_counts(torch.tensor([0, 3]), from_lists([[0, 1]]), 3)


def test_effective_classes_are_the_exponential_of_scipys_entropy():
    expected = [np.exp(scipy.stats.entropy(row)) for row in COUNTS]
    np.testing.assert_allclose(effective_classes(COUNTS), expected, rtol=1e-12)


def test_earth_movers_distance_is_the_optimum_of_the_transport_problem():
    q = COUNTS.sum(axis=0) / COUNTS.sum()
    expected = [transport_cost(row / row.sum(), q) for row in COUNTS]
    np.testing.assert_allclose(earth_movers_distance(COUNTS), expected, atol=1e-9)


def test_one_of_ten_balanced_classes_is_at_distance_one_point_eight():
    np.testing.assert_allclose(earth_movers_distance(5 * np.eye(10, dtype=np.int64)), 1.8)


def test_clients_without_labels_have_no_measure_and_are_left_out_of_the_summary():
    counts = np.vstack([COUNTS, np.zeros((2, 4), dtype=np.int64)])
    assert np.isnan(effective_classes(counts)[-2:]).all()
    assert np.isnan(earth_movers_distance(counts)[-2:]).all()
    result = summary(counts)
    assert (result["clients"], result["clients_without_labels"]) == (6, 2)
    assert {k: v for k, v in summary(COUNTS).items() if "clients" not in k} == {
        k: v for k, v in result.items() if "clients" not in k
    }


def test_the_summary_holds_mean_and_extremes():
    result = summary(COUNTS)
    assert (result["labels_mean"], result["labels_min"], result["labels_max"]) == (15.75, 4, 40)
    assert result["effective_classes_min"] == 1.0
    assert result["effective_classes_max"] == pytest.approx(4.0)
    assert result["emd_max"] == max(earth_movers_distance(COUNTS))


def test_a_summary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one client with labels"):
        summary(np.zeros((2, 3), dtype=np.int64))
