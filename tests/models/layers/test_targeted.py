import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedsim import rng
from fedsim.models.layers.targeted import Kind, TargetedDropout, candidates, ramp


def slow(weight: Tensor, share: float, kind: str) -> Tensor:
    """Sort each row's magnitudes, or the rows' norms, in Python; all values distinct."""
    rows = [[abs(value) for value in row] for row in weight.flatten(1).tolist()]
    if kind == "weight":
        count = math.floor(round(share * len(rows[0]), 6))
        low = [[value in sorted(row)[:count] for value in row] for row in rows]
    else:
        norms = [math.hypot(*row) for row in rows]
        lowest = sorted(norms)[: math.floor(round(share * len(rows), 6))]
        low = [[norm in lowest] * len(row) for norm, row in zip(norms, rows, strict=True)]
    return torch.tensor(low).reshape(weight.shape)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1, 1), (4, 7), (3, 2, 3, 3), (6, 1, 5, 5), (9, 33)]),
    share=st.sampled_from([0.0, 0.1, 0.29, 1 / 3, 0.5, 0.75, 0.99, 1.0]),
    kind=st.sampled_from(["weight", "unit"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_candidates_are_those_of_a_slow_sort(
    seed: int, shape: tuple[int, ...], share: float, kind: Kind, dtype: torch.dtype
) -> None:
    weight = rng.normal(seed, *shape, dtype=torch.float64).to(dtype)
    found = candidates(weight, share, kind=kind)
    assert torch.equal(found, slow(weight, share, kind)) and found.shape == shape
    assert torch.equal(found, candidates(weight, torch.tensor(share, dtype=torch.float64), kind=kind))


def test_candidates_of_every_count_and_magnitude() -> None:
    """From the smallest to the largest float32; n of 100 for every n, as 0.29 * 100 is less than 29 in floats."""
    extreme = torch.tensor([[3.4e38, -1e-45, 0.0, 1e-38, -2.0, 1.0, -1e20, 1e-20]])
    order = [2, 1, 3, 7, 5, 4, 6, 0]
    for n in range(9):
        assert candidates(extreme, n / 8, kind="weight")[0].nonzero().flatten().tolist() == sorted(order[:n])
    hundred = rng.normal(3, 2, 100)
    for n in range(101):
        for share in (n / 100, torch.tensor(n / 100, dtype=torch.float64)):
            assert candidates(hundred, share, kind="weight").sum(1).tolist() == [n, n]


def test_of_equal_ones_that_are_too_many_none_is_a_candidate() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 2.0, 0.5, -0.5]])
    counts = [int(candidates(weight, n / 6, kind="weight").sum()) for n in range(7)]
    assert counts == [0, 0, 2, 2, 2, 5, 6]
    assert not candidates(torch.zeros(3, 4), 0.75, kind="weight").any()


def test_half_precision_ranks_too() -> None:
    weight = torch.tensor([[0.5, -0.25, 1.0, 2.0]], dtype=torch.bfloat16)
    assert candidates(weight, 0.5, kind="weight").tolist() == [[True, True, False, False]]


def test_candidates_under_vmap_are_those_of_a_loop() -> None:
    weights, shares = rng.normal(1, 4, 5, 9), torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)
    for kind in ("weight", "unit"):
        together = vmap(lambda w, s, kind=kind: candidates(w, s, kind=kind))(weights, shares)
        assert torch.equal(together, torch.stack([slow(weights[c], shares[c].item(), kind) for c in range(4)]))
        one = vmap(lambda s, kind=kind: candidates(weights[0], s, kind=kind))(shares)
        assert torch.equal(one[1], slow(weights[0], 0.3, kind))


def test_the_ramp_is_the_authors() -> None:
    """As for step = progress * 40,000 of their two schedules."""
    for step in (1, 4_000, 20_000, 26_000, 40_000):
        share = 0.95 * min(1, step / 20_000) + 0.05 * min(max((step - 20_000) / 20_000, 0), 1)
        found = [one.item() for one in ramp(torch.tensor(step / 40_000))]
        assert found == pytest.approx([share, min(1, step / 40_000)], rel=1e-6)
    assert [one.item() for one in ramp(torch.ones(()))] == [1.0, 1.0]


def run(layer: nn.Module, weight: Tensor, key: int | Tensor, progress: float | Tensor = 1.0) -> Tensor:
    keys = key if isinstance(key, Tensor) else rng.as_tensor(key)
    now = torch.as_tensor(progress, dtype=torch.float32)
    out = functional_call(layer, {"key": keys, "progress": now}, (weight,))
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize(("kind", "shape"), [("weight", (400, 500)), ("unit", (20_000, 3, 1, 1))])
@pytest.mark.parametrize("progress", [1.0, 0.4])
def test_candidates_are_dropped_at_the_rate_and_nothing_else_is_changed(
    kind: Kind, shape: tuple[int, ...], progress: float
) -> None:
    """n > 7,000 candidates each; 5 standard deviations of the binomial: false alarms below 6e-7, key fixed."""
    weight, layer = rng.normal(1, *shape), TargetedDropout(kind, 0.5, 0.6, ramped=True)
    out = run(layer, weight, 7, progress)
    low = candidates(weight, 0.5 * (0.95 * 2 * 0.4 if progress < 1 else 1), kind=kind)
    dropped = out == 0
    assert not (dropped & ~low).any() and torch.equal(out[~dropped], weight[~dropped])
    if kind == "unit":
        assert torch.equal(dropped.flatten(1).any(1), dropped.flatten(1).all(1))
        dropped, low = dropped.flatten(1)[:, 0], low.flatten(1)[:, 0]
    n, rate = int(low.sum()), 0.6 * progress
    assert n > 7_000 and abs(int(dropped.sum()) - n * rate) < 5 * math.sqrt(n * rate * (1 - rate))


def test_without_a_ramp_progress_counts_for_nothing() -> None:
    layer, weight = TargetedDropout("weight", 0.5, 0.6, ramped=False), rng.normal(1, 20, 30)
    assert torch.equal(run(layer, weight, 3, 0.1), run(layer, weight, 3, 1.0))
    ramped = TargetedDropout("weight", 0.5, 0.6, ramped=True)
    assert torch.equal(run(layer, weight, 3), run(ramped, weight, 3, 1.0))
    assert not torch.equal(run(ramped, weight, 3, 0.1), run(ramped, weight, 3, 1.0))


def test_gradients_pass_through_what_is_kept_and_evaluation_is_the_identity() -> None:
    layer, weight = TargetedDropout("weight", 0.5, 0.6, ramped=True), rng.normal(1, 20, 30, dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    out = run(layer, leaf, 3)
    (out * 3.0).sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, 3.0 * (out != 0))
    assert out.dtype == torch.float64
    assert torch.equal(run(layer.eval(), weight, 3), weight)


def test_a_drop_of_1_drops_every_candidate() -> None:
    weight = rng.normal(1, 20, 30)
    out = run(TargetedDropout("weight", 0.5, 1.0, ramped=False), weight, 3)
    assert torch.equal(out == 0, candidates(weight, 0.5, kind="weight"))


def test_under_vmap_each_client_has_its_own_draws_and_progress() -> None:
    layer, weights = TargetedDropout("weight", 0.5, 0.6, ramped=True), rng.normal(1, 3, 20, 30)
    keys, progress = torch.tensor([7, -1, 2**61]), torch.tensor([0.2, 0.5, 1.0])
    together = vmap(lambda w, k, p: run(layer, w, k, p))(weights, keys, progress)
    alone = [run(layer, weights[c], keys[c], progress[c]) for c in range(3)]
    assert torch.equal(together, torch.stack(alone))
