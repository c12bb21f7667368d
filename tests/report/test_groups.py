import statistics

import pytest

from fedsim import runs
from fedsim.report.groups import compare

SEEDS = (1, 2, 3)


def test_the_keys_in_which_the_runs_differ_are_found_and_names_are_no_settings(sweep):
    assert compare(sweep).differing == ("seed", "data.split.alpha", "strategy.name", "strategy.mu")


def test_runs_that_differ_only_in_seed_are_one_group(sweep):
    compared = compare(sweep)
    assert [run.group for run in compared.runs] == [0, 0, 0, 1, 1, 1, 2]
    assert [group.seeds for group in compared.groups] == [SEEDS, SEEDS, (7,)]
    assert compared.groups[2].label == "alpha=0.3, strategy=fedprox, mu=0.01"


def _labels(*folders):
    return [group.label for group in compare([runs.open_run(folder) for folder in folders]).groups]


def test_a_group_is_called_by_the_name_its_runs_share_if_no_other_has_it(make):
    def run(name, seed, lr):
        return make(conf=make.config(name, seed=seed, train__optimizer={"name": "sgd", "lr": lr}), made=[])

    slow, fast = [run("slow", seed, 0.01) for seed in SEEDS], [run("fast", seed, 0.1) for seed in SEEDS]
    assert _labels(*slow, *fast) == ["slow", "fast"]
    assert _labels(*slow, run("slow", 1, 0.1)) == ["lr=0.01", "lr=0.1"]
    assert _labels(*slow, run("fast", 4, 0.01), *fast) == ["lr=0.01", "lr=0.1"]
    assert _labels(run("a", 1, 0.1), run("b", 2, 0.1)) == ["all runs"]


def test_settings_in_a_label_are_short_but_never_alike(make):
    confs = [
        make.config(data__split={"name": "dirichlet", "alpha": 0.1}, data__root="/long/" * 9 + "a"),
        make.config(data__split={"name": "iid"}, data__root="/long/" * 9 + "b", data__seed=1),
    ]
    first, second = _labels(*(make(conf=conf, made=[]) for conf in confs))
    assert first.startswith("root=…") and first.endswith("/long/a, split=dirichlet, alpha=0.1")
    assert second.endswith("/long/b, split=iid, data.seed=1")
    confs = [make.config(data__root=mark + "x" * 40) for mark in "ab"]
    first, second = _labels(*(make(conf=conf, made=[]) for conf in confs))
    assert first != second
    assert max(len(first), len(second)) < 40
    assert _labels(make(made=[]), make(conf=make.config(data__extra=1), made=[])) == ["no extra", "extra=1"]


@pytest.mark.parametrize("kind", ["centralised", "alone"])
def test_a_baseline_is_not_averaged_with_its_federation(make, kind):
    made = make.records(3)
    kinds = [{}, {"kind": "federated"}, {"kind": kind}]  # folders from before there were kinds do not say
    folders = [
        make(conf=make.config(seed=i), made=made, with_summary=make.summary(made, **k)) for i, k in enumerate(kinds)
    ]
    compared = compare([runs.open_run(folder) for folder in folders])
    assert compared.differing == ("kind", "seed")
    assert [run.group for run in compared.runs] == [0, 0, 1]
    assert [group.settings for group in compared.groups] == [{"kind": "federated"}, {"kind": kind}]
    assert [group.label for group in compared.groups] == ["kind=federated", f"kind={kind}"]


def test_a_folder_given_twice_counts_once_and_keeps_its_place(make, tmp_path):
    made = make.records(3)
    one, two = (make(conf=make.config(seed=s), made=made, with_summary=make.summary(made)) for s in (1, 2))
    (tmp_path / "link").symlink_to(one)
    again = [one, two, f"{one}/", f"{two.parent}/./{one.name}", tmp_path / "link"]
    compared = compare([runs.open_run(folder) for folder in again])
    assert [run.folder for run in compared.runs] == [one.name, two.name]
    assert compared.groups[0].accuracy.n == 2


def test_groups_hold_mean_and_sample_deviation_of_the_summaries(sweep):
    groups = compare(sweep).groups
    for group, members in zip(groups[:2], (sweep[:3], sweep[3:6]), strict=True):
        summaries = [run.summary() for run in members]
        for found, values in (
            (group.accuracy, [s["accuracy"] for s in summaries]),
            (group.best_accuracy, [s["best"]["accuracy"] for s in summaries]),
            (group.loss, [s["loss"] for s in summaries]),
        ):
            n = len(values)
            mean = sum(values) / n
            assert found.mean == pytest.approx(mean)
            assert found.std == pytest.approx((sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5)
            assert found.std == pytest.approx(statistics.stdev(values))
            assert found.n == n == 3


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (True, "true"), (None, "null"), ([], {})])
def test_values_of_different_type_differ(make, one, other):
    folders = [make(conf=make.config(data__root=value), made=[]) for value in (one, other)]
    assert compare([runs.open_run(folder) for folder in folders]).differing == ("data.root",)


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        compare([])
