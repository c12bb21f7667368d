"""How much exact gradients tell: with as many of them as hidden values, least squares finds those."""

import numpy as np
import pytest
from transfer_pairs import normal

from fedsim.transfer import terms
from fedsim.transfer.objective import Objective

OVERLAP, HIDDEN, LABELLED = 12, 3, 7


def recovered(width: int) -> tuple[float, terms.Plan]:
    """Largest error of B's hidden values as A, whose last layer has so many inputs, solves for them."""
    features = np.concatenate([normal(1, OVERLAP, width - 1).numpy(), np.ones((OVERLAP, 1))], axis=1)
    hidden_a, hidden_b = normal(2, OVERLAP, HIDDEN).numpy(), normal(3, OVERLAP, HIDDEN).numpy()
    labels = np.where(np.arange(OVERLAP) % 3 == 0, 1.0, -1.0)[:LABELLED]
    phi, mean = normal(4, HIDDEN).numpy(), normal(5, width).numpy()
    nothing = np.zeros((OVERLAP, HIDDEN, 0))
    mine = terms.View(hidden_a, features, nothing)
    source = terms.Source(phi, labels, mean, np.zeros((HIDDEN, 0)))
    plan = terms.plan("a", OVERLAP, HIDDEN, width, 0)
    coefficients = terms.coefficients_of_a(Objective(gamma=0.3), mine, source, plan)[0][0]
    secrets = terms.secrets_of_b(terms.View(hidden_b, features, nothing), LABELLED)
    found = np.linalg.lstsq(coefficients, coefficients @ secrets, rcond=None)[0]
    return float(np.abs(found[HIDDEN:] - hidden_b).max()), plan


def test_a_wide_last_layer_finds_the_others_hidden_values_and_that_is_told():
    error, plan = recovered(width=OVERLAP + 2)
    assert error < 1e-6
    assert terms.determines(plan, OVERLAP, HIDDEN)


def test_a_narrow_one_does_not():
    error, plan = recovered(width=4)
    assert error > 0.1
    assert not terms.determines(plan, OVERLAP, HIDDEN)


@pytest.mark.parametrize(("head", "body", "told"), [(11, 0, False), (12, 0, True), (10, 5, False), (10, 6, True)])
def test_what_is_counted_is_numbers_of_an_iteration(head, body, told):
    assert terms.determines(terms.plan("b", OVERLAP, HIDDEN, head, body), OVERLAP, HIDDEN) is told
