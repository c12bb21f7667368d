import pytest

from fedsim.config.load import check
from fedsim.errors import ConfigError

UNKNOWN = [
    ("data.split.alhpa", "data.split.alhpa: unknown key (did you mean alpha?)"),
    ("strateggy", "strateggy: unknown key (did you mean strategy?)"),
    ("train.round", "train.round: unknown key (did you mean rounds?)"),
    ("rounds", "rounds: unknown key (did you mean train.rounds?)"),
    ("data.rounds", "data.rounds: unknown key (did you mean train.rounds?)"),
    ("train.lr", "train.lr: unknown key (did you mean train.optimizer.lr?)"),
    ("model.hiden", "model.hiden: unknown key (did you mean hidden?)"),
    ("train.schedule.warm_up", "train.schedule.warm_up: unknown key (did you mean warmup?)"),
    ("train.warmup", "train.warmup: unknown key (did you mean train.schedule.warmup?)"),
    ("train.optimizer.momentun", "train.optimizer.momentun: unknown key (did you mean momentum?)"),
    ("data.dataset.zzz", "data.dataset.zzz: unknown key; known: none"),
    ("engine.worker", "engine.worker: unknown key (did you mean workers?)"),
    ("strategy.zzz", "strategy.zzz: unknown key; known: weighting, server_lr"),
    ("extends", "extends: only a file can extend another one"),
    ("nosuch.key", "nosuch: unknown key; known: name, seed, data, model, train, strategy"),
    ("données", "données: unknown key; known: name"),
]


@pytest.mark.parametrize(("key", "message"), UNKNOWN)
def test_an_unknown_key_is_named_with_the_nearest_known_one(problems, key, message):
    (line,) = problems({key: 1})
    assert line.startswith(message)


WRONG = [
    ("seed", True, "must be a whole number, got true"),
    ("seed", 1.5, "must be a whole number, got 1.5"),
    ("seed", -1, "must be >= 0, got -1"),
    ("seed", 2**63, "must be < 9223372036854775808, got 9223372036854775808"),
    ("name", "a/b", "must be letters, digits, . _ and -, a letter or digit first, at most 100, got 'a/b'"),
    ("name", "..", "must be letters, digits, . _ and -, a letter or digit first, at most 100, got '..'"),
    ("name", "a" * 101, "must be letters, digits, . _ and -, a letter or digit first, at most 100, got 'aaa"),
    ("name", "ü", "must be letters, digits, . _ and -, a letter or digit first, at most 100, got 'ü'"),
    ("name", "a\n", "must be letters, digits, . _ and -, a letter or digit first, at most 100, got 'a\\n'"),
    ("name", 5, "must be text, got 5"),
    ("output", "", "must be a folder, got ''"),
    ("output", "a\0b", "must be a folder, got 'a\\x00b'"),
    ("output", "~nobody-of-this-name/x", "must be a folder; there is no such home folder, got '~nobody"),
    ("data", None, "must be a section of keys and values, got null"),
    ("data", [], "must be a section of keys and values, got []"),
    ("data.root", 5, "must be text, got 5"),
    ("data.clients", 20.0, "must be a whole number, got 20.0"),
    ("data.clients", "20", "must be a whole number, got '20'"),
    ("data.clients", 0, "must be >= 1, got 0"),
    ("data.clients", None, "needed, the split dirichlet does not know how many clients there are"),
    ("data.test_fraction", 1, "must be < 1, got 1"),
    ("data.split.alpha", "x", "must be a number, got 'x'"),
    ("data.split", [], "must be a name, or a section with a name and its parameters, got []"),
    ("data.split", None, "must be a name, or a section with a name and its parameters, got null"),
    ("data.dataset", 5, "must be a name, or a section with a name and its parameters, got 5"),
    ("model.hidden", [8, "a"], "hidden.1: must be a whole number, got 'a'"),
    ("model.hidden", [0], "hidden.0: must be > 0, got 0"),
    ("model.hidden", 8, "must be a list, got 8"),
    ("model.init", "x", "must be 'default' or 'fixup', got 'x'"),
    ("model.regularizers", [1], "must be a name, or a section with a name and its parameters, got 1"),
    ("train", None, "must be a section of keys and values, got null"),
    ("train.rounds", None, "must be a whole number, got null"),
    ("train.rounds", 0, "must be >= 1, got 0"),
    ("train.batch_size", 0, "must be a whole number >= 1, or all, got 0"),
    ("train.batch_size", True, "must be a whole number >= 1, or all, got true"),
    ("train.clients_per_round", 2.0, "must be a whole number >= 1, or all, got 2.0"),
    ("train.clients_per_round", 7, "must be <= data.clients (6), got 7"),
    ("train.optimizer.lr", float("nan"), "must be a finite number, got .nan"),
    ("train.optimizer.lr", float("inf"), "must be a finite number, got .inf"),
    ("train.optimizer.lr", "0.1", "must be a number, got '0.1'"),
    ("train.optimizer.lr", 0, "must be > 0, got 0"),
    ("train.optimizer.lr", 10**400, "must be a number, got 1000"),
    ("train.target_accuracy", 90, "must be <= 1, got 90"),
    ("train.sampling", "foo", "must be 'fixed' or 'poisson', got 'foo'"),
    ("train.optimizer", {"name": "adam", "beta2": 1}, "beta2: must be < 1, got 1"),
    ("train.schedule", {"name": "exponential", "gamma": 1.5}, "gamma: must be <= 1, got 1.5"),
    ("train.schedule.warmup", -1, "must be >= 0, got -1"),
    ("train.optimizer.nesterov", True, "needs momentum > 0, got momentum 0"),
    ("strategy.server_lr", -1, "must be > 0, got -1"),
    ("engine.workers", 0, "must be >= 1 or 'auto', got 0"),
    ("engine.workers", "all", "must be a whole number or 'auto', got 'all'"),
    ("engine", {"name": "local", "workers": 0}, "workers: must be >= 1 or 'auto', got 0"),
    ("engine.mode", "fast", "must be 'auto', 'sequential', 'vectorised' or 'fused', got 'fast'"),
    ("pruning", {"name": "x"}, "unknown name 'x'"),
    ("pruning", {"name": "lottery-ticket", "rate": 1.0}, "must be < 1"),
    ("pruning", {"name": "lottery-ticket", "every": 1, "rewind": 1}, "must be below every (1), got 1"),
    ("pruning", {"name": "lottery-ticket", "every": 2}, "pruning.every: must be below train.rounds (2), got 2"),
    ("pruning", {"name": "magnitude", "end": 2}, "pruning.end: must be below train.rounds (2), got 2"),
    ("pruning", {"name": "l1-filter", "at": 3}, "pruning.at: must be below train.rounds (2), got 3"),
    ("pruning", {"name": "magnitude", "spasity": 0.5}, "pruning.spasity: unknown key (did you mean sparsity?)"),
    ("pruning", {"rate": 0.3}, "pruning.name: "),
    ("pruning", "lotery-ticket", "pruning.name: unknown name 'lotery-ticket' (did you mean lottery-ticket?)"),
    ("transforms", ["clip"], "transforms.0.name: unknown name 'clip'"),
    ("transforms", [{"name": "top-k", "fraction": 0}], "transforms.0.fraction: must be > 0, got 0"),
    ("transforms", ["half", {"name": "quantise", "bits": 5}], "transforms.1.bits: must be 8 or 4, got 5"),
    ("transforms", None, "must be a list, got null"),
    ("transfer", 1, "must be a section of keys and values, got 1"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_wrong_value_is_named_with_key_rule_and_value(problems, key, value, message):
    (line,) = problems({key: value})
    assert line.startswith(key)
    assert message in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.split": "dirichlett"}, "data.split.name: unknown name 'dirichlett' (did you mean dirichlet?); known:"),
        ({"data.dataset": "digit"}, "data.dataset.name: unknown name 'digit' (did you mean digits?); known: digits, "),
        ({"data.split.name": 5}, "data.split.name: unknown name 5; known: iid, "),
        ({"strategy": "zzz"}, "strategy.name: unknown name 'zzz'; known: fedavg, or package.module:name"),
        ({"train.optimizer": "zzz"}, "train.optimizer.name: unknown name 'zzz'; known: sgd, adam, adamw, or"),
        ({"train.schedule": "cosin"}, "train.schedule.name: unknown name 'cosin' (did you mean cosine?)"),
        ({"train.schedule": "step"}, "train.schedule.every: needed, but not given"),
        ({"engine": "refrence"}, "engine.name: unknown name 'refrence' (did you mean reference?); known: "),
        ({"data.dataset": {"name": "npz"}}, "data.dataset.path: needed, but not given"),
        ({"data.split.name": "natural"}, "data.split.column: needed, but not given"),
    ],
)  # fmt: skip
def test_a_component_that_is_not_there_is_answered_with_those_that_are(problems, changes, message):
    (line,) = problems(changes)
    assert line.startswith(message)


def test_all_problems_are_reported_at_once(problems):
    changes = {
        "seed": -1, "train.rounds": 0, "train.clients_per_round": 30, "data.split.alhpa": 3, "strateggy": 1,
        "model": "nowhere_to_be_found:Net", "train.optimizer.nesterov": True, "engine": "warp",
    }  # fmt: skip
    assert [line.split(":")[0] for line in problems(changes)] == [
        "seed", "data.split.alhpa", "train.rounds", "engine.name", "strateggy", "model.name",
        "train.optimizer.nesterov", "train.clients_per_round",
    ]  # fmt: skip


def test_an_empty_config_needs_data_and_a_model():
    with pytest.raises(ConfigError) as caught:
        check({"data": {}, "model": None})
    assert [line.partition(": ")[0] for line in caught.value.problems] == ["data.dataset", "model", "data.clients"]


def test_a_component_without_a_name_is_answered_with_those_there_are():
    with pytest.raises(ConfigError) as caught:
        check({"data": {"dataset": "digits", "clients": 2, "split": {"alpha": 1}}, "model": {}})
    assert caught.value.problems[0].startswith("data.split.name: needed, but not given; known: iid, dirichlet, ")
    assert caught.value.problems[1].startswith("model.name: needed, but not given; known: linear, mlp, ")


def test_a_key_that_is_called_like_its_component_does_not_confuse_the_path(problems):
    lines = problems({"data.split": {"name": "iid", "iid": 3, "min_examples": -1}})
    assert [line.split(":")[0] for line in lines] == ["data.split.min_examples", "data.split.iid"]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("max_grad_norm", 0, "max_grad_norm: must be > 0, got 0"),
        ("early_stopping", 3, "early_stopping: must be a section of keys and values, got 3"),
        ("early_stopping.patience", 0, "early_stopping.patience: must be >= 1, got 0"),
        ("early_stopping.min_delta", -0.1, "early_stopping.min_delta: must be >= 0, got -0.1"),
        ("early_stopping.validation", 1.0, "early_stopping.validation: must be < 1, got 1.0"),
        ("early_stopping.wait", 1, "early_stopping.wait: unknown key; known: patience, min_delta, validation"),
        ("patience", 1, "patience: unknown key (did you mean train.early_stopping.patience?)"),
    ],
)
def test_how_a_client_trains_may_be_wrong(problems, key, value, line):
    assert problems({"train.local_epochs": 3, f"train.{key}": value}) == [f"train.{line}"]
