"""``model.regularizers``: a list of components, checked like all others, each problem under its own dotted key."""

import pytest

import fedsim
from fedsim.config import catalogue
from fedsim.config.build import federation
from fedsim.config.load import load, resolved
from fedsim.errors import ConfigError

BASE = {
    "data": {"dataset": "digits", "clients": 4},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 2, "batch_size": 64},
}


def with_(*regularizers, **changes):
    return load(BASE, {"model.regularizers": list(regularizers), **changes})


def test_defaults_are_filled_in_and_read_again():
    config = with_("l1", {"name": "proximal", "mu": 1})
    found = [{"name": "l1", "strength": 1e-5}, {"name": "proximal", "mu": 1}]
    assert resolved(config)["model"]["regularizers"] == found
    assert load(resolved(config)) == config


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        (["l3"], ["model.regularizers.0.name: unknown name 'l3' (did you mean l2?); known: dropout, "]),
        (["l1", {"name": "l2", "strenth": 1}], ["model.regularizers.1.strenth: unknown key (did you mean strength?)"]),
        ([{"name": "l1", "strength": -1}], ["model.regularizers.0.strength: must be >= 0, got -1"]),
        ("l1", ["model.regularizers: must be a list, got 'l1'"]),
        ([3], ["model.regularizers.0: must be a name, or a section with a name and its parameters, got 3"]),
        ([None], ["model.regularizers.0: must be a name, or a section with a name and its parameters, got null"]),
        ([{"strength": 1}], ["model.regularizers.0.name: needed, but not given; known: dropout"]),
        (["no.such:thing"], ["model.regularizers.0.name: cannot import 'no.such'"]),
        (
            [{"name": "l1", "strength": "x"}, {"name": "label-smoothing", "epsilon": 1}],
            ["model.regularizers.0.strength: must be a number, got 'x'", "model.regularizers.1.epsilon: must be < 1"],
        ),
    ],
)
def test_every_problem_stands_under_its_key(given, problems):
    with pytest.raises(ConfigError) as caught:
        load(BASE, {"model.regularizers": given})
    assert len(caught.value.problems) == len(problems)
    assert all(found.startswith(expected) for found, expected in zip(caught.value.problems, problems, strict=True))


def test_a_model_without_a_place_for_it():
    with pytest.raises(ConfigError, match=r"^model\.regularizers\.1: needs batch norm; cnn, .* with norm: batch$"):
        federation(with_("l1", "bn-slimming"))
    made, _ = federation(with_("bn-slimming", model={"name": "cnn", "channels": [4], "norm": "batch"}))
    assert len(made.work.objective.penalties) == 1


def test_somebody_elses_must_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_regularizer.py").write_text("def nothing(): return 3\n")
    with pytest.raises(ConfigError, match=r"model\.regularizers\.0\.name: must make fedsim's Regularizer, but .* int"):
        fedsim.run(BASE, {"model.regularizers": ["wrong_regularizer:nothing"], "output": str(tmp_path)})


def test_they_are_listed_with_their_keys():
    found = {entry.name: entry.keys for entry in catalogue.entries("regularizers")}
    assert found["label-smoothing"] == (("epsilon", "float >= 0 < 1", "default 0.1"),)
    assert all(keys for keys in found.values())


@pytest.mark.parametrize("engine", ["local", "flower", {"name": "local", "mode": "vectorised"}])
def test_a_regularised_run_learns_something_else_and_verifies(engine, tmp_path):
    changes = {"output": str(tmp_path), "engine": engine}
    plain = fedsim.run(BASE, changes)
    made = fedsim.run(BASE, {**changes, "model.regularizers": ["label-smoothing", {"name": "proximal", "mu": 2.0}]})
    assert [r.loss for r in made.rounds] != [r.loss for r in plain.rounds]
    found = fedsim.verify(made.folder, "all", {"engine": "reference"})
    assert found.equal and found.tensors
