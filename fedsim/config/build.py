"""From a checked config to a federation and an engine: load data, split it, build the model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from torch import Tensor, nn

from fedsim import rng
from fedsim.config import components, pruned
from fedsim.config.components import is_foreign
from fedsim.config.last_batches import check_last_batches
from fedsim.config.load import components_at
from fedsim.config.making import blamed_on, make, of_type, wrong
from fedsim.config.schema import Config
from fedsim.config.tables import KINDS
from fedsim.data import download
from fedsim.data.checks import check
from fedsim.data.custom import from_callable
from fedsim.data.federated import FederatedData, assemble, hold_out
from fedsim.data.partition_files import check as check_partition
from fedsim.data.partition_files import from_lists
from fedsim.data.sides import Sides
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, DataError
from fedsim.federation import Federation
from fedsim.models import batch_norm
from fedsim.models.drawing import Draws
from fedsim.models.fixup import fixup, scalar_rates
from fedsim.models.layers.dropouts import replace_dropout
from fedsim.models.layers.keyed import key_names, progress_names
from fedsim.models.zoo import check_model
from fedsim.params import of
from fedsim.pruning.pruning import Pruning
from fedsim.records import Dataset, Params, Partition
from fedsim.strategies.strategy import Strategy
from fedsim.training.client import LocalWork
from fedsim.training.objective import Objective
from fedsim.training.optimizers import Optimizer
from fedsim.training.regularizers import Regularizer, bind
from fedsim.training.scaled import scaled
from fedsim.training.schedules import Schedule
from fedsim.training.stopping import Stopping
from fedsim.transforms.transform import Compression, Transform, compose

T = TypeVar("T")
Progress: TypeAlias = download.Progress
silent = download.silent


@dataclass(frozen=True)
class ModelShape:
    """What a model factory must know of the data; enough to build the model again without it."""

    input_shape: tuple[int, ...]
    num_classes: int


def dataset(config: Config, progress: Progress = silent) -> Dataset:
    """Load the dataset, with a held-out test set.

    Raises:
        DataError: files are missing or damaged, or the data breaks a rule.
    """
    if config.transfer is not None:
        rule = "this is of federations of clients; fedsim run, sweep and transfer-party do a transfer"
        raise ConfigError(f"transfer: {rule}")
    found = dataset_or_sides(config, progress)
    if isinstance(found, Sides):
        name = config.data.dataset.name
        raise ConfigError(f"data.dataset.name: {name} is of two parties; it needs a transfer section")
    return found


def dataset_or_sides(config: Config, progress: Progress = silent) -> Dataset | Sides:
    """Load the dataset, with a held-out test set, or the tables of two parties.

    Raises:
        DataError: files are missing or damaged, or the data breaks a rule.
    """
    root = None if config.data.root is None else Path(config.data.root).expanduser()
    if root is not None and not root.is_dir():
        raise DataError(f"data.root: folder {root} does not exist")
    found = make(config, "datasets", root=root, key=rng.fold(data_seed(config), "dataset"), progress=progress)
    component = config.data.dataset
    if isinstance(found, Sides):
        return found
    if is_foreign(component.name):
        with blamed_on("data.dataset", component):  # its __getitem__ is foreign, too
            found = from_callable(found, component.name)
    check(found)
    return hold_out(found, config.data.test_fraction, rng.fold(data_seed(config), "held-out"))


def partition(config: Config, loaded: Dataset) -> Partition:
    """Split the training examples over the clients.

    Raises:
        DataError: the split cannot be made with these examples, or a custom one breaks a rule.
    """
    labels, clients = loaded.train.labels, config.data.clients
    key = rng.fold(data_seed(config), "split")
    made = make(config, "splits", labels=labels, num_clients=clients, key=key, columns=loaded.columns)
    component = config.data.split
    with blamed_on("data.split", component):
        if isinstance(made, list | tuple):
            made = from_lists(made)
        found = of_type(Partition, made, "data.split", component, "a list with the indices of each client")
        check_partition(found, len(loaded.train), clients, max(component.params().get("min_examples", 1), 1))
    return found


def model(config: Config, shape: ModelShape) -> nn.Module:
    """Build the model; its parameters are drawn from the run's key, not from torch's global generator.

    torch's own dropout layers are replaced by keyed ones, and regularisers have their layers in it.

    Raises:
        ConfigError: it cannot be built.
    """
    return made_model(config, shape, None, pruned.pruning(config)).model


class Made(NamedTuple):
    """A model, what is minimised with it, and what it draws."""

    model: nn.Module
    objective: Objective
    draws: Draws


def made_model(
    config: Config, shape: ModelShape, example: Tensor | None, pruning: Pruning | None, key: int | None = None
) -> Made:
    """Build the model, and try it on an example input if there is one; what it draws is known only then.

    key: from which the first parameters are drawn; None: the run's.
    """
    name, key = config.model.name, rng.fold(config.seed, "model") if key is None else key
    with rng.torch_seeded(key):
        made = make(config, "models", input_shape=shape.input_shape, num_classes=shape.num_classes)
    found = of_type(nn.Module, made, "model", config.model, "a torch.nn.Module")
    with blamed_on("model", config.model):
        _initialised(config, found, rng.fold(key, "init"))
        keyed, seeded = replace_dropout(found), ""
    if config.train.batch_norm == "freeze":
        with _blamed_for_batch_norm("freeze"):
            batch_norm.freeze(found)
    objective = _regularized(config, found, rng.fold(key, "regularizers"))
    if pruning is not None:
        assert config.pruning is not None  # which it was made of
        with blamed_on("pruning", config.pruning), rng.torch_seeded(rng.fold(key, "pruning")):
            objective = pruning.bind(found, objective)
            pruning.check(found, shape.input_shape)
    with blamed_on("model", config.model):
        if example is not None:
            seeded = check_model(found, shape.input_shape, shape.num_classes, example, name=name)
    return Made(found, objective, Draws(keyed, seeded))


def _initialised(config: Config, made: nn.Module, key: int) -> None:
    """Change how the parameters start, and what there are of them, as the config says.

    Raises:
        ValueError: the model has no place for it.
    """
    component = config.model
    if isinstance(component, components.ModelComponent) and component.init == "fixup":
        with rng.torch_seeded(key):
            fixup(made)


def _regularized(config: Config, built: nn.Module, key: int) -> Objective:
    """Bind the regularisers to the model, one by one, so that each is blamed for what it refuses.

    Raises:
        ConfigError: one cannot be made, or the model has no place for it.
    """
    kind = KINDS["regularizers"]
    listed = components_at(config, kind)

    def blamed(number: int) -> AbstractContextManager[None]:
        return blamed_on(f"{kind.path}.{number}", listed[number])

    return bind(built, _all_made(config, "regularizers", Regularizer), key, blamed=blamed)


def _all_made(config: Config, kind: str, wanted: type[T]) -> list[T]:
    """What the components of a list make, each blamed for what it refuses."""
    slot, made = KINDS[kind], []
    for number, component in enumerate(components_at(config, slot)):
        path = f"{slot.path}.{number}"
        with blamed_on(path, component):
            one = components.call(components.factory_of(component.name, slot), component, slot)
            made.append(of_type(wanted, one, path, component))
    return made


def _compression(config: Config) -> Compression | None:
    try:
        return compose(_all_made(config, "transforms", Transform))
    except ValueError as error:
        raise ConfigError(f"transforms: {error}") from error


def data_seed(config: Config) -> int:
    """Of whatever is drawn of the data."""
    return config.seed if config.data.seed is None else config.data.seed


def shape_of(data: FederatedData) -> ModelShape:
    """What a model must fit."""
    return ModelShape(tuple(data.train.inputs.shape[1:]), data.num_classes)


def federated_data(config: Config, progress: Progress = silent) -> FederatedData:
    """Load, hold out, split, and give each client its part."""
    loaded = dataset(config, progress)
    return assemble(loaded, partition(config, loaded), rng.fold(data_seed(config), "feature-noise"))


def federation(config: Config, progress: Progress = silent) -> tuple[Federation, Engine]:
    """Everything a run needs.

    Raises:
        ConfigError: something in the config cannot be built.
        DataError: the data is missing, damaged or does not fit the config.
    """
    strategy, optimizer, schedule, engine, pruning = _without_data(config)
    compression = _compression(config)
    data = federated_data(config, progress)
    train = config.train
    cohort = data.num_clients if train.clients_per_round == "all" else train.clients_per_round
    if cohort > data.num_clients:
        rule = f"must be <= the number of clients of the split ({data.num_clients})"
        raise ConfigError(f"train.clients_per_round: {rule}, got {cohort}")
    built, objective, draws = made_model(config, shape_of(data), data.train.inputs[0], pruning)
    pooled, kept = _batch_norms(config, data, built, strategy)
    work = LocalWork(
        model=built,
        key_names=key_names(built),
        optimizer=scaled(optimizer, scalar_rates(built)),
        rule=strategy.local,
        local_epochs=train.local_epochs,
        batch_size=None if train.batch_size == "all" else train.batch_size,
        schedule=schedule,
        seeded=bool(draws.seeded),
        objective=objective,
        progress_names=progress_names(built),
        rounds=train.rounds,
        kept=kept,
        max_grad_norm=train.max_grad_norm,
        stopping=_stopping(config),
        tickets=pruned.tickets(config, data, pruning),
    )
    check_last_batches(config, data, built, work.validation)
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
        draws=draws,
        pooled=pooled,
        pruning=pruning,
        fresh=partial(_fresh, config, shape_of(data)),
        compression=compression,
    )
    return made, engine


def _fresh(config: Config, shape: ModelShape, key: int) -> tuple[Params, Params]:
    """First parameters and buffers as another seed would have them."""
    return of(made_model(config, shape, None, pruned.pruning(config), key=key).model)


def _batch_norms(
    config: Config, data: FederatedData, built: nn.Module, strategy: Strategy
) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """What the federation pools of batch norm, and what stays with clients.

    Raises:
        ConfigError: the policy cannot be followed with this model, strategy or data.
    """
    policy = config.train.batch_norm
    with _blamed_for_batch_norm(policy):
        if policy == "pooled":
            if not strategy.aggregator.linear:
                raise ValueError(f"needs a strategy that takes means, which {config.strategy.name} does not")
            return batch_norm.statistics(built), ()
        if policy == "local":
            if not len(data.test_partition.indices):
                raise ValueError(
                    "needs clients with held-out examples: there is no model to test but each client's own"
                )
            return (), batch_norm.tensors(built)
    return (), ()


@contextmanager
def _blamed_for_batch_norm(policy: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"train.batch_norm: {policy} {error}") from error


def _stopping(config: Config) -> Stopping | None:
    asked = config.train.early_stopping
    return None if asked is None else Stopping(asked.patience, asked.min_delta, asked.validation)


def _without_data(config: Config) -> tuple[Strategy, Optimizer, Schedule, Engine, Pruning | None]:
    """What can be made, and refused, before any data is loaded."""
    strategy = of_type(Strategy, make(config, "strategies"), "strategy", config.strategy)
    optimizer = of_type(Optimizer, make(config, "optimizers"), "train.optimizer", config.train.optimizer)
    schedule: Schedule = make(config, "schedules", rounds=config.train.rounds)
    if not callable(schedule):
        raise wrong(schedule, "train.schedule", config.train.schedule, "a function of the round")
    engine = make(config, "engines")
    if not all(callable(getattr(engine, method, None)) for method in ("prepared", "drive", "describe")):
        raise wrong(engine, "engine", config.engine, "an Engine, with prepared, drive and describe")
    pruning = pruned.pruning(config)
    if pruning is not None and pruning.tickets is not None:
        pruned.check_tickets(config, strategy)
    if pruning is not None and pruning.removes:
        pruned.check_removal(config)
    return strategy, optimizer, schedule, engine, pruning
