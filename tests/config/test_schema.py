import pytest

from fedsim.config.schema import cross_problems, default_name, too_late


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data.split", "iid"),
        ("train.optimizer", "sgd"),
        ("train.schedule", "constant"),
        ("strategy", "fedavg"),
        ("model", None),
        ("data.dataset", None),
    ],
)
def test_some_components_have_a_default(path, name):
    assert default_name(path) == name


@pytest.mark.parametrize(
    ("clients", "cohort", "split", "found"),
    [
        (5, 5, "iid", []),
        (5, 6, "iid", ["train.clients_per_round: must be <= data.clients (5), got 6"]),
        (5, "all", "iid", []),
        (0, 6, "iid", []),  # the range of data.clients is said elsewhere
        (True, 6, "iid", []),
        ("5", 6, "iid", []),
        (None, 6, "natural", []),
        (None, 6, "file", []),
        (None, 6, "mine:split", []),
        (None, 6, "iid", ["data.clients: needed, the split iid does not know how many clients there are"]),
    ],
)
def test_rules_between_keys(clients, cohort, split, found):
    values = {"data": {}, "data.clients": clients, "train.clients_per_round": cohort, "data.split.name": split}
    assert cross_problems(values.get) == found


@pytest.mark.parametrize(
    ("epochs", "stopping", "count"), [(1, {}, 1), (None, {"patience": 2}, 1), (2, {}, 0), (1, None, 0), (None, None, 0)]
)
def test_early_stopping_needs_more_than_one_epoch(epochs, stopping, count):
    values = {"train.local_epochs": epochs, "train.early_stopping": stopping}
    line = "train.early_stopping: needs train.local_epochs > 1, there is but one epoch to return"
    assert cross_problems(values.get) == [line] * count


@pytest.mark.parametrize(
    ("name", "params", "rounds", "keys"),
    [
        ("lottery-ticket", {"every": 4}, 5, ""),
        ("lottery-ticket", {"every": 5}, 5, "every"),
        ("magnitude", {"start": 4, "end": None, "every": 9}, 5, ""),  # the last sparsity comes at the end, anyway
        ("magnitude", {"start": 5, "end": 6}, 5, "start end"),
        ("magnitude", {"start": True, "end": "6"}, 1, ""),  # wrong types are reported elsewhere
        ("rigl", {"every": 9}, 5, ""),
        ("thinet", {"at": 5, "end": 9}, 5, "at"),
        ("own:method", {"at": 6, "every": 7}, 6, "at"),
    ],
)
def test_rounds_of_pruning_come_before_the_last(name, params, rounds, keys):
    expected = [f"pruning.{key}: must be below train.rounds ({rounds}), got {params[key]}" for key in keys.split()]
    assert too_late(name, params, rounds) == expected
    values = {"pruning": {"name": name, **params}, "train.rounds": rounds}
    assert cross_problems(values.get) == expected
    assert cross_problems({**values, "train.rounds": "5"}.get) == []
