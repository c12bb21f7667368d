import re
import statistics

import pytest

from fedsim import runs
from fedsim.report import compare

ALPHAS, SEEDS = (0.1, 1.0), (1, 2, 3)


@pytest.fixture
def sweep(make):
    """Two splits with three seeds each, and one run of another strategy that is still going on."""
    folders = []
    for alpha in ALPHAS:
        for seed in SEEDS:
            made = make.records(12, seed=seed, top=0.8 + 0.1 * alpha)
            conf = make.config(f"a{alpha}-{seed}", seed=seed, data__split={"name": "dirichlet", "alpha": alpha})
            folders.append(make(conf=conf, made=made, with_summary=make.summary(made)))
    folders.append(make(conf=make.config(strategy={"name": "fedprox", "mu": 0.01}), made=make.records(5)))
    return [runs.open_run(folder) for folder in folders]


def test_the_keys_in_which_the_runs_differ_are_found_and_names_are_no_settings(sweep):
    assert compare.compare(sweep).differing == ("seed", "data.split.alpha", "strategy.name", "strategy.mu")


def test_runs_that_differ_only_in_seed_are_one_group(sweep):
    compared = compare.compare(sweep)
    assert [run.group for run in compared.runs] == [0, 0, 0, 1, 1, 1, 2]
    assert [group.seeds for group in compared.groups] == [SEEDS, SEEDS, (7,)]
    assert compared.groups[2].label == "data.split.alpha=0.3, strategy.name=fedprox, strategy.mu=0.01"


def test_a_legend_has_the_names_of_runs_that_differ_in_many_settings(make):
    many = {f"train__{key}": 99 for key in ("rounds", "local_epochs", "batch_size", "eval_every", "clients_per_round")}
    confs = [make.config("plain"), make.config("other", **many)]
    compared = compare.compare([runs.open_run(make(conf=conf, made=[])) for conf in confs])
    assert [group.label for group in compared.groups] == ["plain", "other"]
    confs[1]["name"] = "plain"
    compared = compare.compare([runs.open_run(make(conf=conf, made=[])) for conf in confs])
    assert "train.rounds=99" in compared.groups[1].label


def test_groups_hold_mean_and_sample_deviation_of_the_summaries(sweep):
    groups = compare.compare(sweep).groups
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


def test_runs_that_have_not_finished_are_listed_but_not_averaged(sweep):
    compared = compare.compare(sweep)
    assert compared.groups[2].accuracy is None
    assert compare.rows(compared)[6]["status"] == "running"
    assert compare.group_rows(compared)[2]["accuracy"] == "–"


def test_rounds_to_target_count_only_the_runs_that_got_there(make):
    folders = []
    for seed, top in ((1, 0.95), (2, 0.95), (3, 0.5)):
        made = make.records(20, seed=seed, top=top)
        folders.append(make(conf=make.config(seed=seed), made=made, with_summary=make.summary(made)))
    opened = [runs.open_run(folder) for folder in folders]
    compared = compare.compare(opened)
    reached = [run.summary()["rounds_to_target"] for run in opened[:2]]
    assert compared.groups[0].rounds_to_target == compare.Statistic(
        pytest.approx(statistics.mean(reached)), pytest.approx(statistics.stdev(reached)), 2
    )
    assert compare.rows(compared)[2]["rounds to target"] == "not reached"
    assert compare.group_rows(compared)[0]["rounds to target"].endswith("(n = 2)")


def test_a_single_run_has_no_deviation(whole):
    group = compare.compare([runs.open_run(whole)]).groups[0]
    assert (group.accuracy.n, group.accuracy.std) == (1, None)
    assert "±" not in compare.group_rows(compare.compare([runs.open_run(whole)]))[0]["accuracy"]


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (True, "true"), (None, "null"), ([], {})])
def test_values_of_different_type_differ(make, one, other):
    folders = [make(conf=make.config(data__root=value), made=[]) for value in (one, other)]
    assert compare.compare([runs.open_run(folder) for folder in folders]).differing == ("data.root",)


def test_every_line_has_the_same_columns_and_only_text(sweep):
    compared = compare.compare(sweep)
    for lines in (compare.rows(compared), compare.group_rows(compared)):
        assert len({tuple(line) for line in lines}) == 1
        assert all(isinstance(cell, str) for line in lines for cell in line.values())


def test_units_stand_once_where_both_have_the_same(sweep):
    line = compare.group_rows(compare.compare(sweep))[0]
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d %", line["accuracy"])
    assert re.fullmatch(r"30\.4 MB ± 0 B", line["traffic"])


def test_the_page_is_self_contained_and_has_tables_and_four_overlays(sweep, tmp_path, self_contained):
    html = compare.write(sweep, tmp_path / "new" / "compare.html").read_text()
    self_contained(html)
    assert html.count("<svg ") == 4
    assert "Over seeds" in html
    assert "1 of 7" in html
    assert "same seed" not in html
    for line in compare.rows(compare.compare(sweep)):
        assert all(f"{cell}</td>" in html for cell in line.values())


def test_runs_with_the_same_seed_are_called_not_independent(make, tmp_path):
    made = make.records(3)
    folders = [runs.open_run(make(made=made, with_summary=make.summary(made))) for _ in range(2)]
    assert "not independent" in compare.write(folders, tmp_path / "c.html").read_text()


def test_hostile_settings_are_text(make, tmp_path, self_contained):
    hostile = "<script>alert(1)</script>"
    folders = [make(conf=make.config(strategy={"name": name}), made=make.records(3)) for name in (hostile, "fedavg")]
    html = compare.write([runs.open_run(folder) for folder in folders], tmp_path / "c.html").read_text()
    self_contained(html)
    assert "&lt;script&gt;" in html


def test_two_writes_are_byte_equal(sweep, tmp_path):
    first, second = (compare.write(sweep, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_runs_without_rounds_can_be_compared(make, tmp_path):
    folders = [runs.open_run(make(made=[])) for _ in range(2)]
    assert "Fewer than two rounds" in compare.write(folders, tmp_path / "c.html").read_text()


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="at least one run"):
        compare.compare([])
