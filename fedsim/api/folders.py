"""What a run folder says before the first round, and what must still be true when a run is gone on with."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fedsim import environment, runs
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.components import is_foreign
from fedsim.config.foreign import sources
from fedsim.config.schema import Config
from fedsim.config.tables import KINDS
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, DataError, FedsimError
from fedsim.federation import Federation, job, start
from fedsim.models.cost import costs
from fedsim.params import check_alike, num_entries
from fedsim.pruning.masks import prunable
from fedsim.recording import SPLIT_DETAIL_CLIENTS, Facts, Kind, Weight, fingerprint, split_facts
from fedsim.records import Params


def new_folder(config: Config, federation: Federation, engine: Engine, beside: Path) -> Path:
    """A run folder with what is known before the first round; ``beside`` is where a resume finds foreign modules."""
    folder = runs.create(Path(config.output).expanduser(), config.name)
    with runs.writing(folder):
        runs.write_config(folder, config_files.resolved(config))
        code = {"config_folder": str(beside.resolve()), "code": _code(config), "model": federation.draws.record()}
        runs.write_json(folder / "environment.json", {**environment.describe(engine.describe()), **code})
        runs.write_json(folder / "split.json", split_facts(federation.data, SPLIT_DETAIL_CLIENTS))
    return folder


def prepared(engine: Engine, federation: Federation, recorded: Mapping[str, Any]) -> Engine:
    """The engine with its choices made; what it refuses is a mistake in the config.

    recorded: what environment.json says of the engine, {} for a new run.
    """
    try:
        return engine.prepared(job(federation), recorded)
    except ValueError as error:
        raise ConfigError(f"engine: {error}") from error
    except (FedsimError, OSError):
        raise
    except Exception as error:  # of a model or a rule of the user's, which is trained for the first time here
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"engine: training a first batch failed: {what} (--debug shows where)") from error


def folder_of(config: str | Path | Mapping[str, Any]) -> Path:
    """Where a config lies; a mapping lies in the working folder."""
    return Path.cwd() if isinstance(config, Mapping) else Path(config).parent


def config_folder(folder: runs.RunFolder) -> Path:
    """Where the config of a run was. A run folder does not get to bring code of its own."""
    found = Path(folder.environment().get("config_folder", ".")).resolve()
    return Path.cwd() if found.is_relative_to(folder.path.resolve()) else found


def ignore(*_: object) -> None:
    """Be a hook that nobody listens to."""


def facts_of(config: Config, federation: Federation, kind: Kind = "federated") -> Facts:
    """What summary.json says of a run beside its results."""
    return Facts(
        name=config.name,
        kind=kind,
        model=config.model.name,
        parameters=num_entries(start(federation).params),
        clients=federation.data.num_clients,
        input_shape=build.shape_of(federation.data).input_shape,
        num_classes=federation.data.num_classes,
        rounds=config.train.rounds,
        target_accuracy=config.train.target_accuracy,
        weights={} if federation.pruning is None or kind != "federated" else _weights(federation),
    )


def _weights(federation: Federation) -> dict[str, Weight]:
    """What can be pruned. What its arithmetic costs is not known of a model that cannot be called with zeros."""
    params, inputs = start(federation).params, federation.data.train.inputs
    try:
        found = costs(federation.work.model, build.shape_of(federation.data).input_shape, inputs.dtype)
    except ValueError:
        found = []
    macs = {one.path: one.macs for one in found}
    entries: Counter[str] = Counter()  # of the weights of each layer, of which a recurrent one has several
    for name in prunable(params):
        entries[name.rpartition(".")[0]] += params[name].numel()
    uses = {path: macs[path] // count for path, count in entries.items() if macs.get(path)}
    return {name: Weight(tuple(params[name].shape), uses.get(name.rpartition(".")[0])) for name in prunable(params)}


def _code(config: Config) -> dict[str, str]:
    """Hashes of the modules of foreign components."""
    names = (one.name for kind in KINDS.values() for one in config_files.components_at(config, kind))
    return sources(name for name in names if is_foreign(name))


def other_code(config: Config, folder: runs.RunFolder) -> list[str]:
    """Modules of foreign components that have changed since the run was started."""
    before = folder.environment().get("code", {})
    return [module for module, digest in _code(config).items() if before.get(module, digest) != digest]


def warn_of_other_code(config: Config, folder: runs.RunFolder) -> None:
    """Somebody else's code may be mended between two halves of a run, but not without a word."""
    changed = other_code(config, folder)
    if changed:
        warnings.warn(f"{', '.join(changed)} changed since {folder.path} was started", stacklevel=3)


def check_same_data(federation: Federation, folder: runs.RunFolder) -> None:
    """Refuse to go on with other examples, or another split of them, than the run started with."""
    before = folder.split().get("fingerprint")
    if before is not None and before != fingerprint(federation.data):
        rule = "must be what the run started with, but the examples or their split have changed"
        raise DataError(f"data: {rule}; the run is {folder.path}")


def check_fits(expected: Params, found: Params, where: Path) -> None:
    """Refuse the tensors of another model."""
    try:
        check_alike(expected, found)
    except ValueError as error:
        raise DataError(f"{where}: does not fit the model of config.yaml ({error})") from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread while a run goes on: results then do not depend on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
