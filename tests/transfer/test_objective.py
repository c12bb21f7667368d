import math

import numpy as np
import pytest
import torch
from transfer_pairs import LABELLED, OVERLAP, ROWS_A, ahead, loss, normal, side, signs

from fedsim.transfer import objective as o


def slow_loss(objective: o.Objective, u_a, y, u_b, weights: float) -> float:
    """The paper's sums, term by term, with means."""
    d = u_a.shape[1]
    phi = [sum(y[j] * u_a[j][k] for j in range(ROWS_A)) / ROWS_A for k in range(d)]
    first = 0.0
    for i in range(LABELLED):
        score = sum(phi[k] * u_b[i][k] for k in range(d))
        if objective.form == "exact":
            first += math.log(1 + math.exp(-y[i] * score))
        else:
            first += math.log(2) + 0.5 * (-y[i]) * score + 0.125 * y[i] ** 2 * score**2
    second = 0.0
    for i in range(OVERLAP):
        if objective.alignment == "distance":
            second += sum((u_a[i][k] - u_b[i][k]) ** 2 for k in range(d))
        else:
            second -= sum(u_a[i][k] * u_b[i][k] for k in range(d))
    return first / LABELLED + objective.gamma * second / OVERLAP + objective.l2 / 2 * weights


@pytest.mark.parametrize("form", ["taylor", "exact"])
@pytest.mark.parametrize("alignment", ["distance", "inner-product"])
def test_the_loss_is_the_papers_sum_over_rows(form, alignment):
    objective = o.Objective(form, alignment, gamma=0.3, l2=0.02)
    a, b = side("a", "mlp"), side("b", "deep")
    ahead_a, ahead_b = ahead(a, objective), ahead(b, objective)
    weights = sum(float((tensor**2).sum()) for one in (a, b) for tensor in one.params.values())
    u_a, u_b = ahead_a.hidden.values.tolist(), ahead_b.hidden.values.tolist()
    expected = slow_loss(objective, np.array(u_a), a.rows.labels.tolist(), np.array(u_b), weights)
    assert float(loss(objective, ahead_a, ahead_b, a.rows.labels).detach()) == pytest.approx(expected, rel=1e-12)


def test_taylor_is_least_squares_to_margin_two():
    scores, labels = normal(1, 30) * 3, signs(2, 30)
    margins = labels * scores
    expected = ((margins - 2) ** 2 / 8 + math.log(2) - 0.5).mean()
    assert float(o.label_loss(scores, labels, "taylor")) == pytest.approx(float(expected), rel=1e-12)


def test_taylor_and_exact_agree_to_third_order_at_zero():
    labels = signs(3, 40)
    gaps = []
    for size in (0.1, 0.05):
        scores = normal(4, 40) * size
        gaps.append(float((o.label_loss(scores, labels, "taylor") - o.label_loss(scores, labels, "exact")).abs()))
    assert gaps[0] < 5e-6  # mean of z^4 / 192
    assert gaps[0] / gaps[1] == pytest.approx(16, rel=0.05)


def test_the_exact_loss_does_not_overflow():
    assert float(o.label_loss(torch.tensor([-800.0]), torch.tensor([1.0]), "exact")) == pytest.approx(800.0)
