import math

import numpy as np
import pytest
import torch
from transfer_pairs import HIDDEN, LABELLED, NETS, OVERLAP, ahead, loss, side

from fedsim.transfer import step, terms
from fedsim.transfer.objective import Objective


def plans(a, b):
    sizes = []
    for one in (a, b):
        head = one.params[one.net.head_names[0]].shape[1] + 1 if one.net.head else 0
        sizes.append((head, sum(one.params[name].numel() for name in one.net.body_names(one.params))))
    return terms.plan("a", OVERLAP, HIDDEN, *sizes[0]), terms.plan("b", OVERLAP, HIDDEN, *sizes[1])


def multiplied(plan, coefficients, sources):
    found = []
    for product, own in zip(plan.products, coefficients, strict=True):
        shape = product.shape
        assert own.shape == shape[:3]
        assert sources[product.source].shape == (plan.sources[product.source],)
        found.append(own @ sources[product.source].reshape(shape.batches, shape.terms, shape.columns))
    return found


def head(one):
    if not one.net.head:
        return np.zeros((HIDDEN, 0))
    weight, bias = (one.params[name] for name in one.net.head_names)
    return torch.cat([weight, bias[:, None]], 1).numpy()


@pytest.mark.parametrize("alignment", ["distance", "inner-product"])
@pytest.mark.parametrize(("kind_a", "kind_b"), [*[(k, k) for k in NETS], ("linear", "deep"), ("dropout", "linear")])
def test_products_of_coefficients_and_secrets_are_the_gradient_that_autograd_finds(kind_a, kind_b, alignment):
    objective = Objective("taylor", alignment, gamma=0.3, l2=0.01)
    a, b = side("a", kind_a), side("b", kind_b)
    ahead_a, ahead_b = ahead(a, objective), ahead(b, objective)
    plan_a, plan_b = plans(a, b)
    view_a, view_b = (step.view(one.net, f, one.rows, key=3, progress=1.0) for one, f in ((a, ahead_a), (b, ahead_b)))
    source = step.source(a.net, ahead_a, a.rows)
    from_a = terms.laid_out(terms.secrets_of_a(objective, view_a, source), plan_b, None)
    from_b = terms.laid_out(terms.secrets_of_b(view_b, LABELLED), plan_a, float(ahead_b.own.detach()))
    products_a = multiplied(plan_a, terms.coefficients_of_a(objective, view_a, source, plan_a), from_b)
    products_b = multiplied(plan_b, terms.coefficients_of_b(view_b, LABELLED, plan_b), from_a)
    found_a = terms.gradient("a", products_a, plan_a, head(a))
    found_b = terms.gradient("b", products_b, plan_b, head(b))

    whole = loss(objective, ahead_a, ahead_b, a.rows.labels)
    for one, forward, found in ((a, ahead_a, found_a), (b, ahead_b, found_b)):
        expected = step.derivatives(forward, whole)
        gradient = step.joined(one.net, forward, found)
        assert gradient.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(gradient[name], tensor, rtol=1e-10, atol=1e-12)
    assert found_b.loss is None
    assert found_a.loss + math.log(2) + float(ahead_a.own.detach()) == pytest.approx(float(whole.detach()), rel=1e-12)


@pytest.mark.parametrize("form", ["taylor", "exact"])
def test_the_gradient_is_that_of_finite_differences(form):
    objective = Objective(form, "distance", gamma=0.3, l2=0.01)
    a, b = side("a", "mlp"), side("b", "linear")
    ahead_a, ahead_b = ahead(a, objective), ahead(b, objective)
    whole = loss(objective, ahead_a, ahead_b, a.rows.labels)
    for one, other, forward in ((a, ahead_b, ahead_a), (b, ahead_a, ahead_b)):
        gradient = step.derivatives(forward, whole)
        for name, tensor in one.params.items():
            for entry in range(0, tensor.numel(), 7):
                moved = []
                for sign in (1, -1):
                    changed = tensor.clone()
                    changed.view(-1)[entry] += sign * 1e-6
                    again = ahead(one, objective, {**one.params, name: changed})
                    pair = (again, other) if one is a else (other, again)
                    moved.append(float(loss(objective, *pair, a.rows.labels).detach()))
                slope = (moved[0] - moved[1]) / 2e-6
                assert float(gradient[name].view(-1)[entry]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_a_plan_counts_what_travels():
    rows = terms.plan("a", overlap=200, hidden=16, head=16, body=0)
    assert rows.by_rows
    assert rows.sources == (216 * 16, 137)  # V, and the pairs of S with B's own part of the loss
    assert terms.plan("b", 200, 16, 16, 0).sources == (216 * 16,)
    entries = terms.plan("b", overlap=200, hidden=16, head=33, body=512)
    assert not entries.by_rows
    assert [product.shape for product in entries.products] == [(16, 33, 216, 1), (1, 512, 3456, 1)]
    assert terms.plan("a", 200, 16, 33, 512).sources == (217 * 16,)
    assert [product.shape.rows for product in terms.plan("b", 200, 16, 0, 40).products] == [40]
