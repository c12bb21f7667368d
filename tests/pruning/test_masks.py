"""Masks against sets of indices, on parameters of unequal sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsim import params as p
from fedsim import rng
from fedsim.models import zoo
from fedsim.pruning import masks

SHAPES = {"conv.weight": (3, 2, 2, 2), "fc.weight": (5, 3), "head.weight": (2, 4)}


@st.composite
def some_masks(draw):
    densities = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=3, max_size=3))
    key = draw(st.integers(0, 10**6))
    return {
        name: rng.bernoulli(rng.fold(key, name), density, *SHAPES[name])
        for name, density in zip(SHAPES, densities, strict=True)
    }


def as_sets(kept):
    return {name: {i for i, one in enumerate(mask.flatten().tolist()) if one} for name, mask in kept.items()}


def as_set(kept):
    return {(name, i) for name, those in as_sets(kept).items() for i in those}


def test_weights_are_what_has_two_axes_in_any_model_of_the_zoo():
    of_cnn = masks.prunable(p.of(zoo.MODELS["resnet-8"]((3, 8, 8), 4, norm="batch"))[0])
    assert of_cnn[-1] == "head.weight" and all("norm" not in name and name.endswith("weight") for name in of_cnn)
    lstm = p.of(zoo.MODELS["char-lstm"]((5,), 7, hidden=3))[0]
    matrices = [f"lstm.weight_{to}_l{layer}" for layer in (0, 1) for to in ("ih", "hh")]
    assert masks.prunable(lstm) == ("embedding.weight", *matrices, "head.weight")


def test_integers_are_no_weights():
    assert masks.prunable({"table": torch.ones(2, 2, dtype=torch.int64), "w": torch.ones(2, 2)}) == ("w",)


def test_ones_remove_nothing_and_name_what_is_unknown():
    params = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    kept = masks.ones(params, ["fc.weight"])
    masks.check(kept, params)
    assert kept["fc.weight"].all() and masks.remaining(kept) == 1.0
    with pytest.raises(ValueError, match=r"no parameter is called nowhere, nor; there are conv.weight"):
        masks.ones(params, ["fc.weight", "nowhere", "nor"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruned_entries_are_plus_zero_whatever_they_were_and_others_keep_their_bits(dtype):
    odd = torch.tensor([[-0.0, float("nan"), float("inf"), -1.5]] * 2, dtype=dtype)
    params = {"w": odd, "bias": odd[0].clone()}
    before = {name: tensor.clone() for name, tensor in params.items()}
    kept = {"w": torch.tensor([[True] * 4, [False] * 4])}
    found = masks.applied(params, kept)
    assert p.same_bits({"w": found["w"][1]}, {"w": torch.zeros(4, dtype=dtype)}) and not found["w"][1].signbit().any()
    assert p.same_bits({"w": found["w"][0], "bias": found["bias"]}, {"w": odd[0], "bias": before["bias"]})
    assert bool(found["w"][0, 0].signbit())
    assert p.same_bits(params, before)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"other": torch.ones(2, 3, dtype=torch.bool)}, "other: there is a mask and no such parameter"),
        ({"w": torch.ones(2, 3)}, "w: a mask must be bool, got torch.float32"),
        ({"w": torch.ones(2, 1, dtype=torch.bool)}, r"w: shape of the mask is \(2, 1\), not \(2, 3\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        masks.applied({"w": torch.ones(2, 3)}, mask)


@given(some_masks())
def test_shares_and_counts_are_those_of_sets(kept):
    sets, sizes = as_sets(kept), {name: mask.numel() for name, mask in kept.items()}
    assert masks.counts(kept) == {name: len(those) for name, those in sets.items()}
    assert masks.by_layer(kept) == {name: len(those) / sizes[name] for name, those in sets.items()}
    assert masks.remaining(kept) == len(as_set(kept)) / 47


def test_without_masks_all_remains():
    assert masks.remaining({}) == 1.0 and masks.counts({}) == {} and masks.overlap({}, {}) == 1.0


@given(some_masks(), some_masks())
def test_overlap_is_the_jaccard_index_of_sets(a, b):
    def jaccard(x, y):
        return len(x & y) / len(x | y) if x | y else 1.0

    assert masks.overlap(a, b) == jaccard(as_set(a), as_set(b)) == masks.overlap(b, a)
    assert masks.agreement(a, b) == {name: jaccard(as_sets(a)[name], as_sets(b)[name]) for name in a}


@given(some_masks(), some_masks())
def test_subsets_are_those_of_sets(a, b):
    both = {name: a[name] & b[name] for name in a}
    assert masks.is_subset(a, b) == (as_set(a) <= as_set(b))
    assert masks.is_subset(both, a) and masks.is_subset(both, b)


@pytest.mark.parametrize("compare", [masks.overlap, masks.agreement, masks.is_subset])
def test_masks_of_other_layers_are_not_compared(compare):
    one = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="names differ"):
        compare({"a": one}, {"b": one})
    with pytest.raises(ValueError, match="shapes differ"):
        compare({"a": one}, {"a": one[:1]})
