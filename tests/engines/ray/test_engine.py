"""The engine as a config names it: what is missing is named, what was chosen is written down, a config runs."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedsim
from fedsim import params as p
from fedsim import runs
from fedsim.engines.local import local
from fedsim.engines.local.measuring import choose
from fedsim.engines.local.sharing import tasks_of_a_round
from fedsim.engines.ray import ray
from fedsim.errors import MissingDependencyError
from fedsim.federation import job

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'fedsim-flower[ray]'"
)
MODEL = """
from torch import nn


def mine(*, input_shape, num_classes, width: int = 6):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, num_classes))
"""
CONFIG = {
    "data": {"dataset": "digits", "clients": 6, "split": {"name": "dirichlet", "alpha": 1.0}},
    "model": {"name": "a_model_for_ray:mine", "width": 5},
    "train": {"rounds": 3, "clients_per_round": 5, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}},
}


@pytest.mark.slow
@needs_ray
def test_a_config_runs_on_a_ray_of_its_own_with_the_bits_of_local(tmp_path, monkeypatch):
    """Actors find a model of the user's in the working folder. Another machine need not have Ray to read the run."""
    monkeypatch.chdir(tmp_path)
    Path("a_model_for_ray.py").write_text(MODEL)
    ours, theirs = (
        fedsim.run(CONFIG, {"engine": {"mode": "sequential", **engine}})
        for engine in ({"name": "ray", "actors": 2}, {"name": "local", "workers": 1})
    )
    said = json.loads((ours.folder / "environment.json").read_text())["engine"]
    assert (said["name"], said["actors"], said["address"], said["path"]) == ("ray", 2, None, "sequential")
    assert [replace(r, seconds=0.0) for r in ours.rounds] == [replace(r, seconds=0.0) for r in theirs.rounds]
    assert p.same_bits(runs.open_run(ours.folder).model(), runs.open_run(theirs.folder).model())
    monkeypatch.setitem(sys.modules, "ray", None)
    assert torch.equal(ours.model()[1].weight, theirs.model()[1].weight)


def test_without_ray_the_extra_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    told = r"^engine: ray needs the package ray, which pip install 'fedsim-flower\[ray\]' brings$"
    with pytest.raises(MissingDependencyError, match=told):
        fedsim.run({**CONFIG, "model": "linear"}, {"engine": "ray"})
    assert list(tmp_path.iterdir()) == []


def test_importing_the_engines_imports_no_ray():
    code = "import sys, fedsim.engines.table; print('ray' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@needs_ray
def test_the_plan_that_a_run_began_with_is_kept(federation):
    recorded = {"path": "vectorised", "chunk": 2, "speeds": {"vectorised, 2 clients": 7.0}}
    engine = ray(mode="auto", address="somewhere:1").prepared(job(federation()), recorded)
    assert engine.choice == choose(job(federation()), "auto", recorded)
    said = engine.describe()
    assert (said["path"], said["chunk"], said["speeds"]) == ("vectorised", 2, {"vectorised, 2 clients": 7.0})
    assert engine.prepared(job(federation()), said).choice == engine.choice


@needs_ray
@pytest.mark.parametrize("mode", ["sequential", "auto"])
def test_it_chooses_as_local_does(federation, mode):
    theirs = local(mode=mode, workers=1).prepared(job(federation()), {}).choices
    assert ray(mode=mode).prepared(job(federation()), {}).choice.plan == theirs.plan.plan


@needs_ray
def test_a_mode_that_the_model_cannot_take_is_refused_as_local_does(federation):
    """Batch norm is in no chain."""
    with pytest.raises(ValueError, match="fused"):
        ray(mode="fused").prepared(job(federation()), {})


@needs_ray
def test_no_more_actors_are_wanted_than_a_round_has_tasks(federation):
    made = federation()
    plan = ray(mode="sequential").prepared(job(made), {}).choice.plan
    assert tasks_of_a_round(job(made), plan) == 12
    assert tasks_of_a_round(job(replace(made, clients_per_round=3)), plan) == 3
    assert tasks_of_a_round(job(made), replace(plan, path="vectorised", chunk=5)) == 3
