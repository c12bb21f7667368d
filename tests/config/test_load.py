import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.config.load import check, load, resolved
from fedsim.errors import ConfigError, DataError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_is_idempotent_once_resolved(path):
    config = load(path)
    full = resolved(config)
    assert load(full) == config
    assert resolved(load(full)) == full
    assert load(yaml.safe_load(yaml.safe_dump(full))) == config


def test_a_resolved_config_says_all_there_is_to_say(valid):
    full = resolved(load(valid))
    assert full["data"]["split"] == {"name": "dirichlet", "alpha": 0.5, "min_examples": 1}
    assert full["data"]["test_fraction"] == 0.2
    assert full["train"]["optimizer"] == {
        "name": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False
    }  # fmt: skip
    assert full["train"]["schedule"] == {"name": "constant", "warmup": 0}
    keys = {"hidden": [8], "dropout": 0.0, "norm": "none"}
    assert full["model"] == {"name": "mlp", "init": "default", "regularizers": [], **keys}
    assert set(full) == {
        "name", "seed", "data", "model", "train", "strategy", "pruning", "transforms", "transfer", "engine", "output"
    }  # fmt: skip


def test_the_smallest_config_has_all_defaults():
    config = load({"data": {"dataset": "digits", "clients": 3}, "model": "linear"})
    assert (config.name, config.strategy.name, config.engine.name) == ("run", "fedavg", "local")
    assert (config.data.split.name, config.train.optimizer.name) == ("iid", "sgd")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("my run (2).yaml", "my-run-2"),
        (".hidden.yaml", "hidden"),
        ("ünï.yml", "n"),
        ("日本.yaml", "run"),
        ("a" * 120, "a" * 100),
    ],
)
def test_a_file_without_name_is_named_after_itself(tmp_path, file, name):
    (tmp_path / file).write_text("data: {dataset: digits, clients: 3}\nmodel: linear\n")
    assert load(tmp_path / file).name == name


def test_a_parameter_of_a_default_component_can_be_overridden():
    config = load({"data": {"dataset": "digits", "clients": 3}, "model": "linear"}, {"train.optimizer.lr": 0.5})
    assert resolved(config)["train"]["optimizer"]["lr"] == 0.5
    config = load({"data": {"dataset": "digits", "clients": 3}, "model": "linear"}, {"train.schedule.warmup": 2})
    assert resolved(config)["train"]["schedule"] == {"name": "constant", "warmup": 2}


def test_overrides_go_over_what_a_file_extends(tmp_path, valid):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(valid))
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nseed: 8\ndata: {split: {name: shards}}\n")
    config = load(tmp_path / "top.yaml", {"data.split.shards_per_client": 3})
    assert (config.seed, config.train.rounds) == (8, 2)
    assert config.data.split.params() == {"shards_per_client": 3, "min_examples": 1}


def _leaves(section: dict, above: tuple[str, ...] = ()):
    for key, value in section.items():
        yield ".".join((*above, key))
        if isinstance(value, dict):
            yield from _leaves(value, (*above, key))


def test_any_leaf_can_be_overridden_with_its_own_value(valid):
    full = resolved(load(valid))
    for key in _leaves(full):
        value = full
        for part in key.split("."):
            value = value[part]
        assert load(valid, {key: value}) == load(valid), key


def test_a_config_that_holds_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("data: &d {dataset: *d}\nmodel: linear\n")
    with pytest.raises(ConfigError, match="nested too deeply"):
        load(tmp_path / "a.yaml")


_names = st.sampled_from(
    ["name", "alpha", "data", "iid", "dirichlet", "sgd", "lr", "all", "json:loads", "a.b:c", ":", ""]
)
_scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 3) | st.floats() | st.text(max_size=5) | _names
    | st.just(10**400)
)  # fmt: skip
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | _names, inner, max_size=3),
    max_leaves=6,
)
_KEYS = (
    "name seed data model train strategy pruning transforms transfer engine output zzz data.dataset data.root "
    "data.clients data.split data.split.name data.split.alpha data.test_fraction model.name model.hidden "
    "model.regularizers model.zzz.y train.rounds train.clients_per_round train.batch_size train.optimizer "
    "train.optimizer.lr train.target_accuracy strategy.name strategy.weighting engine.name data..x"
)


@settings(deadline=None, max_examples=250)
@given(st.dictionaries(st.sampled_from(_KEYS.split()), _values, min_size=1, max_size=3))
def test_nothing_but_a_config_or_an_error_with_problems_comes_of_any_value(changes):
    base = {
        "data": {"dataset": "digits", "clients": 6, "split": {"name": "dirichlet", "alpha": 0.5}},
        "model": {"name": "mlp", "hidden": [8]},
    }
    try:
        config = load(base, changes)
    except (ConfigError, DataError) as error:
        lines = str(error).split("\n")
        assert all(lines)
        assert len(lines) == len(set(lines))
    else:
        assert load(resolved(config)) == config
        assert check(yaml.safe_load(yaml.safe_dump(resolved(config)))) == config


def test_keys_of_the_wrong_type_are_problems():
    for keys in itertools.combinations([1, None, "seed", (2, 3)], 2):
        with pytest.raises(ConfigError):
            load(dict.fromkeys(keys, 1))
