"""What a model is made of, layer by layer: parameters, zeros, arithmetic, and bytes in each form."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import runs
from fedsim.api import folders
from fedsim.api.running import load
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.errors import ConfigError, DataError
from fedsim.models.cost import ELSEWHERE, LayerCost, costs
from fedsim.wire.sparse import sizes
from fedsim.wire.support import FORMS


@dataclass(frozen=True)
class Numbers:
    """Of a layer, or of the whole model.

    parameters, nonzeros, macs, effective_macs: as in :class:`fedsim.models.cost.LayerCost`.
    bytes: of the values of its parameters, in each of :data:`fedsim.wire.support.FORMS`.
    """

    parameters: int
    nonzeros: int
    macs: int
    effective_macs: int
    bytes: dict[str, int]


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own: path ("" is the model itself), class, shape of its weight, and numbers."""

    path: str
    kind: str
    shape: tuple[int, ...]
    numbers: Numbers


@dataclass(frozen=True)
class Inspection:
    """A model. ``round`` is the last whole one of a run, None for a fresh model."""

    name: str
    model: str
    input_shape: tuple[int, ...]
    round: int | None
    layers: list[Layer]
    total: Numbers


def inspect(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    progress: build.Progress = build.silent,
) -> Inspection:
    """Count what the model of a run, or the fresh one of a config, is made of. Nothing is trained or written.

    Args:
        source: a run folder, a YAML file, or a config as a mapping.
        overrides, progress: as in :func:`run`, for a config.

    Raises:
        ConfigError, DataError: as in :func:`run` and :meth:`Run.model`; or overrides are given for a run.
    """
    if isinstance(source, Mapping) or not Path(source).is_dir():
        return _fresh(source, overrides, progress)
    if overrides:
        raise ConfigError(f"{next(iter(overrides))}: a run has its config, and none of it can be changed, got {source}")
    return _of_run(Path(source))


def totals(model: nn.Module, input_shape: tuple[int, ...]) -> Numbers:
    """Of a whole model, for one example of this shape.

    Raises:
        ValueError: the model cannot be called with it.
    """
    return _total(layer.numbers for layer in _layers(model, input_shape, None))


def _fresh(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None, progress: build.Progress
) -> Inspection:
    with importable(folders.folder_of(config)), folders.one_thread():
        checked = config_files.load(config, overrides)
        data = build.dataset(checked, progress)
        shape = build.ModelShape(tuple(data.train.inputs.shape[1:]), data.num_classes)
        model, name = build.model(checked, shape), checked.model.name
        try:
            found = _layers(model, shape.input_shape, data.train.inputs.dtype)
        except ValueError as error:
            raise ConfigError(f"model.name: {name}: {error}") from error
    return Inspection(checked.name, name, shape.input_shape, None, found, _total(layer.numbers for layer in found))


def _of_run(path: Path) -> Inspection:
    folder = runs.open_run(path)
    config, model, facts = folder.config(), load(path).model(), folder.summary()
    shape = tuple(facts["model"]["input_shape"])
    with importable(folders.config_folder(folder)), folders.one_thread():
        try:
            found = _layers(model, shape, None)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from error
    total = _total(layer.numbers for layer in found)
    return Inspection(config["name"], facts["model"]["name"], shape, facts.get("rounds_done"), found, total)


def _layers(model: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype | None) -> list[Layer]:
    seen: set[int] = set()
    counted = costs(model, input_shape, dtype)
    return [Layer(one.path, one.kind, one.weight_shape, _numbers(one, _own(model, one.path, seen))) for one in counted]


def _own(model: nn.Module, path: str, seen: set[int]) -> list[Tensor]:
    """Parameters of the module itself, those that it shares where they come first."""
    module = nn.Module() if path == ELSEWHERE else model.get_submodule(path)
    new = [parameter.detach() for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
    seen |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return new


def _numbers(cost: LayerCost, tensors: list[Tensor]) -> Numbers:
    """With the bytes in all forms; here is the place for others."""
    each = [sizes(tensor) for tensor in tensors]
    in_forms = {form: sum(one[form] for one in each) for form in FORMS}
    return Numbers(cost.parameters, cost.nonzeros, cost.macs, cost.effective_macs, in_forms)


def _total(numbers: Iterable[Numbers]) -> Numbers:
    every = list(numbers)
    return Numbers(
        parameters=sum(one.parameters for one in every),
        nonzeros=sum(one.nonzeros for one in every),
        macs=sum(one.macs for one in every),
        effective_macs=sum(one.effective_macs for one in every),
        bytes={form: sum(one.bytes[form] for one in every) for form in FORMS},
    )
