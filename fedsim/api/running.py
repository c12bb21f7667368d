"""Run a config, resume a run, open a finished one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedsim import environment, runs
from fedsim.api import folders, transferring
from fedsim.config import build, pruned
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, DataError
from fedsim.federation import Federation, RoundResult, start
from fedsim.federation import run as run_rounds
from fedsim.params import of
from fedsim.pruning.fitting import fitted
from fedsim.recording import OnRound, Recording
from fedsim.records import ClientEvaluation, Params, RoundRecord, ServerState

OnStart = Callable[["Run", Any], None]  # with a Federation, or a Pair of two parties
OnResult = Callable[[RoundResult], None]
Loop = Callable[[Path, Federation, Engine, ServerState, OnResult], object]


def simulated(folder: Path, federation: Federation, engine: Engine, state: ServerState, take: OnResult) -> None:
    """The rounds after ``state``, on the engine; every one of them is given to ``take``."""
    run_rounds(federation, state, engine, take)


@dataclass(frozen=True)
class Run:
    """A run to look at. Everything is read from its folder."""

    folder: Path

    def __repr__(self) -> str:
        """Status, rounds and accuracy, in one line."""
        found = self.summary
        told = [f"{key}={found[key]}" for key in ("status", "rounds_done", "accuracy") if found.get(key) is not None]
        return f"Run({', '.join([repr(str(self.folder)), *told])})"

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
        if shape["name"] is None:
            rule = "a Flower app makes its model in its own code; its arrays are in model.safetensors"
            raise DataError(f"{folder.path}: {rule}")
        with importable(folders.config_folder(folder)):
            config = config_files.check(folder.config())
            module = build.model(config, build.ModelShape(tuple(shape["input_shape"]), shape["num_classes"]))
            folders.warn_of_other_code(config, folder)
            if pruned.removes_channels(config):
                module = _fitted(module, tensors, tuple(shape["input_shape"]))
        params, buffers = of(module)
        folders.check_fits({**params, **buffers}, tensors, folder.path)
        module.load_state_dict(tensors, strict=False)  # of a weight that has two names in a module, one is saved
        return module.eval()


def _with_model(federation: Federation, tensors: Params) -> Federation:
    """The federation with the model as it is after pruning."""
    if federation.pruning is None or not federation.pruning.removes:
        return federation
    model = _fitted(federation.work.model, tensors, build.shape_of(federation.data).input_shape)
    return replace(federation, work=replace(federation.work, model=model))


def _fitted(module: nn.Module, tensors: Params, input_shape: tuple[int, ...]) -> nn.Module:
    """The module with as few channels as pruning has left; as it is where that is not what differs."""
    try:
        return fitted(module, tensors, input_shape)
    except ValueError:
        return module


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
    loop: Loop = simulated,
) -> Run:
    """Run a federation and write its run folder.

    Args:
        config: path of a YAML file, or the same as a mapping.
        overrides: dotted key -> value, such as ``{"train.rounds": 5}``.
        on_start: called once all is built, with the new folder, before the first round.
        on_round: called after every round.
        progress: called while data is downloaded: name, bytes done, bytes in all.
        loop: what runs the rounds, if not the engine, which then only says where they ran.

    Returns:
        The finished run.

    Raises:
        ConfigError, DataError: nothing was written.
        ClientError, RunError: the run failed; its state is in the folder.
        KeyboardInterrupt: the run was interrupted; its state is in the folder.
    """
    with importable(folders.folder_of(config)), folders.one_thread():
        checked = config_files.load(config, overrides)
        begun, done = on_start or folders.ignore, on_round or folders.ignore
        if checked.transfer is not None:
            started = lambda folder, pair: begun(Run(folder), pair)  # noqa: E731
            beside = folders.folder_of(config)
            return Run(transferring.run(checked, beside, on_start=started, on_round=done, progress=progress))
        federation, engine = build.federation(checked, progress)
        engine = folders.prepared(engine, federation, {}) if loop is simulated else engine
        folder = folders.new_folder(checked, federation, engine, folders.folder_of(config))
        rounds = partial(loop, folder, federation, engine)
        record(folder, checked, federation, rounds, on_start=begun, on_round=done)
    return Run(folder)


def record(
    folder: Path,
    config: Config,
    federation: Federation,
    rounds: Callable[[ServerState, OnResult], object],
    *,
    on_start: OnStart,
    on_round: OnRound,
) -> None:
    """Write a run into its new folder, from before the first of its ``rounds`` on."""
    state = start(federation)
    recorder = Recording(folder, folders.facts_of(config, federation), state, on_round)
    with runs.locked(folder), recorder as recording:
        recording.save()  # from here on a run that is stopped can be resumed
        on_start(Run(folder), federation)
        rounds(state, recording.take)


def resume(
    folder: str | Path,
    *,
    rounds: int | None = None,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
    loop: Loop = simulated,
) -> Run:
    """Go on with a run after its last whole round; the result equals that of a run that was never stopped.

    Args:
        folder: the run folder. A finished run comes back as it is.
        rounds: a new total, to make a run longer. None keeps ``train.rounds``. The old last round was evaluated even
            if ``train.eval_every`` would have passed it over; a run that was longer from the start lacks that line.
        on_start, on_round, progress, loop: as in :func:`run`.

    Raises:
        DataError: not a run folder, from a newer version, a damaged checkpoint, or the data is no longer the same.
        ConfigError: ``rounds`` is fewer than are done.
    """
    opened = runs.open_run(folder)
    changes = {} if rounds is None else {"train.rounds": rounds}
    with runs.locked(opened.path), importable(folders.config_folder(opened)), folders.one_thread():
        state = runs.load_checkpoint(opened.path)
        checked = config_files.load(opened.config(), changes)
        if checked.train.rounds < state.round:
            raise ConfigError(f"rounds: {opened.path} has {state.round} rounds already, got {checked.train.rounds}")
        if checked.train.rounds == state.round and opened.summary().get("status") == "finished":
            return Run(opened.path)
        federation, engine = build.federation(checked, progress)
        folders.check_same_data(federation, opened)
        folders.warn_of_other_code(checked, opened)
        if loop is simulated:
            engine = folders.prepared(engine, federation, opened.environment().get("engine", {}))
        saved = {**state.params, **state.buffers}
        fresh = start(_with_model(federation, saved))
        folders.check_fits({**fresh.params, **fresh.buffers}, saved, opened.path / "checkpoint")
        runs.trim(opened.path, state.round)
        runs.forget_end(opened.path)
        facts = folders.facts_of(checked, federation)
        with Recording(opened.path, facts, state, on_round or folders.ignore) as recording:
            runs.write_config(opened.path, config_files.resolved(checked))
            resumed = {"round": state.round, **environment.describe(engine.describe())}
            runs.add_environment(opened.path, resumed)
            (on_start or folders.ignore)(Run(opened.path), federation)
            loop(opened.path, federation, engine, state, recording.take)
    return Run(opened.path)
