"""Pruning a finished run: the smaller model beside the old one, or a new run that goes on with it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import nn

from fedsim import runs
from fedsim.api import folders
from fedsim.api.inspecting import Numbers, totals
from fedsim.api.running import OnStart, Run, resume
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.components import parameters
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.config.tables import KINDS
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, RunError
from fedsim.federation import Federation, fitted, pruned
from fedsim.params import separate
from fedsim.pruning.budgets import scratch_b
from fedsim.recording import OnRound
from fedsim.records import Params, ServerState
from fedsim.training.evaluate import score

Scratch = Literal["e", "b"]

_WHILE_TRAINING = ("soft-filter",)  # prune in every round, so that the old run's rounds are not theirs
_UNTOUCHED = {"strength": 0.0}  # of a penalty that the old run's rounds did not have either


@dataclass(frozen=True)
class State:
    """A model before or after pruning: what it is made of, and how it does on the held-out examples."""

    numbers: Numbers
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Pruned:
    """What became of a run.

    before, after: the model, before any further training.
    files: the pruned model and these numbers as JSON; empty if a run goes on with it.
    run: that goes on with the pruned model; None if none was asked for.
    """

    criterion: str
    before: State
    after: State
    files: tuple[Path, ...]
    run: Run | None


def prune(
    folder: str | Path,
    criterion: str,
    sparsity: float | None = None,
    *,
    finetune: int = 0,
    scratch: Scratch | None = None,
    options: Mapping[str, Any] | None = None,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
) -> Pruned:
    """Prune the model of a run, and perhaps go on with it in a new run.

    The new run has the rounds of the old one, and then those of the pruned model: it is what the config would have made
    with ``pruning: {name: criterion, ...}`` and more rounds. The old folder is not changed, but for ``RUN/pruned``.

    Args:
        folder: of a run without pruning, with a checkpoint.
        criterion: name of a pruning method that prunes at one time: ``magnitude``, ``l1-filter``, ...
        sparsity: share that goes, in (0, 1); None: the method's default.
        finetune: rounds to train on from the weights that are left.
        scratch: train the small model from new weights instead: for as many rounds as the run has ("e"), or for as
            many as cost the multiply-accumulates of the run ("b"): ``int(rounds * macs / pruned macs)``; those of
            weights that are 0 count for nothing.
        options: other keys of the method.
        on_start, on_round, progress: as in :func:`run`.

    Raises:
        ConfigError: the run has pruning already, or the method cannot be used like this.
        DataError: as in :func:`resume`.

    Source: the three arms are those of Liu et al. 2019, "Rethinking the Value of Network Pruning", arXiv:1810.05270,
        section 3. Differs: budgets are counted in rounds, of all clients alike; no learning rate schedule is stretched.
    """
    if finetune and scratch is not None:
        raise ConfigError(f"finetune and scratch exclude each other, got {finetune} and {scratch}")
    if finetune < 0:
        raise ConfigError(f"finetune: must be >= 0, got {finetune}")
    opened = runs.open_run(folder)
    with importable(folders.config_folder(opened)), folders.one_thread():
        state = runs.load_checkpoint(opened.path)
        given = {**(options or {}), **({} if sparsity is None else {"sparsity": sparsity})}
        section = _section(opened, criterion, given, state.round, scratch)
        checked = _config(opened, section, state.round + 1)
        federation, engine = build.federation(checked, progress)
        folders.check_same_data(federation, opened)
        before = _measured(federation, state)
        smaller = pruned(federation, state, state.round + 1, _no_probe, _no_probe)
        after = _measured(fitted(federation, smaller.params), smaller)
        more = _rounds(finetune, scratch, state.round, before, after)
        if not more:
            facts = {"pruning": section, "before": asdict(before), "after": asdict(after)}
            return Pruned(criterion, before, after, _write(opened.path, smaller, facts), None)
        going = _continued(opened, _config(opened, section, state.round + more), federation, engine, state)
    run = resume(going, on_start=on_start, on_round=on_round, progress=progress)
    return Pruned(criterion, before, after, (), run)


def _section(
    opened: runs.RunFolder, criterion: str, given: Mapping[str, Any], done: int, scratch: Scratch | None
) -> dict[str, Any]:
    """The pruning section that prunes after ``done`` rounds."""
    kind = KINDS["pruning"]
    if opened.config().get("pruning") is not None:
        raise ConfigError(f"{opened.path}: was pruned while it ran, and can be pruned only once")
    if criterion in _WHILE_TRAINING:
        rule = "works while a model is trained, and needs a config with it; of a finished run take l1-filter"
        raise ConfigError(f"criterion: {criterion} {rule}")
    when = {name: _when(factory) for name, factory in kind.table.items() if name not in _WHILE_TRAINING}
    usable = [name for name, keys in when.items() if keys]
    if criterion not in usable:
        raise ConfigError(f"criterion: must be one of {', '.join(usable)}, got {criterion!r}")
    if set_here := [key for key in (*when[criterion], "then", *_UNTOUCHED) if key in given]:
        raise ConfigError(f"{set_here[0]}: follows from the run and from finetune or scratch, and cannot be given")
    off = {key: value for key, value in _UNTOUCHED.items() if key in parameters(kind.table[criterion], kind)}
    section = {"name": criterion, **dict.fromkeys(when[criterion], done), **off, **given}
    if scratch is None:
        return section
    return {**section, "then": "scratch"}


def _when(factory: Any) -> tuple[str, ...]:
    """The keys that say after how many rounds a method prunes once; () if it does not."""
    keys = parameters(factory, KINDS["pruning"])
    return next((when for when in (("at",), ("start", "end")) if all(key in keys for key in when)), ())


def _config(opened: runs.RunFolder, section: Mapping[str, Any], rounds: int) -> Config:
    return config_files.load({**opened.config(), "pruning": dict(section)}, {"train.rounds": rounds})


def _measured(federation: Federation, state: ServerState) -> State:
    """The state's model on the held-out examples."""
    model: nn.Module = federation.work.model
    loss, accuracy = score(model, state.params, state.buffers, federation.data.test).mean()
    return State(totals(_with(model, {**state.params, **state.buffers}), _input_shape(federation)), loss, accuracy)


def _with(model: nn.Module, tensors: Params) -> nn.Module:
    model.load_state_dict(tensors, strict=False)
    return model


def _input_shape(federation: Federation) -> tuple[int, ...]:
    return build.shape_of(federation.data).input_shape


def _rounds(finetune: int, scratch: Scratch | None, done: int, before: State, after: State) -> int:
    """How many rounds the new run has more than the old one."""
    if scratch == "b":
        return scratch_b(done, before.numbers.effective_macs, after.numbers.effective_macs).rounds
    return done if scratch == "e" else finetune


def _write(folder: Path, state: ServerState, facts: Mapping[str, Any]) -> tuple[Path, ...]:
    """The pruned model and what is to be said of it, below the run's folder."""
    where, section = folder / "pruned", facts["pruning"]
    name = f"{section['name']}-{section['sparsity']:g}" if "sparsity" in section else section["name"]
    with runs.writing(folder):
        where.mkdir(exist_ok=True)
        tensors = {n: separate(tensor) for n, tensor in {**state.params, **state.buffers}.items()}
        runs.write_bytes(where / f"{name}.safetensors", safetensors.torch.save(tensors))
        runs.write_json(where / f"{name}.json", facts)
    return where / f"{name}.safetensors", where / f"{name}.json"


def _continued(
    opened: runs.RunFolder, config: Config, federation: Federation, engine: Engine, state: ServerState
) -> Path:
    """A new run folder that has come as far as the old one, for a resume."""
    recorded = opened.environment().get("engine", {})
    engine = folders.prepared(engine, federation, recorded)
    folder = folders.new_folder(config, federation, engine, folders.config_folder(opened))
    with runs.writing(folder):
        for name in ("rounds.jsonl", "clients.jsonl", "summary.json"):
            if (opened.path / name).exists():
                shutil.copyfile(opened.path / name, folder / name)
        summary = json.loads((folder / "summary.json").read_text())
        runs.write_json(folder / "summary.json", {**summary, "status": "running"})
        (folder / "checkpoint").mkdir(exist_ok=True)
        runs.save_checkpoint(folder, state)
    return folder


def _no_probe(*at: Params) -> Params:
    raise RunError("this method asks clients for gradients, and can be used while a run goes on only")
