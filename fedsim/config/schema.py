"""The config: sections, types, ranges, defaults, and the rules between keys."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from fedsim.config.components import Component, Slot

COUNTED_SPLITS = ("natural", "file")  # splits that know their own number of clients


def _count_or_all(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("count_or_all", "must be a whole number >= 1, or all")


CountOrAll = Annotated[int | Literal["all"], BeforeValidator(_count_or_all)]


class Section(BaseModel):
    """A mapping in the config. Unknown keys are errors; types are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """Examples and who holds them."""

    dataset: Annotated[Component, Slot("datasets")]
    root: Annotated[str | None, Field(description="folder of the files; null: known places")] = None
    clients: Annotated[int | None, Field(ge=1, description="client count; null where the split knows it")] = None
    split: Annotated[Component, Slot("splits")] = Field(default="iid", validate_default=True)
    test_fraction: Annotated[
        float, Field(gt=0, lt=1, description="held out where the dataset has no test set of its own")
    ] = 0.2


class ModelComponent(Component):
    """Keys that every model takes beside its own."""

    init: Annotated[Literal["default"], Field(description="how parameters start")] = "default"
    regularizers: Annotated[list[Any], Field(max_length=0, description="none in this version")] = Field(default=[])

    @classmethod
    def not_params(cls) -> frozenset[str]:
        """See ``Component.not_params``."""
        return frozenset({"name", "init", "regularizers"})


class Train(Section):
    """Rounds and what a client does in one."""

    rounds: Annotated[int, Field(ge=1)] = 20
    clients_per_round: Annotated[CountOrAll, Field(description="cohort size")] = "all"
    sampling: Annotated[
        Literal["fixed", "poisson"], Field(description="poisson: each client by itself, clients_per_round expected")
    ] = "fixed"
    local_epochs: Annotated[int, Field(ge=1)] = 1
    batch_size: Annotated[CountOrAll, Field(description="all: one step per epoch")] = 16
    optimizer: Annotated[Component, Slot("optimizers")] = Field(default="sgd", validate_default=True)
    eval_every: Annotated[int, Field(ge=1)] = 1
    target_accuracy: Annotated[
        float | None, Field(gt=0, le=1, description="summary.json then says after how many rounds it was reached")
    ] = None
    on_nan: Annotated[Literal["fail", "skip"], Field(description="when a client's training diverges")] = "fail"


class Config(Section):
    """One federation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    model: Annotated[Component, Slot("models", ModelComponent)]
    train: Train = Field(default_factory=Train)
    strategy: Annotated[Component, Slot("strategies")] = Field(default="fedavg", validate_default=True)
    pruning: None = None
    transforms: Annotated[list[Any], Field(max_length=0, description="none in this version")] = []
    transfer: None = None
    engine: Annotated[Component, Slot("engines")] = Field(default="reference", validate_default=True)
    output: Annotated[str, Field(min_length=1, description="folder of the run folders")] = "runs"


def cross_problems(get: Callable[[str], Any]) -> list[str]:
    """Problems between keys.

    Args:
        get: value at a dotted key, or None; values may be of a wrong type, which is reported elsewhere.

    Returns:
        One line per broken rule.
    """
    problems = []
    clients, cohort, split = get("data.clients"), get("train.clients_per_round"), get("data.split.name")
    if clients is None and split is not None and split not in COUNTED_SPLITS and ":" not in str(split):
        problems.append(f"data.clients: needed, the split {split} does not know how many clients there are")
    if isinstance(clients, int) and isinstance(cohort, int) and cohort > clients:
        problems.append(f"train.clients_per_round: must be <= data.clients ({clients}), got {cohort}")
    return problems
