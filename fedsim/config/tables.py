"""Every table of components, and what fedsim itself hands to the factories of each kind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsim.data.datasets import DATASETS
from fedsim.data.sides import TWO_PARTIES
from fedsim.data.splits import SPLITS
from fedsim.engines.table import ENGINES
from fedsim.models.zoo import MODELS
from fedsim.pruning.table import PRUNING
from fedsim.strategies.strategy import STRATEGIES
from fedsim.training.optimizers import OPTIMIZERS
from fedsim.training.regularizers import REGULARIZERS
from fedsim.training.schedules import SCHEDULES
from fedsim.transforms.table import TRANSFORMS

Factory = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """One kind of component.

    path: dotted key in the config. table: YAML name -> factory.
    context: parameter names that fedsim supplies; every other parameter of a factory is a YAML key.
    many: the key holds a list of components, not one.
    """

    path: str
    table: Mapping[str, Factory]
    context: frozenset[str] = frozenset()
    many: bool = False


KINDS: dict[str, Kind] = {
    "datasets": Kind("data.dataset", {**DATASETS, **TWO_PARTIES}, frozenset({"root", "key", "progress"})),
    "splits": Kind("data.split", SPLITS, frozenset({"labels", "num_clients", "key", "columns"})),
    "models": Kind("model", MODELS, frozenset({"input_shape", "num_classes"})),
    "regularizers": Kind("model.regularizers", REGULARIZERS, many=True),
    "optimizers": Kind("train.optimizer", OPTIMIZERS),
    "schedules": Kind("train.schedule", SCHEDULES, frozenset({"rounds"})),
    "pruning": Kind("pruning", PRUNING),
    "transforms": Kind("transforms", TRANSFORMS, many=True),
    "strategies": Kind("strategy", STRATEGIES),
    "engines": Kind("engine", ENGINES),
}
