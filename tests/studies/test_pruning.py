"""The study of pruning: its configs, its arithmetic, and a fast part of it from beginning to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from at_study import at_study
from torch import nn

from fedsim.config import load
from fedsim.config.foreign import importable

STUDY = Path(__file__).parents[2] / "studies" / "pruning"
NAMES = ("claims", "experiments", "page", "plots", "small_pictures")


@pytest.fixture(scope="module", autouse=True)
def at_the_study():
    with at_study("pruning", NAMES):
        yield


def row(experiment="arms", arm="fine-tune", seed=1, accuracy=0.5, **more):
    return {
        "experiment": experiment,
        "data": "digits",
        "split": "IID",
        "seed": seed,
        "arm": arm,
        "accuracy": accuracy,
        **more,
    }


def test_every_config_is_right_and_every_arm_of_them():
    from experiments import DATA, SENT, SPLITS, TARGETED

    with importable(STUDY):
        for path in STUDY.glob("*.yaml"):
            for split in SPLITS.values():
                load.load(path, {"data.split": split})
        for data in DATA:
            for changes in SENT.values():
                load.load(STUDY / f"bytes-{data}.yaml", changes)
            for regularizers in TARGETED.values():
                load.load(STUDY / f"targeted-{data}.yaml", {"model.regularizers": regularizers})


def test_differences_are_between_runs_of_one_seed_and_place_with_the_margin():
    from claims import Claim, findings

    claim = Claim("", "", "arms", lambda r: r["arm"] == "a", lambda r: r["arm"] == "b", margin=2.0)
    rows = [row(arm="a", seed=1, accuracy=0.5), row(arm="b", seed=1, accuracy=0.4), row(arm="a", seed=2, accuracy=0.7)]
    rows += [row(arm="b", seed=3, accuracy=0.1), {**row(arm="b", seed=2, accuracy=0.9), "split": "2-shard"}]
    (found,) = findings(rows, [claim])
    assert found.place == "digits, IID" and found.differences == pytest.approx([12.0])


def test_a_run_that_has_no_accuracy_counts_as_guessing():
    from claims import accuracy

    assert accuracy(row(accuracy=None)) == accuracy(row(accuracy=float("nan"))) == 10.0
    assert accuracy(row(accuracy=0.25)) == 25.0


def test_every_claim_is_about_rows_that_the_experiments_make():
    import re

    from claims import CLAIMS
    from experiments import EXPERIMENTS

    assert {claim.experiment for claim in CLAIMS} <= set(EXPERIMENTS)
    made = [row("tickets", arm, level=n) for arm in ("ticket", "reinit", "random-mask") for n in range(10)]
    made.append(row("tickets", "one-shot", level=1))
    names = ("fine-tune", "scratch-e", "scratch-b", "thinet", "reconstruction", "random")
    made += [row("arms", arm) for arm in names]
    made += [row("arms", f"magnitude {share}, {arm}") for share in ("50%", "95%") for arm in ("fine-tune", "scratch-e")]
    arms = ("plain", "dropconnect", "targeted", "targeted, ramped")
    made += [row("targeted", arm, sparsity=s) for arm in arms for s in (0.0, 0.5, 0.75, 0.9)]
    made += [row("gates", arm, density=d) for arm in ("fbs", "l1-filter") for d in (1.0, 0.5, 0.3)]
    for claim in CLAIMS:
        own = [r for r in made if r["experiment"] == claim.experiment]
        assert sum(map(claim.better, own)) == sum(map(claim.worse, own)) == 1, claim.statement
        assert re.search(r"\w+ \d{4}", claim.source)


def test_the_mass_in_the_lowest_weights_is_a_share_of_squares():
    from experiments import _mass

    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 5.0]]))
    assert _mass(model) == pytest.approx((1 + 4 + 9) / (1 + 4 + 9 + 16 + 25))


@pytest.mark.slow
def test_a_fast_part_of_the_study_runs_and_is_not_run_twice(tmp_path):
    out, page = tmp_path / "results", tmp_path / "page"
    command = [sys.executable, str(STUDY / "study.py"), "--fast", "--out", str(out), "--page", str(page)]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {r["experiment"] for r in rows} == {"tickets", "arms", "targeted", "gates", "sent"}
    assert {r["seed"] for r in rows} == {1, 2} and all(0 < r["accuracy"] < 1 for r in rows)
    by_arm = {r["arm"]: r for r in rows if r["experiment"] == "sent"}
    assert by_arm["top-k 1 %"]["up"] < 0.1 * by_arm["dense"]["up"]
    remaining = [r["remaining"] for r in rows if r["arm"] == "ticket" and r["seed"] == 1]
    assert remaining == sorted(remaining, reverse=True) and remaining[0] == 1.0 and remaining[-1] < 0.7
    assert "**" in (page / "pruning.md").read_text() and len(list(page.glob("*.svg"))) == 4
    subprocess.run(command, check=True, timeout=60)
    assert json.loads((out / "results.json").read_text())["rows"] == rows
