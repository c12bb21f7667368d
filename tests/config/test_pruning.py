"""``pruning`` in a config: a name or a section, nothing by default, and what is wrong with either."""

import json

import pytest
import yaml

from fedsim.api.sweep_plan import plan
from fedsim.config.build import federation
from fedsim.config.catalogue import json_schema
from fedsim.config.load import check, load, resolved
from fedsim.errors import ConfigError
from fedsim.pruning.table import PRUNING


def test_nothing_is_pruned_by_default(valid):
    assert load(valid).pruning is None
    assert load({**valid, "pruning": None}).pruning is None
    assert federation(load(valid))[0].pruning is None


def test_a_bare_name_is_the_method_with_its_defaults(valid):
    valid["train"]["rounds"] = 6
    config = load({**valid, "pruning": "lottery-ticket"})
    assert config.pruning.name == "lottery-ticket"
    assert (config.pruning.params()["rate"], config.pruning.params()["every"]) == (0.2, 5)
    assert config == load({**valid, "pruning": {"name": "lottery-ticket"}})
    assert check(yaml.safe_load(yaml.safe_dump(resolved(config)))) == config


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        ({"pruning": None}, None),
        ({"pruning.rate": 0.3}, ("lottery-ticket", 0.3, 1)),
        ({"pruning.name": "lottery-ticket", "pruning.every": 7}, ("lottery-ticket", 0.4, 7)),
        ({"pruning": "lottery-ticket"}, ("lottery-ticket", 0.2, 5)),  # another section, with its defaults
        ({"pruning": {"name": "lottery-ticket", "every": 2}}, ("lottery-ticket", 0.2, 2)),
    ],
)
def test_overrides_change_or_replace_or_remove_it(overrides, found, valid):
    base = {**valid, "pruning": {"name": "lottery-ticket", "rate": 0.4, "every": 1}, "train": {"rounds": 9}}
    pruning = load(base, overrides).pruning
    if found is None:
        assert pruning is None
    else:
        assert (pruning.name, pruning.params()["rate"], pruning.params()["every"]) == found


def test_parameters_without_a_name_are_refused_with_the_names_there_are(valid):
    with pytest.raises(ConfigError, match=r"^pruning.name: needed, but not given; known: lottery-ticket, magnitude, "):
        load(valid, {"pruning.rate": 0.3})
    with pytest.raises(ConfigError, match=r"^pruning.name: needed, but not given; known: "):
        load({**valid, "pruning": {"rate": 0.3}})


@pytest.mark.parametrize(
    ("method", "key", "value"), [("lottery-ticket", "every", 5), ("magnitude", "start", 1), ("thinet", "at", 10)]
)
def test_defaults_may_come_too_late(method, key, value, valid):
    with pytest.raises(ConfigError) as caught:
        load({**valid, "pruning": method}, {"train.rounds": 1})
    assert caught.value.problems == [f"pruning.{key}: must be below train.rounds (1), got {value}"]


def test_the_schema_knows_every_method_by_name_and_as_a_section():
    schema = json.loads(json.dumps(json_schema()))
    offered = schema["properties"]["pruning"]["anyOf"]
    assert [option["examples"] for option in offered if option.get("type") == "string"] == [list(PRUNING)]
    (sections,) = (option["oneOf"] for option in offered if "oneOf" in option)
    assert {part["$ref"].removeprefix("#/$defs/pruning_") for part in sections if "$ref" in part} >= set(PRUNING)
    assert {"type": "null"} in offered
    rate = schema["$defs"]["pruning_lottery-ticket"]["properties"]["rate"]
    assert (rate["exclusiveMinimum"], rate["exclusiveMaximum"], rate["default"]) == (0, 1, 0.2)


@pytest.mark.parametrize(
    ("changes", "axes", "names"),
    [
        (
            {"pruning": "lottery-ticket", "pruning.every": 1, "pruning.rate": [0.1, 0.3]},
            {"pruning.rate": [0.1, 0.3]},
            ["01-rate=0.1", "02-rate=0.3"],
        ),
        (
            {"pruning": [None, "snip", {"name": "magnitude", "end": 1}]},
            {"pruning": [None, "snip", {"name": "magnitude", "end": 1}]},
            ["01-pruning=null", "02-pruning=snip", "03-pruning=magnitude_end=1"],
        ),
        (
            {"pruning": "l1-filter", "pruning.at": 1, "pruning.layers": ["fc1"], "seed": [1]},
            {"seed": [1]},
            ["01-seed=1"],
        ),
    ],
)  # fmt: skip
def test_a_sweep_goes_over_methods_and_over_their_parameters(changes, axes, names, valid):
    made = plan(valid, changes, alone=False)
    assert made.axes == axes and [one.name for one in made.combinations()] == names


def test_a_combination_that_would_never_prune_is_refused_before_anything_runs(valid):
    with pytest.raises(ConfigError, match=r"02-every=2: pruning.every: must be below train.rounds \(2\), got 2"):
        plan(valid, {"pruning": "lottery-ticket", "pruning.every": [1, 2]}, alone=False)
