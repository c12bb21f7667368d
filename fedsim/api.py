"""The Python API: run a config, resume a run, open a finished one. The command line stands on it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import environment, runs
from fedsim.baselines import Alone, Line, each_alone, merged, train_centralised
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.data.partition_files import save as save_partition
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, DataError, RunError
from fedsim.federation import Federation, start
from fedsim.federation import run as run_rounds
from fedsim.params import check_alike, num_entries, of
from fedsim.recording import SPLIT_DETAIL_CLIENTS, Facts, OnRound, Recording, fingerprint, record_rounds, split_facts
from fedsim.records import ClientEvaluation, Params, Partition, RoundRecord

OnStart = Callable[["Run", Federation], None]


@dataclass(frozen=True)
class Run:
    """A run to look at. Everything is read from its folder."""

    folder: Path

    @property
    def rounds(self) -> list[RoundRecord]:
        """Every round, in order."""
        return runs.open_run(self.folder).rounds()

    @property
    def clients(self) -> list[ClientEvaluation]:
        """Every evaluation of a client, in order of round and client."""
        return runs.open_run(self.folder).clients()

    @property
    def summary(self) -> dict[str, Any]:
        """Final and best metrics, totals and status."""
        return runs.open_run(self.folder).summary()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        return runs.open_run(self.folder).config()

    def model(self) -> nn.Module:
        """The global model as it is now, in eval mode."""
        folder = runs.open_run(self.folder)
        tensors, shape = folder.model(), folder.summary()["model"]
        with importable(_config_folder(folder)):
            config = config_files.check(folder.config())
            module = build.model(config, build.ModelShape(tuple(shape["input_shape"]), shape["num_classes"]))
        params, buffers = of(module)
        _check_fits({**params, **buffers}, tensors, folder.path)
        module.load_state_dict(tensors, strict=False)  # of a weight that has two names in a module, one is saved
        return module.eval()


def load(folder: str | Path) -> Run:
    """Open a run folder.

    Raises:
        DataError: it is not one, or from a newer version.
    """
    return Run(runs.open_run(folder).path)


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
) -> Run:
    """Run a federation and write its run folder.

    Args:
        config: path of a YAML file, or the same as a mapping.
        overrides: dotted key -> value, such as ``{"train.rounds": 5}``.
        on_start: called once all is built, with the new folder, before the first round.
        on_round: called after every round.
        progress: called while data is downloaded: name, bytes done, bytes in all.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError: nothing was written.
        ClientError, RunError: the run failed; its state is in the folder.
        KeyboardInterrupt: the run was interrupted; its state is in the folder.
    """
    with importable(_folder_of(config)), one_thread():
        checked = config_files.load(config, overrides)
        federation, engine = build.federation(checked, progress)
        folder = _new_folder(checked, federation, engine, _folder_of(config))
        recorder = Recording(folder, _facts(checked, federation), on_round or _ignore)
        with runs.locked(folder), recorder as recording:
            (on_start or _ignore)(Run(folder), federation)
            run_rounds(federation, start(federation), engine, recording.take)
    return Run(folder)


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
) -> Run:
    """Go on with a run after its last whole round; the result equals that of a run that was never stopped.

    Args:
        folder: the run folder. A finished run comes back as it is.
        rounds: a new total, to make a run longer. None keeps ``train.rounds``. The old last round was evaluated even
            if ``train.eval_every`` would have passed it over; a run that was longer from the start lacks that line.
        on_start, on_round, progress: as in :func:`run`.

    Raises:
        DataError: not a run folder, from a newer version, a damaged checkpoint, or the data is no longer the same.
        ConfigError: ``rounds`` is fewer than are done.
    """
    opened = runs.open_run(folder)
    changes = {} if rounds is None else {"train.rounds": rounds}
    with runs.locked(opened.path), importable(_config_folder(opened)), one_thread():
        state = runs.load_checkpoint(opened.path)
        checked = config_files.load(opened.config(), changes)
        if checked.train.rounds < state.round:
            raise ConfigError(f"rounds: {opened.path} has {state.round} rounds already, got {checked.train.rounds}")
        if checked.train.rounds == state.round and opened.summary().get("status") == "finished":
            return Run(opened.path)
        federation, engine = build.federation(checked, progress)
        _check_same_data(federation, opened)
        fresh = start(federation)
        _check_fits({**fresh.params, **fresh.buffers}, {**state.params, **state.buffers}, opened.path / "checkpoint")
        runs.trim(opened.path, state.round)
        runs.forget_end(opened.path)
        with Recording(opened.path, _facts(checked, federation), on_round or _ignore) as recording:
            runs.write_config(opened.path, config_files.resolved(checked))
            resumed = {"round": state.round, **environment.describe(engine.describe())}
            runs.add_environment(opened.path, resumed)
            (on_start or _ignore)(Run(opened.path), federation)
            run_rounds(federation, state, engine, recording.take)
    return Run(opened.path)


@dataclass(frozen=True)
class Baselines:
    """The two runs to hold a federation against."""

    centralised: Run
    alone: Run


def baseline(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    on_start: Callable[[Federation], None] | None = None,
    on_round: OnRound | None = None,
    on_client: Callable[[int, int], None] | None = None,
    progress: build.Progress = build.silent,
) -> Baselines:
    """Run the two baselines of a federation from the same config: centralised, and every client alone.

    Both train on the federation's examples and are tested on its held-out examples (see ``fedsim.baselines``).
    Neither folder can be resumed: they are written when all is done, and have no checkpoint.

    Args:
        config, overrides, progress: as in :func:`run`.
        on_start: called once all is built, with the federation.
        on_round: called after every round of the centralised training.
        on_client: called after each client that trained alone: clients done, clients in all.

    Returns:
        Both runs, named after the config with ``-centralised`` and ``-alone``.
    """
    with importable(_folder_of(config)), one_thread():
        checked = config_files.load(config, overrides)
        federation, engine = build.federation(checked, progress)

        def new(kind: str) -> Callable[[Iterable[Line]], Run]:
            named = checked.model_copy(update={"name": f"{checked.name}-{kind}"})
            folder = _new_folder(named, federation, engine, _folder_of(config))
            return lambda lines: Run(record_rounds(folder, _facts(named, federation), lines))

        record = new("centralised")  # the folder first: output that cannot be written is better known before the work
        (on_start or _ignore)(federation)
        together = record(train_centralised(federation, engine, on_round or _ignore))
        record, done = new("alone"), list[Alone]()
        for one in each_alone(federation, engine):
            done.append(one)
            (on_client or _ignore)(len(done), federation.data.num_clients)
        return Baselines(together, record(merged(done)))


@dataclass(frozen=True)
class Split:
    """Who would hold what. ``facts`` are those of split.json."""

    partition: Partition
    labels: Tensor
    facts: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write it to a file for ``split: {name: file, path: ...}``."""
        save_partition(self.partition, self.labels, path)


def split(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    progress: build.Progress = build.silent,
) -> Split:
    """Load the data of a config and split it, without running anything."""
    with importable(_folder_of(config)):
        data = build.federated_data(config_files.load(config, overrides), progress)
    return Split(data.partition, data.train.labels, split_facts(data))


def _new_folder(config: Config, federation: Federation, engine: Engine, beside: Path) -> Path:
    """A run folder with what is known before the first round; ``beside`` is where a resume finds foreign modules."""
    folder = runs.create(Path(config.output).expanduser(), config.name)
    try:
        runs.write_config(folder, config_files.resolved(config))
        facts = {**environment.describe(engine.describe()), "config_folder": str(beside.resolve())}
        runs.write_json(folder / "environment.json", facts)
        runs.write_json(folder / "split.json", split_facts(federation.data, SPLIT_DETAIL_CLIENTS))
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def _folder_of(config: str | Path | Mapping[str, Any]) -> Path:
    return Path.cwd() if isinstance(config, Mapping) else Path(config).parent


def _config_folder(folder: runs.RunFolder) -> Path:
    """Where the config of a run was. A run folder does not get to bring code of its own."""
    found = Path(folder.environment().get("config_folder", ".")).resolve()
    return Path.cwd() if found.is_relative_to(folder.path.resolve()) else found


def _ignore(*_: object) -> None:
    pass


def _facts(config: Config, federation: Federation) -> Facts:
    return Facts(
        name=config.name,
        model=config.model.name,
        parameters=num_entries(start(federation).params),
        clients=federation.data.num_clients,
        input_shape=build.shape_of(federation.data).input_shape,
        num_classes=federation.data.num_classes,
        rounds=config.train.rounds,
        target_accuracy=config.train.target_accuracy,
    )


def _check_same_data(federation: Federation, folder: runs.RunFolder) -> None:
    """Refuse to go on with other examples, or another split of them, than the run started with."""
    before = folder.split().get("fingerprint")
    if before is not None and before != fingerprint(federation.data):
        rule = "must be what the run started with, but the examples or their split have changed"
        raise DataError(f"data: {rule}; the run is {folder.path}")


def _check_fits(expected: Params, found: Params, where: Path) -> None:
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
