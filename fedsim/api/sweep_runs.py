"""The single runs of a sweep: in this process, or side by side in processes of their own that end with this one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO

from fedsim import runs
from fedsim.api import folders, transferring
from fedsim.api.running import Run, record, resume, simulated
from fedsim.api.sweep_folder import Row, read_plan
from fedsim.api.sweep_plan import Combination, Plan
from fedsim.api.transfer_folder import new_folder as new_transfer_folder
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.errors import FedsimError
from fedsim.federation import Federation
from fedsim.recording import OnRound

SAVING_S = 60  # a process that is told to stop may take so long to save its run
NEW = ".new"  # folder in that of the sweep; run folders are made there, and moved when they have all they need
_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fedsim.api.sweep_runs import child; child()"

OnSweep = Callable[[Path, Sequence[Row]], None]
OnBegin = Callable[[str, int, int], None]
OnEnd = Callable[[Row], None]
Ended = Generator[tuple[Combination, str | None], None, None]


@dataclass(frozen=True)
class Listening:
    """Who is told what goes on; see ``sweeping.sweep``."""

    on_start: OnSweep = folders.ignore
    on_begin: OnBegin = folders.ignore
    on_round: OnRound = folders.ignore
    on_end: OnEnd = folders.ignore
    progress: build.Progress = build.silent


def one_by_one(folder: Path, plan: Plan, waiting: Sequence[Combination], listening: Listening) -> Ended:
    """Each combination with why it failed, None if it did not, as soon as it has ended."""
    for one in waiting:
        yield one, perform(folder, plan, one, listening)


def perform(folder: Path, plan: Plan, one: Combination, listening: Listening) -> str | None:
    """Start a run, or go on with it; why it failed. An interrupt is none of a run's own."""
    try:
        place = folder / one.name
        if (place / "checkpoint" / "state.json").exists():
            told = _on_start(one, listening)
            resume(place, on_start=told, on_round=listening.on_round, progress=listening.progress)
        else:
            shutil.rmtree(place, ignore_errors=True)  # it was killed before there was anything to go on with
            _run(folder, plan, one, listening)
    except FedsimError as error:
        return str(error)
    except Exception as error:  # of somebody's model, say; the other runs go on
        return f"{type(error).__name__}: {error}"
    return None


def _run(folder: Path, plan: Plan, one: Combination, listening: Listening) -> None:
    """What ``running.run`` does, in a folder whose name says what the run is."""
    with importable(plan.beside), folders.one_thread():
        config = plan.config(one)
        if config.transfer is not None:
            _transfer(folder, plan, one, listening)
            return
        federation, engine = build.federation(config, listening.progress)
        engine = folders.prepared(engine, federation, {})
        elsewhere = config.model_copy(update={"output": str(folder / NEW)})
        place = folders.new_folder(elsewhere, federation, engine, plan.beside)
        with runs.writing(place):
            runs.write_config(place, config_files.resolved(config))
            place = place.rename(folder / one.name)
        rounds = partial(simulated, place, federation, engine)
        told = _on_start(one, listening)
        record(place, config, federation, rounds, on_start=told, on_round=listening.on_round)


def _transfer(folder: Path, plan: Plan, one: Combination, listening: Listening) -> None:
    """The same of a transfer."""

    def new(config: Config, beside: Path, engine: str) -> Path:
        elsewhere = config.model_copy(update={"output": str(folder / NEW)})
        place = new_transfer_folder(elsewhere, beside, engine)
        with runs.writing(place):
            runs.write_config(place, config_files.resolved(config))
            return place.rename(folder / one.name)

    transferring.run(
        plan.config(one),
        plan.beside,
        on_start=lambda _, pair: listening.on_begin(one.name, 0, pair.rounds),
        on_round=listening.on_round,
        progress=listening.progress,
        new=new,
    )


def _on_start(one: Combination, listening: Listening) -> Callable[[Run, Federation], None]:
    return lambda run, federation: listening.on_begin(one.name, len(run.rounds), federation.rounds)


# ---------------------------------------------------------------- side by side


@dataclass(frozen=True)
class _Child:
    """A process that does one run. It ends when ``stdin`` is closed, and says on ``stdout`` how the run went."""

    one: Combination
    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]


def side_by_side(folder: Path, waiting: Sequence[Combination], jobs: int) -> Ended:
    """As :func:`one_by_one`, ``jobs`` runs at a time; the order is that in which they end. Closing it ends them."""
    left, running = deque(waiting), dict[int, _Child]()
    try:
        while left or running:
            while left and len(running) < jobs:
                child = _started(folder, left.popleft())
                running[child.stdout.fileno()] = child
            for ended in wait(list(running)):
                assert isinstance(ended, int)  # as all that are waited for
                failure = _failure(running[ended])
                yield running.pop(ended).one, failure
    finally:
        _end(list(running.values()))


def _started(folder: Path, one: Combination) -> _Child:
    """A process with a session of its own: Ctrl-C in a terminal is for us alone, who then end it in good order."""
    command = [sys.executable, "-c", _START, json.dumps(sys.path), str(folder), one.name]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    return _Child(one, process, process.stdin, process.stdout)


def _failure(child: _Child) -> str | None:
    """What a process says of its run, or how it came to its end."""
    answer = child.stdout.read()
    child.stdin.close()
    code = child.process.wait()
    child.stdout.close()
    if answer:
        failure: str | None = json.loads(answer)
        return failure
    return f"its process ended {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"


def _end(children: Sequence[_Child]) -> None:
    try:
        for child in children:
            child.stdin.close()
        until = time.monotonic() + SAVING_S
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, until - time.monotonic()))
    finally:  # those that take too long, or all, if somebody is too impatient
        for child in children:
            child.process.kill()
            child.process.wait()
            child.stdout.close()


def child() -> None:
    """What a process does: one run. Whatever prints meanwhile goes to standard error."""
    _, _, folder, name = sys.argv
    answer = os.dup(1)
    os.dup2(2, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    threading.Thread(target=_watch, daemon=True).start()
    warnings.showwarning = lambda message, category, *_, **__: _warn(name, message, category)
    try:
        plan = read_plan(Path(folder))
        one = next(one for one in plan.combinations() if one.name == name)
        os.write(answer, json.dumps(perform(Path(folder), plan, one, Listening())).encode())
    except KeyboardInterrupt:
        sys.exit(130)


def _watch() -> None:
    """Interrupt the run when nobody is at the other end of standard input any more."""
    while os.read(0, 1):
        pass
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)
    time.sleep(SAVING_S)
    os._exit(1)


def _warn(name: str, message: Warning | str, category: type[Warning]) -> None:
    if category is UserWarning:
        print(f"warning: {name}: {message}", file=sys.stderr)
