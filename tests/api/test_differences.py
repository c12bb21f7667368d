"""What counts as the same, by numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.api import differences
from fedsim.data.federated import FederatedData
from fedsim.records import Examples, Partition, RoundRecord
from fedsim.training.evaluate import Scores, by_owner

RECORD = RoundRecord(
    round=4, loss=0.5, accuracy=0.75, train_loss=0.25, clients=2, seconds=1.0, bytes_up=8, bytes_down=9
)
ALL = ("loss", "accuracy", "train_loss", "clients", "bytes_up", "epsilon", "cohort", "skipped")


def between(recorded, now, flips=None):
    return differences.of_rounds(recorded, now, ALL, flips or {})


def test_equal_records_have_no_differences():
    assert between(RECORD, replace(RECORD, seconds=9.0)) == []


@pytest.mark.parametrize(
    ("factor", "within"), [(1 + 3.9e-5, True), (1 - 3.9e-5, True), (1 + 4.2e-5, False), (-1, False)]
)
def test_losses_may_differ_by_the_tolerance_times_the_round(factor, within):
    (found,) = between(RECORD, replace(RECORD, train_loss=0.25 * factor))
    assert (found.field, found.recorded, found.within) == ("train_loss", 0.25, within)
    assert found.relative == pytest.approx(abs(factor - 1) / max(factor, 1), rel=1e-6)


def test_a_tiny_loss_is_compared_absolutely():
    near = [between(replace(RECORD, loss=1e-7), replace(RECORD, loss=1e-7 + off))[0].within for off in (3e-7, 5e-7)]
    assert near == [True, False]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"clients": 3}, "round 4, clients: recorded 2, now 3"),
        ({"cohort": (1, 5)}, "round 4, cohort: recorded none, now 1, 5"),
        ({"cohort": tuple(range(20))}, "recorded none, now 0, 1, 2, 3, 4, 5, 6, 7, ... (20)"),
        ({"loss": math.nan}, "round 4, loss: recorded 0.5, now null"),
        ({"loss": 0.53}, "round 4, loss: recorded 0.5, now 0.53 (5.7e-02 apart, 4e-05 is allowed)"),
    ],
)
def test_a_difference_is_told_in_one_line(changed, text):
    (found,) = between(RECORD, replace(RECORD, **changed))
    assert text in str(found)
    assert not found.within


def test_a_nan_is_what_was_recorded_as_null():
    assert between(replace(RECORD, loss=None), replace(RECORD, loss=math.nan)) == []


def data():
    """7 held-out examples, the clients of which hold 4, 2, 0 and 1."""
    test = Examples(torch.zeros(7, 1), torch.tensor([0, 1, 0, 1, 1, 0, 1]))
    parts = Partition(np.array([0, 4, 6, 6, 7]), np.array([3, 0, 1, 6, 2, 5, 4]))
    return FederatedData(
        train=test, partition=parts, test=test, client_test=test, test_partition=parts, num_classes=2, class_names=()
    )


def test_one_flip_is_as_much_as_one_label_can_move_an_accuracy():
    federated, found = data(), differences.one_flip(data())
    rng = np.random.default_rng(0)
    largest = dict.fromkeys(found, 0.0)
    for _ in range(200):
        guesses = rng.integers(0, 2, 7)
        for flipped in range(7):
            one, other = guesses.copy(), guesses.copy()
            other[flipped] ^= 1
            apart = {
                k: abs(a - b)
                for (k, a), b in zip(
                    _measured(federated, one).items(), _measured(federated, other).values(), strict=True
                )
            }
            largest = {k: max(largest[k], apart[k]) for k in found}
    assert all(largest[k] <= found[k] * (1 + 1e-9) for k in found)
    assert largest["accuracy"] == pytest.approx(1 / 7)
    assert largest["client_accuracy_mean"] == pytest.approx(1 / 3) == found["client_accuracy_mean"]
    assert largest["client_accuracy_worst_tenth"] == pytest.approx(found["client_accuracy_worst_tenth"])
    assert largest["client_accuracy_std"] > 0.5 * found["client_accuracy_std"]


def _measured(federated, right):
    right = torch.from_numpy(right).double()
    own = np.sort(by_owner(Scores(right, right, torch.ones(7)), federated.test_partition).accuracy)
    numbers = (float(right.mean()), own.mean(), own.std(), own[:1].mean())
    return dict(
        zip(
            ("accuracy", "client_accuracy_mean", "client_accuracy_std", "client_accuracy_worst_tenth"),
            numbers,
            strict=True,
        )
    )


def test_an_accuracy_may_be_off_by_a_flip_and_a_loss_may_not():
    flips = {"accuracy": 0.01}
    moved = [between(RECORD, replace(RECORD, accuracy=a), flips)[0].within for a in (0.76, 0.74, 0.7601)]
    assert moved == [True, True, False]
    assert not between(RECORD, replace(RECORD, loss=0.51), flips)[0].within


WEIGHT = {"w": torch.tensor([[1.0, -2.0], [4.0, 0.5]]), "n": torch.tensor(300)}


def test_a_tensor_is_told_by_the_entry_that_is_furthest_off():
    now = {**WEIGHT, "w": torch.tensor([[1.0, -2.0001], [4.0, 0.5]])}
    (found,) = differences.of_tensors(3, "the checkpoint", WEIGHT, now)
    assert found.field == "w[0, 1] in the checkpoint"
    assert found.relative == pytest.approx(1e-4 / 4, rel=2e-3)
    assert found.within  # 2.5e-5 after three rounds
    assert not differences.of_tensors(2, "x", WEIGHT, now)[0].within


def test_tensors_equal_bit_for_bit_have_no_differences_and_0_is_not_quite_minus_0():
    assert differences.of_tensors(1, "x", WEIGHT, {n: t.clone() for n, t in WEIGHT.items()}) == []
    nan = {"w": torch.tensor([math.nan, 1.0])}
    assert differences.of_tensors(1, "x", nan, {"w": nan["w"].clone()}) == []
    (found,) = differences.of_tensors(1, "x", {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, -0.0])})
    assert (found.within, found.relative) == (True, 0.0)


@pytest.mark.parametrize(
    "now",
    [
        {"w": WEIGHT["w"]},
        {**WEIGHT, "w": WEIGHT["w"].double()},
        {**WEIGHT, "w": WEIGHT["w"].T.reshape(1, 4)},
        {**WEIGHT, "n": torch.tensor(301)},
        {**WEIGHT, "w": torch.tensor([[1.0, math.nan], [4.0, 0.5]])},
        {**WEIGHT, "w": torch.tensor([[1.0, -2.0], [4.0, math.inf]])},
    ],
)
def test_another_shape_type_counter_or_nan_is_never_rounding(now):
    (found,) = differences.of_tensors(1000, "x", WEIGHT, now)
    assert not found.within


def test_environments_are_compared_where_they_can_change_a_bit():
    one = {"torch": "2.12", "cpu": "A", "host": "x", "engine": {"name": "local", "path": "fused", "chunk": 4}}
    other = {"torch": "2.13", "cpu": "A", "host": "y", "engine": {"name": "reference"}}
    assert differences.of_environments(one, one) == []
    assert differences.of_environments(one, other) == [
        "torch: recorded 2.12, now 2.13",
        "engine: recorded local, now reference",
        "plan: recorded fused, 4 clients, now none",
    ]
    half = {**one, "engine": {**one["engine"], "precision": "bf16", "device": "cpu"}}
    assert differences.of_environments(one, half) == ["precision: recorded fp32, now bf16"]
    git = [{"git": {"commit": "abcdef0123456789", "dirty": dirty}} for dirty in (False, True)]
    assert differences.of_environments(*git) == ["git: recorded abcdef012345, now abcdef012345 and uncommitted changes"]
