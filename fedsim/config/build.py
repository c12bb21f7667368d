"""From a checked config to a federation and an engine: load data, split it, build the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedsim import rng
from fedsim.config import components
from fedsim.config.load import component_at
from fedsim.config.schema import Config
from fedsim.config.tables import KINDS
from fedsim.data.checks import check
from fedsim.data.custom import from_callable
from fedsim.data.federated import FederatedData, assemble, hold_out
from fedsim.data.partition_files import check as check_partition
from fedsim.data.partition_files import from_lists
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.federation import Federation
from fedsim.models.layers.dropouts import replace_dropout
from fedsim.models.layers.keyed import key_names
from fedsim.models.zoo import check_model
from fedsim.records import Dataset, Partition
from fedsim.training.client import LocalWork

Progress = Callable[[str, int, int | None], None]


def silent(name: str, done: int, total: int | None) -> None:
    """Progress that goes nowhere."""


@dataclass(frozen=True)
class ModelShape:
    """What a model factory must know of the data; enough to build the model again without it."""

    input_shape: tuple[int, ...]
    num_classes: int


def make(config: Config, kind: str, **context: Any) -> Any:
    """Call the factory of the component of this kind; its ValueError becomes a ConfigError at its dotted key.

    Raises:
        ConfigError: the factory refuses a value.
        FedsimError: whatever else it says itself.
    """
    slot = KINDS[kind]
    component = component_at(config, slot.path)
    with _blamed_on(slot.path if kind != "models" else "model", component.name):
        return components.call(components.factory_of(component, slot), component, slot, **context)


@contextmanager
def _blamed_on(path: str, name: str) -> Iterator[None]:
    try:
        yield
    except FedsimError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(path) else f"{path}: {text}") from error
    except Exception as error:
        if ":" not in name:
            raise  # a fault of ours, not of somebody else's component
        raise ConfigError(f"{path}.name: {name} raised {type(error).__name__}: {error}") from error


def dataset(config: Config, progress: Progress = silent) -> Dataset:
    """Load the dataset, with a held-out test set.

    Raises:
        DataError: files are missing or damaged, or the data breaks a rule.
    """
    root = None if config.data.root is None else Path(config.data.root).expanduser()
    if root is not None and not root.is_dir():
        raise DataError(f"data.root: folder {root} does not exist")
    loaded = make(config, "datasets", root=root, key=rng.fold(config.seed, "dataset"), progress=progress)
    name = config.data.dataset.name
    found = from_callable(loaded, name) if ":" in name else loaded
    check(found)
    return hold_out(found, config.data.test_fraction, rng.fold(config.seed, "held-out"))


def partition(config: Config, loaded: Dataset) -> Partition:
    """Split the training examples over the clients.

    Raises:
        DataError: the split cannot be made with these examples, or a custom one breaks a rule.
    """
    labels, clients = loaded.train.labels, config.data.clients
    key = rng.fold(config.seed, "split")
    made = make(config, "splits", labels=labels, num_clients=clients, key=key, columns=loaded.columns)
    if isinstance(made, list | tuple):
        made = from_lists(made)
    if not isinstance(made, Partition):
        raise DataError(f"data.split: {config.data.split.name} returned {type(made).__name__}, not a Partition")
    minimum = config.data.split.params().get("min_examples", 1)
    check_partition(made, len(loaded.train), clients, minimum)
    return made


def model(config: Config, shape: ModelShape, example: Tensor | None = None) -> nn.Module:
    """Build the model; its parameters are drawn from the run's key, not from torch's global generator.

    torch's own dropout layers are replaced by keyed ones. With an example input the model is tried on it.

    Raises:
        ConfigError: it cannot be built, or not be trained here.
    """
    with rng.torch_seeded(rng.fold(config.seed, "model")):
        made = make(config, "models", input_shape=shape.input_shape, num_classes=shape.num_classes)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"model.name: {config.model.name} returned {type(made).__name__}, not a torch.nn.Module")
    replace_dropout(made)
    if example is not None:
        check_model(made, shape.input_shape, shape.num_classes, example, name=config.model.name)
    return made


def shape_of(data: FederatedData) -> ModelShape:
    """What a model must fit."""
    return ModelShape(tuple(data.train.inputs.shape[1:]), data.num_classes)


def federated_data(config: Config, progress: Progress = silent) -> FederatedData:
    """Load, hold out, split, and give each client its part."""
    loaded = dataset(config, progress)
    return assemble(loaded, partition(config, loaded), rng.fold(config.seed, "feature-noise"))


def federation(config: Config, progress: Progress = silent) -> tuple[Federation, Engine]:
    """Everything a run needs.

    Raises:
        ConfigError: something in the config cannot be built.
        DataError: the data is missing, damaged or does not fit the config.
    """
    data = federated_data(config, progress)
    train = config.train
    cohort = data.num_clients if train.clients_per_round == "all" else train.clients_per_round
    if cohort > data.num_clients:
        rule = f"must be <= the number of clients of the split ({data.num_clients})"
        raise ConfigError(f"train.clients_per_round: {rule}, got {cohort}")
    built = model(config, shape_of(data), data.train.inputs[0])
    strategy = make(config, "strategies")
    work = LocalWork(
        model=built,
        key_names=key_names(built),
        optimizer=make(config, "optimizers"),
        rule=strategy.local,
        local_epochs=train.local_epochs,
        batch_size=None if train.batch_size == "all" else train.batch_size,
    )
    made = Federation(
        seed=config.seed,
        data=data,
        work=work,
        strategy=strategy,
        rounds=train.rounds,
        clients_per_round=cohort,
        sampling=train.sampling,
        eval_every=train.eval_every,
        on_nan=train.on_nan,
    )
    return made, make(config, "engines")
