import dataclasses
import re
import statistics

import pytest

from fedsim import runs
from fedsim.report import tables
from fedsim.report.groups import Statistic, compare


def test_runs_that_have_not_finished_are_listed_but_not_averaged(sweep):
    compared = compare(sweep)
    assert compared.groups[2].accuracy is None
    assert tables.rows(compared)[6]["status"] == "running or killed"
    assert tables.group_rows(compared)[2]["accuracy"] == "–"


def test_rounds_to_target_count_only_the_runs_that_got_there(make):
    folders = []
    for seed, top in ((1, 0.95), (2, 0.95), (3, 0.5)):
        made = make.records(20, seed=seed, top=top)
        folders.append(make(conf=make.config(seed=seed), made=made, with_summary=make.summary(made)))
    opened = [runs.open_run(folder) for folder in folders]
    compared = compare(opened)
    reached = [run.summary()["rounds_to_target"] for run in opened[:2]]
    assert compared.groups[0].rounds_to_target == Statistic(
        pytest.approx(statistics.mean(reached)), pytest.approx(statistics.stdev(reached)), 2
    )
    assert tables.rows(compared)[2]["rounds to target"] == tables.rows(compared)[2]["bytes to target"] == "not reached"
    for key in ("rounds to target", "bytes to target"):
        assert tables.group_rows(compared)[0][key].endswith("(n = 2)")


def test_sparsity_has_a_column_only_where_a_run_was_pruned(make):
    made = make.records(4)
    pruned = [dataclasses.replace(r, sparsity=0.25 * r.round, remaining={"a.weight": 1 - 0.25 * r.round}) for r in made]
    folders = [
        make(conf=make.config(seed=seed, strategy={"name": name}), made=own, with_summary=make.summary(own))
        for seed, name, own in ((1, "fedavg", made), (1, "fedprox", pruned[:2]), (2, "fedprox", pruned[:3]))
    ]
    compared = compare([runs.open_run(folder) for folder in folders])
    assert [line["sparsity"] for line in tables.rows(compared)] == ["–", "50.00 %", "75.00 %"]
    assert [line["sparsity"] for line in tables.group_rows(compared)] == ["–", "62 ± 18 %"]
    plain = compare([runs.open_run(folders[0])])
    assert "sparsity" not in {**tables.rows(plain)[0], **tables.group_rows(plain)[0]}


def test_a_single_run_has_no_deviation(whole):
    group = compare([runs.open_run(whole)]).groups[0]
    assert (group.accuracy.n, group.accuracy.std) == (1, None)
    assert "±" not in tables.group_rows(compare([runs.open_run(whole)]))[0]["accuracy"]


def test_every_line_has_the_same_columns_and_only_text(sweep):
    compared = compare(sweep)
    for lines in (tables.rows(compared), tables.group_rows(compared)):
        assert len({tuple(line) for line in lines}) == 1
        assert all(isinstance(cell, str) for line in lines for cell in line.values())


def test_units_stand_once_and_mean_and_deviation_have_the_same_decimals(sweep):
    line = tables.group_rows(compare(sweep))[0]
    assert re.fullmatch(r"\d+\.(\d+) ± \d+\.\d+ %", line["accuracy"])
    for key in ("accuracy", "best accuracy", "loss", "traffic", "time"):
        mean, deviation = re.fullmatch(r"([\d.]+) ± ([\d.]+)[ %A-Za-z]*", line[key]).groups()
        assert len(mean.partition(".")[2]) == len(deviation.partition(".")[2])
    assert line["traffic"] == "30.41 ± 0.00 MB"


def test_what_a_run_came_to_stands_before_its_settings(sweep):
    targets = ["rounds to target", "bytes to target"]
    outcome = ["run", "accuracy", "best accuracy", *targets, "rounds", "up", "down", "time", "status"]
    settings = ["seed", "data.split.alpha", "strategy.name", "strategy.mu"]
    assert list(tables.rows(compare(sweep))[0]) == outcome + settings
    groups = list(tables.group_rows(compare(sweep))[0])
    assert groups[:3] == ["group", "n", "accuracy"]
    assert groups[-4:] == ["seeds", *settings[1:]]


def test_the_notes_state_the_divisor_and_what_is_left_out_or_repeated(sweep, make):
    divisor, unfinished = tables.notes(compare(sweep))
    assert "divisor n - 1" in divisor
    assert unfinished == "Unfinished runs are left out: 1 of 7."
    made = make.records(3)
    twice = [runs.open_run(make(made=made, with_summary=make.summary(made))) for _ in range(2)]
    assert "same seed" in tables.notes(compare(twice))[-1]
    assert tables.notes(compare(twice[:1])) == []
    killed = runs.open_run(make(made=made, with_summary=make.summary(made, "running")))  # and then started again
    assert "same seed" not in " ".join(tables.notes(compare([twice[0], killed])))


def test_a_finished_run_without_accuracy_is_told_beside_the_mean(make):
    folders = []
    for seed in (1, 2, 3):
        made = make.records(4, eval_every=1 if seed < 3 else 9)
        folders.append(make(conf=make.config(seed=seed), made=made, with_summary=make.summary(made)))
    line = tables.group_rows(compare([runs.open_run(folder) for folder in folders]))[0]
    assert line["n"] == "3"
    assert line["accuracy"].endswith(" % (n = 2)")
