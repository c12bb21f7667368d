"""Run every combination of several values of some keys, each in a run folder of its own, and say what came out."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim import runs
from fedsim.api import folders
from fedsim.api.sweep_folder import (
    Sweep,
    load_sweep,
    note_failure,
    read_plan,
    row,
    rows,
    write_csv,
    write_plan,
    write_summary,
)
from fedsim.api.sweep_plan import Plan, plan
from fedsim.api.sweep_runs import NEW, Listening, OnBegin, OnEnd, OnSweep, one_by_one, side_by_side
from fedsim.config import build
from fedsim.errors import ConfigError
from fedsim.recording import OnRound


def sweep(
    config: str | Path | Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    jobs: int = 1,
    on_start: OnSweep = folders.ignore,
    on_begin: OnBegin = folders.ignore,
    on_round: OnRound = folders.ignore,
    on_end: OnEnd = folders.ignore,
    progress: build.Progress = build.silent,
) -> Sweep:
    """Run every combination of the values of some keys.

    Args:
        config: path of a YAML file, or the same as a mapping.
        changes: dotted key -> value. A list of values is an axis: ``{"train.local_epochs": [1, 5], "seed": [1, 2]}``
            makes four runs. Where the key itself takes a list (``model.channels``), an axis is a list of lists.
        jobs: so many runs at a time, >= 1, each in a process of its own; 1 runs them in this process. With more, a run
            whose engine is ``local`` and whose ``engine.workers`` is auto trains in one process, and keeps to it.
        on_start: called before the first run, with the sweep's folder and its rows.
        on_begin: called when a run in this process begins: its name, rounds done, rounds in all.
        on_round: called after every round of a run in this process.
        on_end: called with the row of every run that has ended.
        progress: as in :func:`run`, for runs in this process.

    Returns:
        The sweep, whose ``rows()`` say what came out. A run that failed is a row like others.

    Raises:
        ConfigError: with every problem of every combination; nothing was written.
        RunError: the sweep's folder cannot be written.
        KeyboardInterrupt: runs under way have saved their state; :func:`resume_sweep` goes on.
    """
    _check_jobs(jobs)
    made = plan(config, changes, alone=jobs > 1)
    folder = runs.create(made.output, f"{made.name}-sweep")
    with runs.writing(folder):
        write_plan(folder, made)
    return _all(folder, made, jobs, Listening(on_start, on_begin, on_round, on_end, progress))


def resume_sweep(
    folder: str | Path,
    *,
    jobs: int = 1,
    on_start: OnSweep = folders.ignore,
    on_begin: OnBegin = folders.ignore,
    on_round: OnRound = folders.ignore,
    on_end: OnEnd = folders.ignore,
    progress: build.Progress = build.silent,
) -> Sweep:
    """Go on with a sweep: finished runs stay, runs that broke off or failed are resumed, missing ones are started.

    Args:
        folder: of the sweep.
        jobs, on_start, on_begin, on_round, on_end, progress: as in :func:`sweep`.

    Raises:
        DataError: it is not the folder of a sweep, or from a newer version.
        RunError: another process is at it, or it cannot be written.
    """
    _check_jobs(jobs)
    path = Path(folder)
    return _all(path, read_plan(path), jobs, Listening(on_start, on_begin, on_round, on_end, progress))


def _check_jobs(jobs: int) -> None:
    if jobs < 1:
        raise ConfigError(f"jobs: must be >= 1, got {jobs}")


def _all(folder: Path, made: Plan, jobs: int, listening: Listening) -> Sweep:
    with runs.exclusive(folder, ".lock", "another process is going on with this sweep"):
        found = {line["run"]: line for line in rows(folder, made)}
        waiting = [one for one in made.combinations() if found[one.name]["status"] != "finished"]
        ended = side_by_side(folder, waiting, jobs) if jobs > 1 else one_by_one(folder, made, waiting, listening)
        try:
            listening.on_start(folder, list(found.values()))
            with contextlib.closing(ended):
                for one, failure in ended:
                    note_failure(folder, one.name, failure)
                    found[one.name] = row(folder, one, failure)
                    write_csv(folder, list(found.values()))
                    listening.on_end(found[one.name])
        finally:
            shutil.rmtree(folder / NEW, ignore_errors=True)  # of a run that was killed while its folder was made
            write_summary(folder, made, rows(folder, made))
    return load_sweep(folder)
