import dataclasses
import statistics

import pytest

from fedsim import runs
from fedsim.records import ClientEvaluation
from fedsim.report import sections
from fedsim.report.results import results


def _titles(section):
    return [chart.title for chart in section.charts]


def test_learning_has_curves_against_rounds_and_traffic(whole):
    section = sections.learning(results(runs.open_run(whole)))
    assert _titles(section) == ["Accuracy by round", "Accuracy by traffic", "Loss by round", "Loss by traffic"]
    assert all(chart.image for chart in section.charts)
    assert [key.label for key in section.charts[2].legend] == ["held-out", "training"]


def test_a_run_without_training_loss_says_so_under_the_loss(make):
    made = [dataclasses.replace(r, train_loss=None) for r in make.records(3)]
    section = sections.learning(results(runs.open_run(make(made=made))))
    assert section.charts[2].image
    assert section.charts[2].note == "No training loss was recorded."


def test_epsilon_gets_a_curve_only_where_it_was_accounted(make):
    made = [dataclasses.replace(r, epsilon=float(r.round), skipped=(4, 5)) for r in make.records(3)]
    section = sections.learning(results(runs.open_run(make(made=made))))
    assert _titles(section)[-1] == "Privacy spent by round"
    assert "not finite: 6." in section.lead


def test_a_single_round_is_a_sentence_with_its_numbers(make):
    made = make.records(1)
    section = sections.learning(results(runs.open_run(make(made=made, with_summary=make.summary(made)))))
    assert not section.charts
    assert f"{100 * made[0].accuracy:.2f} %" in section.lead


@pytest.mark.parametrize(("rounds", "sentence"), [(0, "No round was finished"), (3, "No round was evaluated")])
def test_nothing_to_show_is_said(make, rounds, sentence):
    found = results(runs.open_run(make(made=make.records(rounds, eval_every=5))))
    assert sentence in sections.learning(found).lead
    assert not sections.learning(found).charts


def test_the_spread_over_clients_names_lowest_median_and_highest_of_the_last_round():
    made = [ClientEvaluation(r, k, 5, 1.0, a) for r, k, a in [(1, 0, 0.9), (2, 0, 0.2), (2, 1, 0.6), (2, 2, 0.5)]]
    section = sections.clients(made)
    assert "3 clients, lowest 20.00 %, median 50.00 %, highest 60.00 %" in section.lead
    assert "median from 90.00 % to 50.00 %" in section.charts[0].image


def test_quantiles_by_round_equal_those_of_a_slow_loop_whatever_the_order_of_lines(whole, monkeypatch):
    evaluations = runs.open_run(whole).clients()
    drawn = {}
    monkeypatch.setattr(sections.figures, "bands", lambda rounds, q: drawn.update(rounds=rounds, q=q) or _figure())
    sections.clients(evaluations[::-1])
    assert drawn["rounds"] == list(range(1, 21))
    for column, round in enumerate(drawn["rounds"]):
        values = sorted(e.accuracy for e in evaluations if e.round == round)
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        expected = [values[0], tenths[0], statistics.median(values), tenths[-1], values[-1]]
        assert drawn["q"][:, column] == pytest.approx(expected)


def _figure():
    from matplotlib.figure import Figure

    return Figure()


def test_clients_evaluated_once_have_a_histogram_only():
    section = sections.clients([ClientEvaluation(3, k, 5, 1.0, 0.5) for k in range(2)])
    assert _titles(section) == ["Clients by accuracy after round 3"]
    assert "no course to draw" in section.lead


@pytest.mark.parametrize("accuracy", [None, "absent"])
def test_clients_without_accuracy_are_said_to_be_unknown(accuracy):
    made = [] if accuracy == "absent" else [ClientEvaluation(1, 0, 5, 1.0, accuracy)]
    assert "not known" in sections.clients(made).lead


def test_the_split_lists_every_client_with_its_numbers(whole):
    run = runs.open_run(whole)
    facts = run.split()
    table = sections.split(facts, run.clients()).table
    assert table.columns == (
        "client",
        "examples",
        "held out",
        "effective classes",
        "earth mover's distance",
        "final accuracy",
        "final loss",
    )
    last = {e.client: e for e in run.clients() if e.round == 20}
    for k, row in enumerate(table.rows):
        assert row[:3] == (str(k), str(facts["sizes"][k]), str(facts["test_sizes"][k]))
        assert float(row[3]) == pytest.approx(facts["effective_classes"][k], abs=0.005)
        assert float(row[4]) == pytest.approx(facts["earth_movers_distance"][k], abs=0.0005)
        assert row[5] == f"{100 * last[k].accuracy:.2f} %"


def test_a_client_without_examples_has_dashes_and_is_left_out_of_the_skew(make):
    facts = make.split(4)
    facts["effective_classes"][1] = facts["earth_movers_distance"][1] = None
    section = sections.split(facts, [])
    assert _titles(section) == ["Label counts", "Skew over clients"]
    assert section.table.rows[1][3:] == ("–", "–")


def test_a_split_of_too_many_clients_keeps_its_summary(make):
    lists = ("sizes", "counts", "test_sizes", "effective_classes", "earth_movers_distance")
    facts = make.split(3) | dict.fromkeys(lists) | {"num_clients": 5000}
    section = sections.split(facts, [])
    assert "5,000 clients" in section.lead
    assert "too many" in section.lead
    assert not section.charts
    assert section.table is None
    assert [name for name, _ in section.facts] == ["clients without labels", "earth mover's distance"]


def test_equal_sizes_are_said_once():
    facts = {"num_clients": 2, "num_examples": 1200, "num_classes": 2, "sizes": [600, 600]}
    assert sections.split(facts, []).lead == "2 clients hold 1,200 examples of 2 classes: 600 each."


def test_no_split_is_said():
    assert sections.split({}, []).lead == "No details of the split were written."


def test_the_table_of_rounds_leaves_out_columns_without_values(make):
    found = results(runs.open_run(make(made=make.records(3))))
    table = sections.rounds(found).table
    assert "epsilon" not in table.columns
    assert "left out" not in table.columns
    assert [row[0] for row in table.rows] == ["1", "2", "3"]


def test_who_failed_in_a_round_is_in_its_row(make):
    failed = {k: f"{'x' * 70}{k}" for k in (2, 5, 7, 9)}
    one, *others = make.records(3)
    found = results(runs.open_run(make(made=[dataclasses.replace(one, failed=failed, skipped=(1,)), *others])))
    column = list(sections.rounds(found).table.columns).index("left out")
    cells = [row[column] for row in sections.rounds(found).table.rows]
    assert cells == [f"5 (client 2: {'x' * 60}; client 5: {'x' * 60}; client 7: {'x' * 60}; and 1 more)", "–", "–"]
    assert "4 times a client of a cohort contributed nothing" in sections.learning(found).lead
