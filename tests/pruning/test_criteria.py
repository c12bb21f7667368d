"""What is removed, against plain loops, sorted lists, torch's pruning, autograd and a scalar solver."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import nn
from torch.nn.utils import prune

from fedsim import params as p
from fedsim import rng
from fedsim.pruning import criteria, masks

SHAPES = {"conv": (3, 2, 2, 2), "fc": (5, 3), "head": (2, 4)}
DTYPES = [torch.float32, torch.float64]


def weights(key, dtype=torch.float64):
    """Continuous, of mixed signs, and of another scale in each layer."""
    return {
        n: 10.0**i * rng.normal(rng.fold(key, n), *s, dtype=dtype) for i, (n, s) in enumerate(SHAPES.items(), start=-1)
    }


def tied(key):
    """Few different values, so that many are equal."""
    return {n: torch.round(2 * rng.normal(rng.fold(key, n), *s)) for n, s in SHAPES.items()}


def drawn_masks(key, density):
    return {n: rng.bernoulli(rng.fold(key, "mask", n), density, *s) for n, s in SHAPES.items()}


keys = st.integers(0, 10**6)
densities = st.sampled_from([0.1, 0.5, 0.9, 1.0])


def removed_one_by_one(scores, kept, remove):
    """As ``lowest``, by sorting (score, index) in Python."""
    result = {}
    for name, mask in kept.items():
        flat, values = mask.flatten().tolist(), scores[name].flatten().tolist()
        order = sorted((values[i], i) for i in range(len(flat)) if flat[i])
        for _, i in order[: remove.get(name, 0)]:
            flat[i] = False
        result[name] = torch.tensor(flat).reshape(mask.shape)
    return result


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@given(keys, densities, st.data())
def test_exactly_the_lowest_go_and_of_equal_ones_the_first(key, density, data):
    scores, kept = tied(key), drawn_masks(key, density)
    remove = {n: data.draw(st.integers(0, c)) for n, c in masks.counts(kept).items() if data.draw(st.booleans())}
    found = criteria.lowest(scores, kept, remove)
    assert same(found, removed_one_by_one(scores, kept, remove))
    assert masks.is_subset(found, kept)
    assert masks.counts(found) == {n: c - remove.get(n, 0) for n, c in masks.counts(kept).items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_gone_is_never_looked_at(dtype):
    scores = {"w": torch.tensor([[float("nan"), -9.0, 2.0], [1.0, 3.0, float("inf")]], dtype=dtype)}
    kept = {"w": torch.tensor([[False, False, True], [True, True, True]])}
    before = kept["w"].clone()
    found = criteria.lowest(scores, kept, {"w": 2})["w"]
    assert found.tolist() == [[False, False, False], [False, True, True]]
    assert torch.equal(kept["w"], before)


@pytest.mark.parametrize(
    ("scores", "remove", "message"),
    [
        ({"w": torch.zeros(2, 2)}, {"w": 5}, "w: 4 entries remain, cannot remove 5"),
        ({"w": torch.zeros(2, 2)}, {"w": -1}, "w: 4 entries remain, cannot remove -1"),
        ({"w": torch.zeros(2, 2)}, {"v": 1}, "v: no such mask; there are w"),
        ({"w": torch.zeros(4)}, {"w": 1}, r"w: needs scores of shape \(2, 2\), got \(4,\)"),
        ({}, {"w": 1}, r"w: needs scores of shape \(2, 2\), got none"),
        ({"w": torch.full((2, 2), torch.nan)}, {"w": 1}, "w: scores must be numbers, got NaN"),
    ],
)
def test_what_cannot_be_removed_is_refused(scores, remove, message):
    with pytest.raises(ValueError, match=message):
        criteria.lowest(scores, {"w": torch.ones(2, 2, dtype=torch.bool)}, remove)


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_times_layer_by_layer_is_what_torchs_pruning_does(dtype):
    params = weights(5, dtype)
    modules = nn.ModuleDict({n: nn.ParameterDict({"weight": nn.Parameter(w.clone())}) for n, w in params.items()})
    rates, kept = {"conv": 0.1, "fc": 0.3, "head": 0.2}, masks.ones(params, SHAPES)
    for _ in range(4):
        kept = criteria.lowest(criteria.magnitude(params, SHAPES), kept, criteria.layerwise(kept, rates))
        for name, rate in rates.items():
            prune.l1_unstructured(modules[name], "weight", amount=rate)
        assert same(kept, {n: modules[n].weight_mask.bool() for n in SHAPES})
    assert 0 < masks.remaining(kept) < 0.6


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_times_over_all_layers_is_what_torchs_pruning_does(dtype):
    params = weights(6, dtype)
    modules = nn.ModuleDict({n: nn.ParameterDict({"weight": nn.Parameter(w.clone())}) for n, w in params.items()})
    kept = masks.ones(params, SHAPES)
    for count in (9, 7, 5, 3):  # in the end few of the first layer remain, and all of the last
        scores = criteria.magnitude(params, SHAPES)
        kept = criteria.lowest(scores, kept, criteria.globally(scores, kept, count))
        prune.global_unstructured([(m, "weight") for m in modules.values()], prune.L1Unstructured, amount=count)
        assert same(kept, {n: modules[n].weight_mask.bool() for n in SHAPES})
    assert masks.counts(kept)["conv"] < 5 and min(masks.counts(kept)["fc"] - 12, masks.counts(kept)["head"] - 5) > 0


def test_counts_of_a_rate_are_rounded_and_one_entry_stays():
    kept = {n: torch.arange(12).reshape(2, 6) < left for n, left in (("a", 12), ("b", 5), ("c", 1), ("d", 0))}
    assert criteria.layerwise(kept, dict.fromkeys("abcd", 0.2)) == {"a": 2, "b": 1, "c": 0, "d": 0}
    assert criteria.layerwise(kept, dict.fromkeys("abcd", 1.0)) == {"a": 11, "b": 4, "c": 0, "d": 0}
    assert criteria.layerwise(kept, {"b": 0.5}) == {"b": 2}  # 2.5, to the even one
    with pytest.raises(ValueError, match=r"a: rate must be in \[0, 1\], got 1.2"):
        criteria.layerwise(kept, {"a": 1.2})
    with pytest.raises(ValueError, match="e: no such mask; there are a, b, c, d"):
        criteria.layerwise(kept, {"e": 0.1})


@given(keys, densities, st.floats(0, 1))
def test_no_rate_and_no_sparsity_empties_a_layer(key, density, part):
    kept = {
        n: mask | (torch.arange(mask.numel()).reshape(mask.shape) == 1) for n, mask in drawn_masks(key, density).items()
    }
    scores = tied(key)
    for remove in (criteria.layerwise(kept, dict.fromkeys(kept, part)), criteria.to_sparsity(kept, part)):
        assert min(masks.counts(criteria.lowest(scores, kept, remove)).values()) >= 1


@given(keys, densities, st.floats(0, 0.9))
def test_a_sparsity_is_reached_to_the_entry_unless_it_was_passed_already(key, density, sparsity):
    scores, kept = tied(key), drawn_masks(key, density)
    for name, mask in criteria.lowest(scores, kept, criteria.to_sparsity(kept, sparsity)).items():
        had, wanted = int((~kept[name]).sum()), round(sparsity * mask.numel())
        assert int((~mask).sum()) == max(had, min(wanted, mask.numel() - 1))
    had, wanted = sum(int((~mask).sum()) for mask in kept.values()), round(sparsity * 47)
    assert criteria.to_overall(kept, sparsity) == max(wanted - had, 0)


def test_a_sparsity_of_each_layer():
    kept = masks.ones(weights(1), SHAPES)
    assert criteria.to_sparsity(kept, {"fc": 0.2, "conv": 0.5}) == {"fc": 3, "conv": 12}
    with pytest.raises(ValueError, match=r"fc: sparsity must be in \[0, 1\], got -0.5"):
        criteria.to_sparsity(kept, {"fc": -0.5})
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\], got 1.5"):
        criteria.to_overall(kept, 1.5)


@given(keys, densities, st.integers(0, 3), st.data())
def test_one_ranking_of_all_takes_them_one_by_one(key, density, at_least, data):
    scores, kept = tied(key), drawn_masks(key, density)
    left = masks.counts(kept)
    count = data.draw(st.integers(0, sum(max(c - at_least, 0) for c in left.values())))
    order = sorted(
        (scores[n].flatten()[i].item(), place, i, n)
        for place, n in enumerate(kept)
        for i in kept[n].flatten().nonzero().flatten().tolist()
    )
    expected = dict.fromkeys(kept, 0)
    for _, _, _, name in order:  # the lowest first; whoever has no more to give is passed over
        if sum(expected.values()) < count and left[name] - expected[name] > at_least:
            expected[name] += 1
    assert criteria.globally(scores, kept, count, at_least=at_least) == expected


def test_the_last_entries_of_a_layer_stay_unless_it_may_go():
    scores = {"low": torch.tensor([[1.0, 3.0, 2.0]]), "high": torch.tensor([[5.0, 4.0]])}
    kept = masks.ones(scores, scores)
    assert criteria.globally(scores, kept, 3) == {"low": 2, "high": 1}
    assert criteria.globally(scores, kept, 3, at_least=0) == {"low": 3, "high": 0}
    assert criteria.globally(scores, kept, 5, at_least=0) == {"low": 3, "high": 2}
    with pytest.raises(ValueError, match=r"count must be in \[0, 3\], as 1 of each layer stay, got 4"):
        criteria.globally(scores, kept, 4)
    with pytest.raises(ValueError, match="at_least must be >= 0, got -1"):
        criteria.globally(scores, kept, 1, at_least=-1)
    with pytest.raises(ValueError, match="high: needs scores"):
        criteria.globally({"low": scores["low"]}, kept, 1)


def test_random_scores_are_the_keys_and_fall_anywhere():
    params = weights(1)
    once, again, other = (criteria.random(params, SHAPES, key) for key in (3, 3, 4))
    assert same(once, again) and not same(once, other)
    assert not torch.equal(once["conv"].flatten()[:15], once["fc"].flatten())
    # 400 draws of 5 of 15: an entry goes 133.3 times, with a standard deviation of 9.43; each stays within 5 of them,
    # which 15 entries break by chance with a probability below 15 * 6e-7
    kept = masks.ones(params, ["fc"])
    gone = torch.zeros(SHAPES["fc"], dtype=torch.int64)
    for key in range(400):
        gone += ~criteria.lowest(criteria.random(params, ["fc"], key), kept, {"fc": 5})["fc"]
    assert int(gone.sum()) == 2000 and (gone - 400 / 3).abs().max() < 5 * 9.43


def small_loss(w):
    """A smooth loss of all layers that has curvature across them."""
    hidden = torch.tanh(w["fc"] @ torch.linspace(-1, 2, 3, dtype=torch.float64))
    logits = w["head"] @ hidden[:4] + w["conv"].flatten()[:2]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(1)) + 0.1 * (w["conv"] ** 3).sum()


def test_snip_is_the_derivative_by_masks():
    params = {n: 0.3 * w / w.abs().max() for n, w in weights(8).items()}
    cs = {n: torch.ones_like(w, requires_grad=True) for n, w in params.items()}
    by_masks = torch.autograd.grad(small_loss({n: cs[n] * params[n] for n in params}), [*cs.values()])
    grads = torch.func.grad(small_loss)(params)
    total = sum(d.abs().sum() for d in by_masks)
    scores = criteria.snip(params, grads)
    for score, derivative in zip(scores.values(), by_masks, strict=True):
        torch.testing.assert_close(score, derivative.abs() / total, rtol=1e-12, atol=0)
    assert sum(float(score.sum()) for score in scores.values()) == pytest.approx(1, rel=1e-12)


def test_snip_ranks_nothing_without_a_gradient():
    with pytest.raises(ValueError, match="0 everywhere"):
        criteria.snip(weights(1), p.zeros_like(weights(1)))


def test_grasp_is_what_the_gradient_loses_with_a_weight():
    params = {n: 0.3 * w / w.abs().max() for n, w in weights(8).items()}
    gradient = torch.func.grad(small_loss)

    def energy(w):
        return float(p.dot(gradient(w), gradient(w)))

    (hessian_grad,) = torch.func.vjp(gradient, params)[1](gradient(params))  # the Hessian is symmetric
    scores, step = criteria.grasp(params, hessian_grad), 1e-4
    for name, w in params.items():
        for i in range(w.numel()):  # weight i shrunk and stretched, times 1 -+ step
            part = torch.zeros(w.numel(), dtype=torch.float64).index_fill_(0, torch.tensor([i]), step).reshape(w.shape)
            less, more = (energy({**params, name: w * (1 + sign * part)}) for sign in (-1, 1))
            assert scores[name].flatten()[i].item() == pytest.approx((more - less) / (4 * step), rel=1e-5, abs=1e-9)


def test_grasp_takes_first_what_strengthens_the_gradient():
    # loss w^T A w / 2 with A = diag(1, 2) and a coupling: by hand, g = A w and H g = A g
    matrix, w = torch.tensor([[1.0, -3.0], [-3.0, 2.0]]), torch.tensor([[1.0, 1.0]])
    product = (matrix @ matrix @ w.T).T
    scores = criteria.grasp({"w": w}, {"w": product})
    gone = criteria.lowest(scores, {"w": torch.ones(1, 2, dtype=torch.bool)}, {"w": 1})["w"]
    norms = [(matrix @ (w * torch.eye(2)[i]).T).norm() for i in range(2)]
    assert product.tolist() == [[1.0, 4.0]] and gone.tolist() == [[False, True]] and norms[1] > norms[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_a_part_of_every_filter_goes_or_whole_filters(dtype, share):
    params = weights(9, dtype)
    kept = drawn_masks(9, 0.7)
    pruned = masks.applied(params, kept)
    found = criteria.by_column(pruned, kept, share)
    units = criteria.by_column(params, masks.ones(params, SHAPES), share, kind="unit")
    for name, shape in SHAPES.items():
        fan_in = math.prod(shape[1:])
        for row in range(shape[0]):
            values, had = pruned[name][row].flatten().abs().tolist(), kept[name][row].flatten().tolist()
            first = sorted(range(fan_in), key=lambda i, v=values: v[i])[: math.floor(share * fan_in + 1e-9)]
            left = [had[i] and i not in first for i in range(fan_in)]
            assert found[name][row].flatten().tolist() == left
        norms = params[name].flatten(1).norm(dim=1)
        low = torch.argsort(norms)[: math.floor(share * shape[0] + 1e-9)].tolist()
        expected = torch.tensor([row not in low for row in range(shape[0])])
        assert torch.equal(units[name].flatten(1), expected[:, None].expand(-1, fan_in))


def test_the_final_prune_refuses_what_is_no_share():
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
        criteria.by_column(weights(1), masks.ones(weights(1), SHAPES), 1.5)


def rigl_one_by_one(w, g, mask, count):
    """One layer, on lists: who stays, and who is new."""
    on = [i for i, one in enumerate(mask) if one]
    stay = set(on) - set(sorted(on, key=lambda i: (abs(w[i]), i))[:count])
    grown = sorted(set(range(len(w))) - stay, key=lambda i: (-abs(g[i]), i))[:count]
    now = stay | set(grown)
    return [i in now for i in range(len(w))], [i in now and not mask[i] for i in range(len(w))]


@given(keys, densities, st.floats(0, 1), st.booleans())
def test_rigl_drops_and_grows_as_on_lists(key, density, share, ties):
    make = tied if ties else weights
    kept = drawn_masks(key, density)
    params, grads = masks.applied(make(key), kept), make(key + 1)
    now, grown = criteria.dropped_and_grown(params, grads, kept, share)
    assert masks.counts(now) == masks.counts(kept)
    for name, mask in kept.items():
        left = int(mask.sum())
        lists = [t.flatten().tolist() for t in (params[name], grads[name], mask)]
        expected = rigl_one_by_one(*lists, min(round(share * left), max(left - 1, 0)))
        assert (now[name].flatten().tolist(), grown[name].flatten().tolist()) == expected
        assert not params[name][grown[name]].any()


def test_what_rigl_has_just_dropped_may_come_back_and_is_not_new():
    params, kept = {"w": torch.tensor([[0.1, 3.0, 0.0, 0.0]])}, {"w": torch.tensor([[True, True, False, False]])}
    back = criteria.dropped_and_grown(params, {"w": torch.tensor([[-9.0, 9.0, 1.0, 2.0]])}, kept, 0.5)
    away = criteria.dropped_and_grown(params, {"w": torch.tensor([[1.0, 9.0, -5.0, 2.0]])}, kept, 0.5)
    assert torch.equal(back[0]["w"], kept["w"]) and not back[1]["w"].any()
    assert away[0]["w"].tolist() == [[False, True, True, False]]
    assert away[1]["w"].tolist() == [[False, False, True, False]]


def test_rigl_needs_a_dense_gradient_for_every_layer():
    kept = masks.ones(weights(1), SHAPES)
    with pytest.raises(ValueError, match="head: needs scores"):
        criteria.dropped_and_grown(weights(1), {n: w for n, w in weights(1).items() if n != "head"}, kept, 0.1)
    with pytest.raises(ValueError, match="no such parameter"):
        criteria.dropped_and_grown({}, weights(1), kept, 0.1)


LAYERS = {"conv1": (16, 3, 3, 3), "conv2": (32, 16, 3, 3), "fc": (100, 512), "head": (10, 100)}


def solved(shapes, sparsity, kernel):
    """Densities by a root finder on the number of entries that are kept."""
    raw = {n: sum(s if kernel else s[:2]) / math.prod(s if kernel else s[:2]) for n, s in shapes.items()}
    sizes = {n: math.prod(s) for n, s in shapes.items()}

    def excess(log_epsilon):
        return sum(min(1, math.exp(log_epsilon) * raw[n]) * sizes[n] for n in shapes) - (1 - sparsity) * sum(
            sizes.values()
        )

    epsilon = math.exp(brentq(excess, -30, 30, xtol=1e-13, rtol=1e-14))
    return {n: min(1, epsilon * raw[n]) for n in shapes}


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("kernel", [True, False])
def test_densities_are_those_of_a_root_finder(sparsity, kernel):
    found = criteria.erdos_renyi(LAYERS, sparsity, kernel=kernel)
    assert found == pytest.approx(solved(LAYERS, sparsity, kernel), rel=1e-9)


sides = st.lists(st.integers(1, 40), min_size=2, max_size=4)


@given(st.lists(sides, min_size=1, max_size=5), st.floats(0.01, 0.99), st.booleans())
def test_densities_make_up_the_sparsity_and_none_is_above_one(shapes, sparsity, kernel):
    shapes = {str(i): shape for i, shape in enumerate(shapes)}
    found = criteria.erdos_renyi(shapes, sparsity, kernel=kernel)
    sizes = {n: math.prod(s) for n, s in shapes.items()}
    assert all(0 < density <= 1 for density in found.values())
    assert sum(found[n] * sizes[n] for n in found) == pytest.approx((1 - sparsity) * sum(sizes.values()), rel=1e-9)
    assert found == pytest.approx(solved(shapes, sparsity, kernel), rel=1e-6)


def test_layers_are_capped_one_after_another():
    # at first only "a" would be denser than whole; what it leaves makes "b" so as well
    shapes = {"a": (1, 1), "b": (2, 3), "c": (10, 12)}
    raw, left = {"a": 2.0, "b": 5 / 6, "c": 22 / 120}, 0.25 * 127
    first = left / (2 + 5 + 22)
    assert first * raw["a"] > 1 > first * raw["b"]
    second = (left - 1) / (5 + 22)
    assert second * raw["b"] < 1
    assert criteria.erdos_renyi(shapes, 0.75) == pytest.approx({"a": 1, "b": second * raw["b"], "c": second * raw["c"]})
    assert criteria.erdos_renyi(shapes, 0.0) == pytest.approx({"a": 1, "b": 1, "c": 1}, rel=1e-12)


def test_random_masks_of_these_densities_have_the_sparsity():
    params = {n: torch.zeros(s) for n, s in LAYERS.items()}
    kept = masks.ones(params, LAYERS)
    sparsity = {n: 1 - density for n, density in criteria.erdos_renyi(LAYERS, 0.9).items()}
    found = criteria.lowest(criteria.random(params, LAYERS, 1), kept, criteria.to_sparsity(kept, sparsity))
    assert masks.remaining(found) == pytest.approx(0.1, abs=2 / p.num_entries(params))
    assert masks.by_layer(found)["conv1"] > masks.by_layer(found)["fc"]


@pytest.mark.parametrize(
    ("shapes", "sparsity", "message"),
    [
        (LAYERS, 1.0, r"sparsity must be in \[0, 1\), got 1.0"),
        ({}, 0.5, "needs shapes"),
        ({"bias": (3,), "w": (2, 2)}, 0.5, "two axes or more, none of length 0: bias"),
        ({"empty": (3, 0)}, 0.5, "none of length 0: empty"),
    ],
)
def test_densities_need_a_sparsity_below_one_and_matrices(shapes, sparsity, message):
    with pytest.raises(ValueError, match=message):
        criteria.erdos_renyi(shapes, sparsity)
