"""From a config to a federation: what foreign components may return, and what is said of those that may not."""

import itertools
import json
import sys

import pytest
import torch

import fedsim
from fedsim.config import build
from fedsim.config.load import load
from fedsim.errors import ConfigError, DataError
from fedsim.training.stopping import Stopping

FOREIGN = """
import numpy as np, torch
from torch import nn
from fedsim.strategies.strategy import fedavg
from fedsim.training.optimizers import sgd
from fedsim.engines.reference import reference

def arrays(n: int = 60): return np.arange(n * 64, dtype="f4").reshape(n, 1, 8, 8) / n / 64, np.arange(n) % 10
def tensors(*, n): x, y = arrays(n); return torch.tensor(x), torch.tensor(y)
def torch_dataset(): return torch.utils.data.TensorDataset(*tensors(n=60))
def nan(): x, y = arrays(); x[3] = np.nan; return x, y
def text(): return "text", "text"
def raises(): raise OSError("no disk")
def leaves(): raise SystemExit(2)
def nothing(): return None
class Lazy(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, i): raise RuntimeError(f"item {i}")

def every_kth(labels, num_clients): return [np.arange(k, len(labels), num_clients) for k in range(num_clients)]
def two(labels, key): return [[0, 1], torch.tensor([2, 3])]
def twice(labels): return [[0], [0]]
def far(): return [[10**6], [1]]
def halves(): return [[0.5], [1]]
def ragged(): return [[[1, 2], [3]], [4]]
def empty(): return [[], [1]]

class Net(nn.Module):
    def __init__(self, input_shape, num_classes, width=8):
        super().__init__()
        wide = nn.Linear(int(np.prod(input_shape)), width)
        self.body = nn.Sequential(nn.Flatten(), wide, nn.Linear(width, num_classes))
    def forward(self, x): return self.body(x)
class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, x): return self.layer(x.flatten(1))
class Wrong(Bare):
    def forward(self, x): return x
class Crashing(Bare):
    def __init__(self): raise KeyError("oh")
class Norm(Net):
    def __init__(self, input_shape, num_classes):
        super().__init__(input_shape, num_classes)
        self.body.append(nn.BatchNorm1d(num_classes))
class Dropping(Net):
    def __init__(self, input_shape, num_classes, rate: float = 0.0):
        super().__init__(input_shape, num_classes)
        self.rate = rate
        self.body.insert(2, nn.AlphaDropout(0.2))
        self.body.insert(1, nn.Dropout(0.1))
    def forward(self, x): return nn.functional.dropout(super().forward(x), self.rate, self.training)
class Uncopied(Bare):
    def __deepcopy__(self, memo): raise TypeError("cannot pickle 'lock' object")

def halving(rounds, *, start: float = 1.0): return lambda round: start * 0.5 ** (round / rounds)
def sized(labels, sizes: list, min_examples=1):
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
"""
NAMES = (f"foreign_built_{n}" for n in itertools.count())


@pytest.fixture
def made(valid, tmp_path, monkeypatch):
    """Build the valid config with components changed to those of a foreign module, given as {dotted key: name}."""
    monkeypatch.syspath_prepend(tmp_path)
    module = next(NAMES)
    (tmp_path / f"{module}.py").write_text(FOREIGN)

    def build_with(changes, **more):
        named = {key: f"{module}:{name}" for key, name in changes.items()}
        return build.federation(load(valid, {**named, **{k.replace("__", "."): v for k, v in more.items()}}))[0]

    yield build_with
    sys.modules.pop(module, None)


@pytest.mark.parametrize("name", ["arrays", "torch_dataset"])
def test_a_dataset_may_be_arrays_or_a_torch_dataset(made, name):
    data = made({"data.dataset": name}).data
    assert (len(data.train), len(data.test), data.num_classes) == (48, 12, 10)
    assert data.train.inputs.shape[1:] == (1, 8, 8)


def test_a_dataset_function_gets_its_parameters(made):
    data = made({"data.dataset.name": "tensors"}, data__dataset__n=40).data
    assert len(data.train) + len(data.test) == 40


def test_a_split_may_be_a_list_of_index_arrays(made):
    partition = made({"data.split": "every_kth"}).data.partition
    assert partition.num_clients == 6
    assert partition.client(2)[:3].tolist() == [2, 8, 14]


def test_a_split_may_know_its_own_number_of_clients(made):
    federation = made({"data.split": "two"}, data__clients=None, train__clients_per_round="all")
    assert federation.clients_per_round == 2


@pytest.mark.parametrize(
    ("name", "width", "entries"), [("Net", None, 64 * 8 + 8 + 90), ("Bare", None, 650), ("Net", 3, 195 + 40)]
)
def test_a_model_class_gets_what_it_asks_for(made, name, width, entries):
    more = {} if width is None else {"model__width": width}
    model = made({"model.name": name}, **more).work.model
    assert sum(parameter.numel() for parameter in model.parameters()) == entries


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_a_model_that_draws_from_torchs_generator_is_seeded_client_by_client(made, rate):
    federation = made({"model.name": "Dropping"}, model__rate=rate)
    assert federation.work.key_names == ("body.1.key", "body.3.key")
    assert federation.draws.keyed == ("body.1", "body.3")
    assert federation.draws.seeded == ("in its forward code" if rate else "")
    assert federation.work.seeded is bool(rate)


def test_models_of_ours_draw_by_keys_and_have_nothing_to_tell(valid):
    federation = build.federation(load(valid, {"model": {"name": "mlp", "dropout": 0.5}}))[0]
    assert federation.work.key_names and not federation.work.seeded
    assert federation.draws.told() == ()


def test_foreign_strategies_optimizers_and_engines_work_as_ours_do(made):
    federation = made({"strategy": "fedavg", "train.optimizer": "sgd", "engine": "reference"})
    assert federation.strategy.weighting == "examples"


def test_a_schedule_is_told_the_rounds_of_the_run(made, valid):
    ours = build.federation(load(valid, {"train.rounds": 8, "train.schedule": "linear"}))[0].work.schedule
    foreign = made({"train.schedule.name": "halving"}, train__rounds=8, train__schedule__start=3.0).work.schedule
    assert [ours(1), ours(5)] == [1.0, 0.5] and foreign(8) == 1.5
    assert build.federation(load(valid))[0].work.schedule(2) == 1.0


def test_a_warm_up_that_outlasts_the_run_is_refused_before_data_is_loaded(valid):
    changes = {"train.schedule": {"name": "cosine", "warmup": 2}, "data.root": "/nowhere"}
    with pytest.raises(ConfigError, match=r"^train\.schedule\.warmup: must be < rounds \(2\), got 2$"):
        build.federation(load(valid, changes))


class Stopped(Exception):  # noqa: N818
    """Something that goes wrong outside fedsim."""


def test_adam_with_a_cosine_is_resumed_bit_for_bit(valid, tmp_path, monkeypatch):
    def stop(record):
        if record.round == 1:
            raise Stopped

    def lines(run):
        return [{**json.loads(line), "seconds": 0} for line in (run.folder / "rounds.jsonl").read_text().splitlines()]

    def weights(run):
        return (run.folder / "model.safetensors").read_bytes()

    monkeypatch.chdir(tmp_path)
    changes = {"train.optimizer": {"name": "adam", "lr": 0.01}, "train.schedule": {"name": "cosine"}}
    whole = fedsim.run(valid, {**changes, "output": "whole"})
    with pytest.raises(Stopped):
        fedsim.run(valid, {**changes, "output": "stopped"}, on_round=stop)
    (stopped,) = (tmp_path / "stopped").iterdir()
    resumed = fedsim.resume(stopped)
    assert len(whole.rounds) == 2 and lines(resumed) == lines(whole) and weights(resumed) == weights(whole)
    flat = fedsim.run(valid, {**changes, "train.schedule": "constant", "output": "flat"})
    assert lines(flat)[0] == lines(whole)[0] and weights(flat) != weights(whole)


AN_ENGINE = "an Engine, with prepared, drive and describe"


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("data.dataset", "raises", "data.dataset.name: {} raised OSError: no disk"),
        ("data.dataset", "leaves", "data.dataset.name: {} raised SystemExit: 2"),
        ("data.dataset", "Lazy", "data.dataset.name: {} raised RuntimeError: item 0"),
        ("data.split", "nothing", "data.split.name: must make a list with the indices of each client, but {}"),
        ("data.split", "ragged", "data.split.name: {} raised ValueError: setting an array element"),
        ("model", "nothing", "model.name: must make a torch.nn.Module, but {} made NoneType"),
        ("model", "Crashing", "model.name: {} raised KeyError: 'oh'"),
        ("model", "Uncopied", "model.name: {} raised TypeError: cannot pickle 'lock' object"),
        ("model", "Wrong", "model.name: {} must return a tensor of shape (2, 10)"),
        ("strategy", "nothing", "strategy.name: must make fedsim's Strategy, but {} made NoneType"),
        ("train.optimizer", "arrays", "train.optimizer.name: must make fedsim's Optimizer, but {} made tuple"),
        ("train.schedule", "nothing", "train.schedule.name: must make a function of the round, but {} made NoneType"),
        ("engine", "nothing", f"engine.name: must make {AN_ENGINE}, but {{}} made NoneType"),
    ],
)  # fmt: skip
def test_a_foreign_component_that_fails_or_makes_the_wrong_thing_is_named(made, key, name, message):
    with pytest.raises(ConfigError) as caught:
        made({key: name})
    full = next(word.strip(",:") for word in str(caught.value).split() if word.startswith("foreign_built"))
    assert str(caught.value).startswith(message.format(full))


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("data.dataset", "nothing", "must return a fedsim Dataset, a map-style torch Dataset"),
        ("data.dataset", "text", "x"),
        ("data.dataset", "nan", "array x must be finite, got nan at index (3, 0, 0, 0)"),
        ("data.split", "two", "data.clients: the partition has 2 clients, expected 6"),
        ("data.split", "twice", "no example may be held twice"),
        ("data.split", "far", "indices must lie in [0, 1438), got 1000000"),
        ("data.split", "halves", "the indices of client 0 must be whole numbers"),
        ("data.split", "empty", "each client needs at least 1 examples, client 0 has 0"),
    ],
)
def test_foreign_data_that_breaks_a_rule_is_a_data_error(made, key, name, message):
    clients = {} if name == "two" or key == "data.dataset" else {"data__clients": None, "train__clients_per_round": 1}
    with pytest.raises(DataError) as caught:
        made({key: name}, **clients)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.root": "/nowhere"}, DataError, "data.root: folder /nowhere does not exist"),
        ({"data.clients": 10**12}, DataError, "data.clients: 1000000000000 clients but only 1438 training examples"),
        ({"data.split": {"name": "natural", "column": "role"}}, ConfigError, "data.split.column: the dataset has no"),
        ({"model": {"name": "cnn", "kernel": 4}}, ConfigError, "model.kernel: must be odd, got 4"),
        ({"model": {"name": "cnn", "hidden": 10**12}}, ConfigError, "model: cnn cannot be made: "),
        ({"model": {"name": "cnn", "hidden": 10**21}}, ConfigError, "model: cnn cannot be made: "),
        ({"model": "char-lstm"}, ConfigError, "model.name: char-lstm needs token sequences"),
    ],
)
def test_what_only_the_data_shows_is_named_by_its_key(valid, changes, error, message):
    with pytest.raises(error) as caught:
        build.federation(load(valid, changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_cohort_larger_than_a_natural_split_is_refused(valid):
    changes = {
        "data": {"dataset": {"name": "synthetic", "owners": 5}, "split": {"name": "natural", "column": "device"}},
        "data.clients": None,
        "model": "linear",
        "train.clients_per_round": 6,
    }
    rule = r"train\.clients_per_round: must be <= the number of clients of the split \(5\), got 6"
    with pytest.raises(ConfigError, match=rule):
        build.federation(load(valid, changes))


@pytest.mark.parametrize(
    ("sizes", "batch_size", "clients", "remedy"),
    [
        ([20, 33, 64], 16, "client 1", "17 would leave none"),
        ([35, 33, 18, 9], 16, "client 1", "18 would leave none"),
        ([5, 17, 33], 16, "client 1 (and 1 more)", "17 would leave none"),
        ([7, 3, 4], 1, "client 0 (and 2 more)", "4 would leave none"),
        (
            [9, 1, 17],
            16,
            "client 1 (and 1 more)",
            "each client needs at least two examples (data.split.min_examples)",
        ),
        ([9, 1, 4], "all", "client 1", "each client needs at least two examples (data.split.min_examples)"),
    ],
)
def test_a_last_batch_of_one_example_is_refused_where_the_model_cannot_be_trained_on_it(
    made, sizes, batch_size, clients, remedy
):
    more = {"data__clients": None, "train__clients_per_round": 1, "train__batch_size": batch_size}
    split = {"data__split__sizes": sizes, "data__split__min_examples": 1}
    with pytest.raises(ConfigError) as caught:
        made({"data.split.name": "sized", "model": "Norm"}, **more, **split)
    rule, _, rest = str(caught.value).partition(" a last batch of one example, but ")
    assert rule == f"train.batch_size: {batch_size} leaves {clients}"
    assert ":Norm failed on inputs of shape (1, 1, 8, 8), torch.float32: Expected more than 1 value per" in rest
    assert rest.endswith(f"; {remedy}")
    made({"data.split.name": "sized", "model": "Net"}, **more, **split)


def test_batch_norm_is_fine_where_no_last_batch_has_one_example(made):
    more = {"data__clients": None, "train__clients_per_round": 1, "train__batch_size": 16}
    made({"data.split.name": "sized", "model": "Norm"}, **more, data__split__sizes=[18, 2, 15, 64])


def test_a_client_without_examples_is_refused_whatever_a_custom_split_calls_its_minimum(made):
    more = {"data__clients": None, "train__clients_per_round": 1}
    with pytest.raises(DataError, match="each client needs at least 1 examples, client 1 has 0"):
        made({"data.split.name": "sized"}, **more, data__split__sizes=[3, 0], data__split__min_examples=0)


def test_building_does_not_touch_torchs_generator(valid):
    before = torch.get_rng_state()
    first, second = (build.federation(load(valid))[0].work.model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build.federation(load(valid, {"seed": 4}))[0].work.model.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_clipping_and_early_stopping_are_handed_to_the_clients(valid):
    work = build.federation(load(valid))[0].work
    assert work.max_grad_norm is None and work.stopping is None
    changes = {"train.local_epochs": 3, "train.max_grad_norm": 2, "train.early_stopping": {"patience": 4}}
    work = build.federation(load(valid, changes | {"train.early_stopping.min_delta": 0.5}))[0].work
    assert work.max_grad_norm == 2.0 and work.stopping == Stopping(4, 0.5, 0.1)


def test_last_batches_are_counted_without_what_is_held_out(made):
    """18 examples make batches of 16 and 2; of 17 that are left when a tenth is held out, the last has one."""
    more = {"data__clients": None, "train__clients_per_round": 1, "train__batch_size": 16, "train__local_epochs": 2}
    model = {"data.split.name": "sized", "model": "Norm"}
    made(model, **more, data__split__sizes=[18, 2])
    with pytest.raises(ConfigError, match=r"train.batch_size: 16 leaves client 0 a last batch of one example"):
        made(model, **more, data__split__sizes=[18, 2], train__early_stopping={"validation": 0.1})
