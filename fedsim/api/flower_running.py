"""Run an existing Flower app, unchanged, on the in-process grid, and write a run folder of what can be seen of it."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from fedsim import environment, runs
from fedsim.api import flower_folder, folders
from fedsim.api.flower_folder import FlowerApp
from fedsim.api.flower_recording import Recording
from fedsim.api.running import Run
from fedsim.engines.flower.seeding import seeded
from fedsim.errors import ConfigError, RunError
from fedsim.recording import OnRound

CLIENTS = 10  # where neither the caller nor the app says
SEEDS = 2**32


def flower_run(
    path: str | Path,
    *,
    clients: int | None = None,
    run_config: Sequence[str] = (),
    seed: int | None = None,
    output: str | Path = "runs",
    threads: int = 1,
    on_start: Callable[[Run, FlowerApp, int], None] | None = None,
    on_round: OnRound | None = None,
) -> Run:
    """Run a Flower app without Ray or a SuperLink and write a run folder.

    Args:
        path: the app's folder; its pyproject.toml names its ServerApp and its ClientApp.
        clients: nodes of the grid, >= 1. None: as many as the app's default federation has, or 10.
        run_config: as for ``flwr run``: ``k=v k2='s'``, or the path of a .toml file.
        seed: of Python's, NumPy's and torch's global generators, in [0, 2^32), so that the run repeats; None leaves
            them alone.
        output: folder of run folders.
        threads: of torch, >= 1. With one, numbers do not depend on the number of cores.
        on_start: called with the new folder, the app and the number of clients.
        on_round: called when a round is known to be over, as far as rounds can be seen.

    Returns:
        The run. Its folder has kind ``flower-app``: it cannot be resumed, and ``not_seen`` in its summary says what the
        app did not show.

    Raises:
        ConfigError: no such app, or one that does not import; nothing was written.
        RunError: the ServerApp failed, or no client ever answered; the folder says so.
    """
    from fedsim.engines.flower import foreign  # noqa: PLC0415 -- flwr takes half a second to import

    app = flower_folder.read(Path(path))
    config = flower_folder.run_config(app, run_config)
    number = _checked((app.clients or CLIENTS) if clients is None else clients, seed, threads)
    with flower_folder.importable(app), _torch_threads(threads):
        with seeded(seed):  # a module may draw while it is imported
            server, client = (flower_folder.component(app, key, kind) for key, kind in foreign.KINDS.items())
        if foreign.legacy(server):
            rule = "must have a main function; this one was made with server_fn, for Flower's older API"
            raise ConfigError(f"{app.path / 'pyproject.toml'}: serverapp {app.components['serverapp']!r}: {rule}")
        folder = _new_folder(app, config, number, seed, Path(output).expanduser())
        recording = Recording(folder, app.name, number, on_round or folders.ignore)
        with recording, _captured(folder / "log.txt") as log:
            (on_start or folders.ignore)(Run(folder), app, number)
            try:
                foreign.run(server, client, recording.watch, clients=number, config=config, seed=seed, log=log.name)
            except (Exception, SystemExit) as error:
                log.write(traceback.format_exc())
                what = f"serverapp {app.components['serverapp']!r} failed: {flower_folder.told(error, app)}"
                raise RunError(f"{what}; the traceback is in {folder / 'log.txt'}") from error
            if recording.watch.messages and not recording.watch.answers:
                raise RunError(f"no client ever answered without an error; the first: {recording.watch.first_failure}")
    return Run(folder)


def _checked(clients: int, seed: int | None, threads: int) -> int:
    if clients < 1:
        raise ConfigError(f"--clients: must be >= 1, got {clients}")
    if seed is not None and not 0 <= seed < SEEDS:
        raise ConfigError(f"--seed: must be in [0, {SEEDS}), got {seed}")
    if threads < 1:
        raise ConfigError(f"--threads: must be >= 1, got {threads}")
    return clients


def _new_folder(app: FlowerApp, config: dict[str, Any], clients: int, seed: int | None, output: Path) -> Path:
    folder = runs.create(output, app.name)
    engine = {"name": "flower", "runtime": "in-process", "processes": 1}
    components = {"path": str(app.path), **app.components}
    said = {"name": app.name, "flower_app": components, "run_config": config, "data": {"clients": clients}}
    with runs.writing(folder):
        runs.write_config(folder, {**said, "seed": seed, "engine": {"name": "flower", "runtime": "in-process"}})
        runs.write_json(folder / "environment.json", {**environment.describe(engine), "config_folder": str(app.path)})
    return folder


# ---------------------------------------------------------------- around the app


@contextlib.contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Tee:
    """A stream that is also written to a file."""

    def __init__(self, shown: TextIO, log: TextIO) -> None:
        self._shown, self._log = shown, log

    def write(self, text: str) -> int:
        """Write to both."""
        self._log.write(text)
        return self._shown.write(text)

    def flush(self) -> None:
        """Flush both."""
        self._log.flush()
        self._shown.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)


@contextlib.contextmanager
def _captured(path: Path) -> Iterator[TextIO]:
    """What is printed is also written to a file. Not what libraries write past Python, to file descriptors."""
    with path.open("a", encoding="utf-8", buffering=1) as log:
        out: Any = _Tee(sys.stdout, log)
        err: Any = _Tee(sys.stderr, log)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield log
