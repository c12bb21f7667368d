"""The config: sections, types, ranges, defaults, and the rules between keys."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from fedsim.config.components import Component, Slot, Transforms

COUNTED_SPLITS = ("natural", "file")  # splits that know their own number of clients


def _count_or_all(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("count_or_all", "must be a whole number >= 1, or all")


CountOrAll = Annotated[Annotated[int, Field(ge=1)] | Literal["all"], BeforeValidator(_count_or_all)]


_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"


def _folder_name(value: str) -> str:
    if re.fullmatch(_NAME, value):
        return value
    raise PydanticCustomError("folder_name", "must be letters, digits, . _ and -, a letter or digit first, at most 100")


FolderName = Annotated[str, AfterValidator(_folder_name), Field(json_schema_extra={"pattern": _NAME})]


def _folder(value: str) -> str:
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise PydanticCustomError("folder", "must be a folder; there is no such home folder") from error
    if not value or "\0" in value:
        raise PydanticCustomError("folder", "must be a folder")
    return value


Folder = Annotated[str, AfterValidator(_folder)]


class Section(BaseModel):
    """A mapping in the config. Unknown keys are errors; types are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """Examples and who holds them."""

    dataset: Annotated[Component, Slot("datasets")]
    root: Annotated[Folder | None, Field(description="folder of the files; null: known places")] = None
    clients: Annotated[int | None, Field(ge=1, description="client count; null where the split knows it")] = None
    split: Annotated[Component, Slot("splits")] = Field(default="iid", validate_default=True)
    test_fraction: Annotated[
        float, Field(gt=0, lt=1, description="held out where the dataset has no test set of its own")
    ] = 0.2
    seed: Annotated[
        int | None, Field(ge=0, lt=2**63, description="of split and held-out part; null: the run's seed")
    ] = None


class EarlyStopping(Section):
    """When a client stops its local training, and goes back to its best epoch."""

    patience: Annotated[int, Field(ge=1, description="epochs without improvement")] = 1
    min_delta: Annotated[float, Field(ge=0, description="the loss must fall by more to count as improved")] = 0.0
    validation: Annotated[
        float, Field(ge=0, lt=1, description="share of a client's examples held out to judge by; 0: its training loss")
    ] = 0.1


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
    schedule: Annotated[Component, Slot("schedules")] = Field(default="constant", validate_default=True)
    max_grad_norm: Annotated[
        float | None, Field(gt=0, description="gradients are scaled to this norm where they are longer; null: never")
    ] = None
    early_stopping: EarlyStopping | None = None
    eval_every: Annotated[int, Field(ge=1)] = 1
    target_accuracy: Annotated[
        float | None,
        Field(gt=0, le=1, description="summary.json then says after how many rounds, interpolated; the run goes on"),
    ] = None
    on_nan: Annotated[Literal["fail", "skip"], Field(description="when a client's training diverges")] = "fail"
    batch_norm: Annotated[
        Literal["average", "pooled", "local", "freeze"],
        Field(description="statistics averaged; variances pooled exactly; all kept by each client (FedBN); frozen"),
    ] = "average"


class Transfer(Section):
    """Two parties instead of clients: one with labels, one without, other features, a few common people."""

    protocol: Annotated[
        Literal["plain", "paillier", "secret-sharing"], Field(description="how they multiply; plain hides nothing")
    ] = "paillier"
    loss: Annotated[Literal["taylor", "exact"], Field(description="logistic loss; exact only in plain")] = "taylor"
    alignment: Annotated[
        Literal["distance", "inner-product"], Field(description="what pulls hidden values of one person together")
    ] = "distance"
    gamma: Annotated[float, Field(ge=0, description="weight of the alignment")] = 0.01
    l2: Annotated[float, Field(ge=0, description="weight of the parameters' squares, over 2")] = 0.001
    overlap: Annotated[CountOrAll, Field(description="common rows that train")] = 200
    labelled: Annotated[CountOrAll, Field(description="of these, with label")] = 100
    hidden: Annotated[int, Field(ge=1, le=1024, description="hidden values of a row, at both parties")] = 16
    trains: Annotated[Literal["all", "head"], Field(description="head: only the last layer")] = "all"
    iterations: Annotated[int, Field(ge=1)] = 50
    tolerance: Annotated[float | None, Field(ge=0, description="ends when the loss falls by no more")] = None
    key_bits: Annotated[Literal[1024, 2048, 3072], Field(description="of Paillier keys")] = 2048
    insecure: Annotated[bool, Field(description="allows key_bits 1024, for tests")] = False
    triples: Annotated[
        Literal["helper", "paillier"], Field(description="who makes those of secret-sharing: a third party, or the two")
    ] = "helper"
    share: Annotated[float, Field(gt=0, lt=1, description="of a dataset's columns that party A has")] = 0.5
    positive: Annotated[
        list[Annotated[int, Field(ge=0)]] | None, Field(description="classes that count as +1; null: the upper half")
    ] = None
    source_run: Annotated[Folder | None, Field(description="finished run that party A's net starts from")] = None


class Config(Section):
    """One federation."""

    name: FolderName = "run"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: Data
    model: Annotated[Component, Slot("models")]
    train: Train = Field(default_factory=Train)
    strategy: Annotated[Component, Slot("strategies")] = Field(default="fedavg", validate_default=True)
    pruning: Annotated[Component, Slot("pruning")] | None = None
    transforms: Transforms = Transforms([])
    transfer: Transfer | None = None
    engine: Annotated[Component, Slot("engines")] = Field(default="local", validate_default=True)
    output: Annotated[Folder, Field(description="folder of the run folders")] = "runs"


def default_name(path: str) -> str | None:
    """Name of the component at a dotted key when the config does not give one; None if it must."""
    section: Any = Config
    *above, last = path.split(".")
    for part in above:
        section = section.model_fields[part].annotation
    default = section.model_fields[last].default
    return default if isinstance(default, str) else None


def cross_problems(get: Callable[[str], Any]) -> list[str]:
    """Problems between keys.

    Args:
        get: value at a dotted key, or None; values may be of a wrong type, which is reported elsewhere.

    Returns:
        One line per broken rule.
    """
    problems = []
    if isinstance(get("transfer"), Mapping):
        return _transfer_problems(get)
    clients, cohort, split = get("data.clients"), get("train.clients_per_round"), get("data.split.name")
    if isinstance(get("data"), Mapping) and clients is None and split not in COUNTED_SPLITS and ":" not in str(split):
        problems.append(f"data.clients: needed, the split {split} does not know how many clients there are")
    if type(clients) is int and type(cohort) is int and 1 <= clients < cohort:
        problems.append(f"train.clients_per_round: must be <= data.clients ({clients}), got {cohort}")
    pruning, rounds = get("pruning"), get("train.rounds")
    if isinstance(pruning, Mapping) and type(rounds) is int and rounds >= 1:
        problems += too_late(str(pruning.get("name")), pruning, rounds)
    if get("train.early_stopping") is not None and get("train.local_epochs") in (None, 1):
        problems.append("train.early_stopping: needs train.local_epochs > 1, there is but one epoch to return")
    return problems


_UNUSED: tuple[
    tuple[str, Any], ...
] = (  # keys of a federation of clients: what they must be in a transfer, which has none
    ("transforms", []),
    ("train.early_stopping", None),
    ("train.clients_per_round", "all"),
    ("train.local_epochs", 1),
    ("strategy.name", "fedavg"),
)


def _transfer_problems(get: Callable[[str], Any]) -> list[str]:
    """Problems of a config with a ``transfer`` section."""
    problems = []
    protocol, loss = get("transfer.protocol"), get("transfer.loss")
    if loss == "exact" and protocol in ("paillier", "secret-sharing"):
        problems.append(f"transfer.loss: exact needs transfer.protocol: plain, {protocol} can only add and multiply")
    if get("transfer.key_bits") == 1024 and get("transfer.insecure") is not True:
        problems.append("transfer.key_bits: 1024 can be broken; for a test set transfer.insecure: true")
    overlap, labelled = get("transfer.overlap"), get("transfer.labelled")
    if type(overlap) is int and type(labelled) is int and 1 <= overlap < labelled:
        problems.append(f"transfer.labelled: must be <= transfer.overlap ({overlap}), got {labelled}")
    if get("transfer.alignment") == "inner-product" and get("transfer.l2") == 0 and get("transfer.gamma") != 0:
        problems.append("transfer.l2: must be > 0 with alignment: inner-product, which grows without limit, got 0")
    if get("train.batch_norm") not in ("average", "freeze", None):
        problems.append(f"train.batch_norm: must be average or freeze in a transfer, got {get('train.batch_norm')}")
    if get("engine.name") not in ("local", "flower", None):
        problems.append(f"engine.name: must be local or flower in a transfer, got {get('engine.name')}")
    for key, default in _UNUSED:
        if get(key) not in (default, None):
            problems.append(f"{key}: has no meaning in a transfer, which has two parties and no clients")
    pruning, iterations = get("pruning"), get("transfer.iterations")
    if isinstance(pruning, Mapping) and type(iterations) is int and iterations >= 1:
        problems += too_late(str(pruning.get("name")), pruning, iterations, "transfer.iterations")
    return problems


_ROUNDS_OF = {"magnitude": ("start", "end"), "lottery-ticket": ("every",)}  # beside ``at``, which any method may have


def too_late(pruning: str, params: Mapping[str, Any], rounds: int, limit: str = "train.rounds") -> list[str]:
    """Problems with rounds after which the method of this name prunes: the last round is not among them.

    limit: key of the number of rounds.
    """
    keys = [key for key in ("at", *_ROUNDS_OF.get(pruning, ())) if type(params.get(key)) is int]
    rule = f"must be below {limit} ({rounds})"
    return [f"pruning.{key}: {rule}, got {params[key]}" for key in keys if params[key] >= rounds]
