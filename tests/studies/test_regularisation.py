"""The study of the regularisers: its configs, its arithmetic, and a fast part of it from beginning to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from fedsim import rng
from fedsim.config import load
from fedsim.config.foreign import importable
from fedsim.records import Examples
from fedsim.training.regularizers import REGULARIZERS

STUDY = Path(__file__).parents[2] / "studies" / "regularisation"


@pytest.fixture(scope="module", autouse=True)
def at_the_study():
    sys.path.insert(0, str(STUDY))
    yield
    sys.path.remove(str(STUDY))


def test_every_experiment_has_a_config_that_is_right():
    from experiments import EXPERIMENTS, HERE

    with importable(STUDY):
        used = set()
        for experiment in EXPERIMENTS:
            choices = experiment.axes.get("model.regularizers", [None])
            assert not experiment.variants or len(experiment.variants) == len(next(iter(experiment.axes.values())))
            for choice in choices:
                changes = {} if choice is None else {"model.regularizers": choice}
                checked = load.load(HERE / experiment.config, changes)
                used |= {one.name for one in checked.model.regularizers.root}
        assert used == set(REGULARIZERS)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((0.3, 0.4, 0.5), "holds"),
        ((-0.3, -0.4, -0.5), "does not hold here"),
        ((0.3, -0.4, 0.5), "not distinguishable"),
        ((0.3,), "not distinguishable"),
        ((0.0, 0.0, 0.0), "not distinguishable"),
    ],
)
def test_a_verdict_is_a_t_test(differences, verdict):
    from claims import CLAIMS, Finding

    assert Finding(CLAIMS[0], "IID", differences).verdict == verdict
    if len(set(differences)) > 1:
        above = stats.ttest_1samp(differences, 0, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, 0, alternative="less").pvalue
        assert verdict == ("holds" if above < 0.05 else "does not hold here" if below < 0.05 else "not distinguishable")


def test_differences_are_between_runs_of_one_seed_and_federation():
    from claims import Claim, accuracy, findings, single

    rows = [
        {
            "experiment": name,
            "variant": v,
            "federation": "IID",
            "seed": seed,
            "test_accuracy": a,
            "head_accuracies": [a, 0],
        }
        for name, v, seed, a in [("a", "1", 1, 0.5), ("a", "1", 2, 0.7), ("b", "", 1, 0.4), ("b", "", 3, 0.9)]
    ]
    (found,) = findings(rows, [Claim("", "", "points", ("a", "1"), ("b", ""), accuracy)])
    assert found.differences == pytest.approx([10.0])
    (found,) = findings(rows, [Claim("", "", "points", ("a", "1"), ("a", "1"), accuracy, single)])
    assert found.differences == pytest.approx([25.0, 35.0])


def test_occlusion_zeroes_one_square_of_each_picture():
    from measures import PATCH, occluded

    n = 400
    examples = Examples(1 + rng.uniform(1, n, 1, 14, 14), torch.zeros(n, dtype=torch.long))
    dark = occluded(examples).inputs == 0
    assert (dark.sum((1, 2, 3)) == PATCH**2).all()
    rows, columns = dark.any(3)[:, 0], dark.any(2)[:, 0]
    assert (rows.sum(1) == PATCH).all() and (columns.sum(1) == PATCH).all()
    starts = rows.double().argmax(1)
    assert set(starts.tolist()) == set(range(10))  # missed by chance once in 10^17
    assert torch.equal(occluded(examples).inputs[~dark], examples.inputs[~dark])


def test_pruning_takes_the_smaller_half_for_a_while():
    from measures import pruned

    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
    before = [layer.weight.detach().clone() for layer in model]
    with pruned(model):
        gone = model[0].weight == 0
        assert gone.sum() == 12 and before[0][gone].abs().max() < before[0][~gone].abs().min()
        assert torch.equal(model[1].weight, before[1])
    assert torch.equal(model[0].weight, before[0])


@pytest.mark.slow
def test_a_fast_part_of_the_study_runs_and_is_not_run_twice(tmp_path):
    out, page = tmp_path / "results", tmp_path / "page"
    command = [sys.executable, str(STUDY / "study.py"), "--fast", "--out", str(out), "--page", str(page)]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert len(rows) == 4 * 5 and all(row["status"] == "finished" for row in rows)
    assert {row["variant"] for row in rows} == {"", "1", "2", "8"}
    assert all(0.05 < row["test_accuracy"] < 0.9 and len(row["train_losses"]) == 2 for row in rows)
    told = (page / "regularisation.md").read_text()
    assert "| multi-sample-dropout, 8 | Dirichlet 0.3 |" in told and "**not distinguishable**" in told
    again = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    assert json.loads((out / "results.json").read_text())["rows"] == rows
    assert again.stdout.count(" runs") == 3
