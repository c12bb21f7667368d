"""The two baselines of a federation as run folders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.api import folders
from fedsim.api.running import Run
from fedsim.baselines import Alone, centralised, each_alone, merged, train_centralised
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.federation import Federation
from fedsim.recording import Facts, Kind, OnRound, record_rounds


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
    Neither run can be resumed; the centralised one has a model.

    Args:
        config, overrides, progress: as in :func:`run`.
        on_start: called once all is built, with the federation.
        on_round: called after every round of the centralised training.
        on_client: called after each client that trained alone: clients done, clients in all.

    Returns:
        Both runs, named after the config with ``-centralised`` and ``-alone``.
    """
    with importable(folders.folder_of(config)), folders.one_thread():
        checked = config_files.load(config, overrides)
        federation, engine = build.federation(checked, progress)
        engine = folders.prepared(engine, centralised(federation), {})  # clients alone are trained the same way

        def new(kind: Kind) -> tuple[Path, Facts]:
            named = checked.model_copy(update={"name": f"{checked.name}-{kind}"})
            folder = folders.new_folder(named, federation, engine, folders.folder_of(config))
            return folder, folders.facts_of(named, federation, kind)

        together, facts = new("centralised")  # first: output that cannot be written is better known before the work
        (on_start or folders.ignore)(federation)
        record_rounds(together, facts, *train_centralised(federation, engine, on_round or folders.ignore))
        apart, facts = new("alone")
        done: list[Alone] = []
        for one in each_alone(federation, engine):
            done.append(one)
            (on_client or folders.ignore)(len(done), federation.data.num_clients)
        record_rounds(apart, facts, merged(done), None)
        return Baselines(Run(together), Run(apart))
