"""What is an axis, what the combinations are called, and what is refused before anything runs."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.api import sweep_plan
from fedsim.api.sweep_plan import Plan, plan, text
from fedsim.errors import ConfigError

CONFIG = {
    "data": {"dataset": "digits", "clients": 4},
    "model": {"name": "cnn", "channels": [4], "hidden": 8},
    "train": {"rounds": 1},
}


def planned(changes, config=CONFIG, alone=False):
    return plan(config, changes, alone=alone)


def names(made):
    return [one.name for one in made.combinations()]


@pytest.mark.parametrize(
    ("changes", "axes"),
    [
        ({"seed": [1, 2]}, {"seed": [1, 2]}),
        ({"seed": range(1, 3)}, {"seed": [1, 2]}),
        ({"seed": (1, 2), "train.rounds": 2}, {"seed": [1, 2]}),
        ({"seed": [1], "model.channels": [4, 8]}, {"seed": [1]}),
        ({"model.channels": [[4], [4, 8]]}, {"model.channels": [[4], [4, 8]]}),
        ({"seed": [1], "model.regularizers": ["proximal"]}, {"seed": [1]}),
        ({"model.regularizers": [[], ["proximal"]]}, {"model.regularizers": [[], ["proximal"]]}),
        ({"seed": [1], "model": "mlp", "model.hidden": [4, 8]}, {"seed": [1]}),
        ({"model": ["mlp", "linear"]}, {"model": ["mlp", "linear"]}),
        ({"model": [{"name": "mlp", "hidden": [4]}]}, {"model": [{"name": "mlp", "hidden": [4]}]}),
        ({"model.name": ["mlp"], "model.hidden": [[4], [8]]}, {"model.name": ["mlp"], "model.hidden": [[4], [8]]}),
        ({"train": [{"rounds": 2}, {"rounds": 3}]}, {"train": [{"rounds": 2}, {"rounds": 3}]}),
        ({"seed": [1], "transforms": []}, {"seed": [1]}),
        ({"model.hidden": [4, 8]}, {"model.hidden": [4, 8]}),  # of cnn it is a number, of mlp a list
    ],
)
def test_a_list_is_an_axis_unless_the_key_takes_one_itself(changes, axes):
    made = planned(changes)
    assert (made.axes, set(made.fixed)) == (axes, set(changes) - set(axes))


def test_a_list_in_the_config_says_that_a_key_takes_one_where_no_type_does(tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef net(*, widths=None, depth=None): return nn.Identity()\n"
    )
    (tmp_path / "own.yaml").write_text(
        "{data: {dataset: digits, clients: 4}, model: {name: 'own:net', widths: [3]}, train: {rounds: 1}}"
    )
    made = planned({"model.depth": [3, 4], "model.widths": [5, 6]}, tmp_path / "own.yaml")
    assert made.axes == {"model.depth": [3, 4]}
    assert made.config(made.combinations()[0]).model.params() == {"widths": [5, 6], "depth": 3}


def test_the_product_is_in_order_with_the_last_axis_fastest():
    made = planned({"train.local_epochs": [1, 5], "train.eval_every": 2, "seed": [3, 2, 1]})
    values = [tuple(one.values.values()) for one in made.combinations()]
    assert values == [(1, 3), (1, 2), (1, 1), (5, 3), (5, 2), (5, 1)]
    configs = [made.config(one) for one in made.combinations()]
    assert [(c.train.local_epochs, c.seed) for c in configs] == values
    assert {c.train.eval_every for c in configs} == {2}
    assert names(made)[1] == "02-local_epochs=1-seed=2"


def test_names_tell_components_and_lists_apart():
    optimizers = ["adam", {"name": "sgd", "lr": 0.5, "momentum": 0.9}]
    made = planned({"train.optimizer": optimizers, "model.regularizers": [[], ["proximal", "l2"]]})
    assert names(made) == [
        "01-optimizer=adam-regularizers=none",
        "02-optimizer=adam-regularizers=proximal_l2",
        "03-optimizer=sgd_lr=0.5_momentum=0.9-regularizers=none",
        "04-optimizer=sgd_lr=0.5_momentum=0.9-regularizers=proximal_l2",
    ]
    assert text(optimizers[1]) == "sgd(lr=0.5, momentum=0.9)"


def test_axes_whose_last_parts_are_alike_are_named_in_full():
    made = planned({"seed": [1], "data.seed": [None, 2]})
    assert names(made) == ["01-seed=1-data.seed=null", "02-seed=1-data.seed=2"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(min_size=1), st.lists(VALUES, min_size=1, max_size=3), min_size=1, max_size=4))
def test_names_are_unlike_safe_and_short_whatever_the_values(axes):
    found = names(Plan({}, {}, axes, None, alone=False))
    assert len(set(found)) == len(list(itertools.product(*axes.values())))
    assert all(re.fullmatch(r"[0-9][A-Za-z0-9.+=_-]{1,99}", name) and name[-1] != "." for name in found)


def problems(changes, config=CONFIG):
    with pytest.raises(ConfigError) as error:
        planned(changes, config)
    return error.value.problems


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.rounds": 2}, ["nothing to sweep: give a key a list of values, such as seed=[1, 2, 3]"]),
        (
            {"model.channels": [4, 8]},
            [
                "nothing to sweep: give a key a list of values, such as seed=[1, 2, 3]",
                "model.channels: takes a list itself, so it is swept by a list of lists",
            ],
        ),
        ({"seed": []}, ["seed: a list of values to sweep must hold at least one"]),
        ({"name": ["a", "b"]}, ["name: cannot be swept, it only says what a run is called or where"]),
        ({"seed": [1, 2, 1]}, ["03-seed=1: the same run as 01-seed=1"]),
        ({"strategy": ["fedavg", {"name": "fedavg"}]}, ["02-strategy=fedavg: the same run as 01-strategy=fedavg"]),
        ({"seed": [object]}, ["seed.0: must be a number, text, true, false, null, a list or a section, got <class"]),
    ],
)
def test_what_is_no_sweep_is_refused(changes, expected):
    found = problems(changes)
    assert len(found) == len(expected) and all(map(str.startswith, found, expected))


def test_all_problems_are_told_at_once_with_the_combination_that_has_them():
    found = problems({"train.local_epochs": [0, 1], "seed": [1, -2], "train.batch_size": 0, "train.lokal": 1})
    assert {line.partition(", got")[0].partition("; known")[0] for line in found} == {
        "train.lokal: unknown key",
        "01-local_epochs=0-seed=1 (and 1 more): train.local_epochs: must be >= 1",
        "train.batch_size: must be a whole number >= 1, or all",
        "02-local_epochs=0-seed=-2 (and 1 more): seed: must be >= 0",
    }


def test_too_many_runs_are_refused_before_they_are_checked(monkeypatch):
    monkeypatch.setattr(sweep_plan, "MAX_RUNS", 5)
    assert problems({"seed": [1, 2, 3], "train.rounds": [1, 2]}) == [
        "a sweep may have 5 runs at most, these values make 6"
    ]


def test_side_by_side_runs_of_the_local_engine_start_no_workers_unless_told_to():
    engines = ["local", {"name": "local", "workers": 2}, "reference"]
    configs = [
        [made.config(one).engine.params().get("workers") for one in made.combinations()]
        for made in (planned({"engine": engines}, alone=alone) for alone in (False, True))
    ]
    assert configs == [["auto", 2, None], [1, 2, None]]


def test_a_config_without_a_name_is_named_after_its_file(tmp_path):
    (tmp_path / "base.yaml").write_text("{data: {dataset: digits, clients: 4}, model: linear, output: there}")
    (tmp_path / "my study.yaml").write_text("{extends: base.yaml, train: {rounds: 3}}")
    made = planned({"seed": [1, 2]}, tmp_path / "my study.yaml")
    assert (made.name, str(made.output), made.beside) == ("my-study", "there", tmp_path.resolve())
    assert made.base["train"] == {"rounds": 3} and made.base["model"] == "linear"
    assert made.config(made.combinations()[1]).name == "my-study"
    assert planned({"seed": [1], "name": "other", "output": "here"}, tmp_path / "my study.yaml").name == "other"
