import dataclasses

import numpy as np

from fedsim import runs
from fedsim.report.results import curve, mean_curve, results


def test_results_of_a_finished_run_are_those_of_its_summary(whole):
    found, summary = results(runs.open_run(whole)), runs.open_run(whole).summary()
    assert dataclasses.asdict(found.final) == summary["final"]
    assert dataclasses.asdict(found.best) == summary["best"]
    assert found.rounds_to_target == summary["rounds_to_target"] is not None
    totals = (found.bytes_up, found.bytes_down, found.seconds)
    assert totals == tuple(summary["totals"][key] for key in ("bytes_up", "bytes_down", "seconds"))
    assert (found.status, found.planned) == ("finished", 20)


def test_rounds_count_where_the_summary_is_older(make):
    made = make.records(9)
    run = runs.open_run(make(made=made, with_summary=make.summary([], status="running")))
    found = results(run)
    assert found.final.accuracy == made[-1].accuracy
    assert found.bytes_up == sum(r.bytes_up for r in made)
    assert found.initial.accuracy == 0.097


def test_a_run_killed_before_its_first_round_has_no_results_and_is_not_called_finished(make):
    found = results(runs.open_run(make(made=[])))
    assert found.status == "running"
    assert (found.final.accuracy, found.best.round, found.traffic, found.epsilon) == (None, None, 0, None)


def test_a_curve_over_traffic_counts_rounds_that_were_not_evaluated(make):
    made = make.records(6, eval_every=2)
    found = results(runs.open_run(make(made=made)))
    x, y = curve(found, "accuracy", "bytes")
    expected, sent = [], 0
    for record in made:
        sent += record.bytes_up + record.bytes_down
        if record.accuracy is not None:
            expected.append((sent, record.accuracy))
    assert list(zip(x, y, strict=True)) == expected
    assert len(x) == 3


def test_loss_begins_before_training_but_training_loss_does_not(whole):
    found = results(runs.open_run(whole))
    assert [values[0] for values in curve(found, "loss", "round")] == [0, 2.31]
    assert curve(found, "train_loss", "round")[0][0] == 1


def test_epsilon_is_the_last_one_stated(make):
    made = [dataclasses.replace(r, epsilon=r.round / 10 if r.round < 4 else None) for r in make.records(5)]
    assert results(runs.open_run(make(made=made))).epsilon == 0.3


def test_the_mean_curve_is_over_the_rounds_that_all_runs_have_at_their_mean_traffic(make):
    lengths, accuracy = (5, 4, 6), np.full((3, 7), np.nan)
    bytes_sent = np.zeros((3, 7))
    several = []
    for i, length in enumerate(lengths):
        made = [dataclasses.replace(r, bytes_up=100 * (i + 1) * r.round) for r in make.records(length, seed=i)]
        made[2] = dataclasses.replace(made[2], accuracy=None if i == 1 else made[2].accuracy)
        several.append(results(runs.open_run(make(made=made, with_summary=make.summary(made)))))
        accuracy[i, 0] = 0.097
        for r in made:
            accuracy[i, r.round] = np.nan if r.accuracy is None else r.accuracy
            bytes_sent[i, r.round] = bytes_sent[i, r.round - 1] + r.bytes_up + r.bytes_down
    rounds = [0, 1, 2, 4]  # one run lacks the accuracy of round 3 and ends at 4
    for against, xs in (("round", rounds), ("bytes", bytes_sent.mean(0)[rounds])):
        x, mean, deviation = mean_curve(several, "accuracy", against)
        np.testing.assert_allclose(x, xs)
        np.testing.assert_allclose(mean, accuracy.mean(0)[rounds])
        np.testing.assert_allclose(deviation, accuracy.std(0, ddof=1)[rounds], atol=1e-12)


def test_runs_without_a_common_round_have_no_mean_curve(make):
    several = [results(runs.open_run(make(made=[]))), results(runs.open_run(make()))]
    assert mean_curve(several, "loss", "bytes") == ([], [], [])


def test_a_run_that_did_not_end_may_have_been_killed(make, whole):
    assert results(runs.open_run(make(made=[]))).standing == "running or killed"
    assert results(runs.open_run(whole)).standing == "finished"
    assert results(runs.open_run(whole)).kind == "federated"
