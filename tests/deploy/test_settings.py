import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.config.load import load
from fedsim.deploy import settings

CONFIG = {
    "name": "a",
    "seed": 3,
    "data": {"dataset": "digits", "clients": 4, "root": "/tmp"},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 2, "optimizer": {"name": "sgd", "lr": 0.5}},
}


def of(**changes):
    return settings.shared(load(CONFIG, changes))


def test_only_what_changes_a_clients_work_is_shared():
    assert of() == of(name="b", output="elsewhere", **{"data.root": None, "train.eval_every": 2, "engine": "reference"})
    assert of() == of(**{"train.clients_per_round": 2, "train.sampling": "poisson", "train.on_nan": "skip"})


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("train.optimizer.lr", 0.25, "train.optimizer.lr is 0.25 here, 0.5 at the server"),
        ("seed", 4, "seed is 4 here, 3 at the server"),
        ("data.split", {"name": "dirichlet", "alpha": 0.3}, "data.split.alpha is 0.3 here, not set at the server"),
        ("model.hidden", [8, 8], "model.hidden is [8, 8] here, [8] at the server"),
        ("train.batch_norm", "local", 'train.batch_norm is "local" here, "average" at the server'),
        ("strategy.server_lr", 0.5, "strategy.server_lr is 0.5 here, 1.0 at the server"),
        ("pruning", {"name": "magnitude"}, 'pruning.name is "magnitude" here, not set at the server'),
        ("transforms", ["sparse"], 'transforms is [{"name": "sparse"}] here, [] at the server'),
    ],
)
def test_a_difference_is_told_by_its_key(key, value, line):
    servers = settings.decode(settings.encode(of()))
    assert settings.differences(of(), servers, own_data=False) == []
    assert line in settings.differences(of(**{key: value}), servers, own_data=False)
    told = settings.differences(of(**{key: value}), servers, own_data=True)
    assert (line in told) == (not key.startswith(("seed", "data.")))


def test_who_rewinds_to_the_models_first_values_needs_the_seed_that_they_come_of():
    servers = of(pruning="personal-tickets")
    told = settings.differences(of(pruning="personal-tickets", seed=4), servers, own_data=True)
    assert told == ["seed is 4 here, 3 at the server"]
    magnitude = of(pruning="magnitude")
    assert settings.differences(of(pruning="magnitude", seed=4), magnitude, own_data=True) == []


def test_not_set_is_not_null():
    assert settings.differences({"a": None}, {}, own_data=False) == ["a is null here, not set at the server"]


@given(st.text())
def test_rubbish_is_a_value_error(text):
    try:
        found = settings.decode(text)
    except ValueError:
        return
    assert isinstance(found, dict)
