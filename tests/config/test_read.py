from pathlib import Path

import numpy as np
import pytest

from fedsim.config.read import as_yaml, merge, override, parse_overrides, parse_yaml, plain, read
from fedsim.errors import ConfigError


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: c", "bad.yaml, line 2: expected ',' or ']', but got ':'"),
        ("name: a: b", "bad.yaml, line 1: mapping values are not allowed here"),
        ("data:\n\tclients: 3", "bad.yaml, line 2: a tab character; YAML indents with spaces"),
        ("name: a\n\tseed: 1", "bad.yaml, line 2: a tab character; YAML indents with spaces"),
        ("name: a\nname: b", "bad.yaml, line 2: duplicate key 'name'"),
        ("data:\n  split: {name: iid, name: shards}", "bad.yaml, line 2: duplicate key 'name'"),
        ("1: a", "bad.yaml, line 1: key 1 is not text"),
        ("~: a", "bad.yaml, line 1: key null is not text"),
        ("", "bad.yaml: the file is empty"),
        ("# only a remark", "bad.yaml: the file is empty"),
        ("- a\n- b", "bad.yaml: must hold keys and values, found ['a', 'b']"),
        ("digits", "bad.yaml: must hold keys and values, found 'digits'"),
        (bytes(range(256)), "bad.yaml: not a text file in UTF-8"),
        (b"name: a\0", "bad.yaml: not text, character 7 has code 0"),
        ("a: 1\n---\nb: 2", "expected a single document in the stream, but found another document"),
        ("a: " + "[" * 3000 + "]" * 3000, "bad.yaml: nested too deeply"),
        ("a: !!python/object:os.system x", "could not determine a constructor for the tag"),
    ],
)
def test_a_file_that_is_not_a_yaml_mapping_is_refused_with_file_and_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path / "bad.yaml", text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.yaml", "nowhere.yaml: no such file"),
        (".", ": cannot be read: Is a directory"),
        ("file/below.yaml", "below.yaml: cannot be read: Not a directory"),
        ("a\0b", "cannot be read: embedded null byte"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-2.5e+1", -25.0), (".5", 0.5), ("3.", 3.0), ("-7", -7), ("0", 0),
        (".inf", float("inf")), ("-.inf", float("-inf")), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("no", "no"), ("off", "off"), ("12:30", "12:30"), ("010", "010"), ("1_000", "1_000"),
        ("2024-01-31", "2024-01-31"), ("2024-99-99", "2024-99-99"), ("9" * 5000, "9" * 5000), ("0x1F", "0x1F"),
        ('"1"', "1"), ("[1, [2.0, x]]", [1, [2.0, "x"]]),
    ],
)  # fmt: skip
def test_plain_yaml_values_mean_what_they_look_like(text, value):
    found = parse_yaml(text, "text")
    assert found == value
    assert type(found) is type(value)


def test_merge_keys_and_byte_order_marks_are_allowed(tmp_path):
    text = "\ufeffa: &one {x: 1, y: 2}\nb:\n  <<: *one\n  y: 3\n"
    assert read(written(tmp_path / "a.yaml", text)) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}


# ---------------------------------------------------------------- extends


def test_a_config_extends_another_relative_to_itself(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path / "base.yaml", "seed: 1\ndata: {clients: 9, split: {name: dirichlet, alpha: 2}}\n")
    top = written(tmp_path / "deep" / "top.yaml", "extends: ../base.yaml\ndata: {split: {alpha: 5}}\nname: top\n")
    split = {"name": "dirichlet", "alpha": 5}
    assert read(top) == {"seed": 1, "name": "top", "data": {"clients": 9, "split": split}}


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"s": "iid"}, {"s": {"min_examples": 2}}, {"s": {"name": "iid", "min_examples": 2}}),
        ({"s": {"name": "a", "x": 1}}, {"s": {"name": "b"}}, {"s": {"name": "b"}}),
        ({"s": {"name": "a", "x": 1}}, {"s": {"name": "a", "y": 2}}, {"s": {"name": "a", "x": 1, "y": 2}}),
        ({"s": {"name": "a", "x": 1}}, {"s": "b"}, {"s": "b"}),
        ({"l": [1, 2]}, {"l": [3]}, {"l": [3]}),
        ({"t": {"a": 1}}, {"t": None}, {"t": None}),
    ],
)
def test_merging_keeps_parameters_only_of_the_same_component(below, above, merged):
    assert merge(below, above) == merged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: nowhere.yaml", "a.yaml: extends: {0}/nowhere.yaml: no such file"),
        ("extends: a.yaml", "a.yaml: extends: the files extend each other in a circle, got {0}/a.yaml"),
        ("extends: b.yaml", "b.yaml: extends: the files extend each other in a circle, got {0}/a.yaml"),
        ("extends: [b.yaml]", "a.yaml: extends: must be the path of a config file, got ['b.yaml']"),
        ('extends: ""', "a.yaml: extends: must be the path of a config file, got ''"),
        ("extends: .", "cannot be read: Is a directory"),
    ],
)
def test_a_bad_extends_is_refused(tmp_path, text, message):
    written(tmp_path / "b.yaml", "extends: a.yaml")
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path / "a.yaml", text))
    assert message.format(tmp_path) in str(caught.value)


def test_a_chain_of_extends_has_an_end(tmp_path):
    for n in range(20):
        written(tmp_path / f"{n}.yaml", f"extends: {n + 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"10\.yaml: extends: must be at most 10 files deep"):
        read(tmp_path / "0.yaml")


# ---------------------------------------------------------------- overrides


def test_overrides_are_dotted_keys_with_yaml_values():
    arguments = ["train.rounds=5", "data.split={name: shards, shards_per_client: 3}", "name=a=b", "data.root="]
    assert parse_overrides(arguments) == {
        "train.rounds": 5,
        "data.split": {"name": "shards", "shards_per_client": 3},
        "name": "a=b",
        "data.root": None,
    }


def test_all_malformed_overrides_are_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_overrides(["train.rounds", "seed=[1", "name=fine"])
    assert caught.value.problems == [
        "override train.rounds: must be written key.path=value",
        "override seed, line 1: expected ',' or ']', but got '<stream end>'",
    ]


@pytest.mark.parametrize("key", ["train..rounds", ".train", "train.", ".", ""])
def test_an_override_of_no_dotted_key_is_refused(key):
    with pytest.raises(ConfigError, match=r"must be a dotted key such as train\.rounds"):
        override({}, {key: 1})


def test_an_override_below_a_value_that_is_no_section_is_refused():
    with pytest.raises(ConfigError, match=r"override model.channels.0: model.channels is \[16, 32\], not a section"):
        override({"model": {"channels": [16, 32]}}, {"model.channels.0": 3})


SPLIT = {"data": {"split": {"name": "dirichlet", "alpha": 0.3, "min_examples": 2}, "clients": 4}}


@pytest.mark.parametrize(
    ("changes", "split"),
    [
        ({"data.split.alpha": 1}, {"name": "dirichlet", "alpha": 1, "min_examples": 2}),
        ({"data.split.name": "iid"}, {"name": "iid"}),
        ({"data.split.name": "dirichlet"}, {"name": "dirichlet", "alpha": 0.3, "min_examples": 2}),
        ({"data.split": {"name": "shards"}}, {"name": "shards"}),
        ({"data.split": "iid"}, "iid"),
        ({"data.split.min_examples": 3, "data.split.name": "iid"}, {"name": "iid", "min_examples": 3}),
        ({"data.split.min_examples": 3, "data.split": "iid"}, {"name": "iid", "min_examples": 3}),
    ],
)
def test_overrides_replace_leaves_and_whole_components_in_any_order(changes, split):
    assert override(SPLIT, changes) == {"data": {"split": split, "clients": 4}}
    assert override(SPLIT, dict(reversed(changes.items()))) == {"data": {"split": split, "clients": 4}}
    assert SPLIT["data"]["split"]["alpha"] == 0.3  # the config itself is not changed


def test_an_override_makes_missing_sections():
    assert override({}, {"train.optimizer.lr": 1}) == {"train": {"optimizer": {"lr": 1}}}


# ---------------------------------------------------------------- values


def test_numbers_of_numpy_paths_and_tuples_become_plain():
    problems: list[str] = []
    value = {"a": np.float64(0.5), "b": (np.int64(3), np.float32(0.25)), "c": Path("x/y"), "d": True}
    found = plain(value, "", problems)
    assert (found, problems) == ({"a": 0.5, "b": [3, 0.25], "c": "x/y", "d": True}, [])
    assert [type(v) for v in (found["a"], *found["b"])] == [float, int, float]


def test_what_yaml_cannot_hold_is_named():
    problems: list[str] = []
    plain({"model": {"x": [object, "\ud800"]}}, "", problems)
    assert problems == [
        "model.x.0: must be a number, text, true, false, null, a list or a section, got <class 'object'>",
        "model.x.1: must be text that UTF-8 can hold, got '\\ud800'",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), (1, "1"), (20.0, "20.0"), (float("-inf"), "-.inf"), (float("nan"), ".nan")],
)
def test_values_are_shown_as_yaml_has_them(value, text):
    assert as_yaml(value) == text


def test_long_values_are_cut():
    assert as_yaml("x" * 1000) == "'" + "x" * 76 + "..."
