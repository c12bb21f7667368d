"""The two ways to be the server of a run: the quick one, and the one of Flower's supported interfaces alone."""

import concurrent.futures
import contextlib
import json
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedsim.deploy import relay
from fedsim.deploy.superlink_child import command, environment
from fedsim.errors import RunError

CLI_S = 60.0
COME_S = 60.0  # for Flower's server process to come
GO_S = 12.0  # for it to go: it tries to hand its result in
_NAME = "fedsim"  # of the connection in Flower's config file

App = Mapping[str, bytes]  # file name -> content
Check = Callable[[], None]


@dataclass(frozen=True)
class Side:
    """What to do with a SuperLink.

    environment, isolation: to start it with.
    register: its address and public key files of clients -> their node ids.
    header: a public key file -> how that client names itself in requests; None: not known.
    opens: its address and a check that it runs -> the grid of a run, started for it.
    """

    environment: Mapping[str, str]
    isolation: str
    register: Callable[[str, Mapping[int, Path]], dict[int, int]]
    header: Callable[[Path], bytes] | None
    opens: Callable[[str, Check], AbstractContextManager[Grid]]


@contextlib.contextmanager
def quick(app: App) -> Iterator[Side]:
    """Be the ServerApp in this process."""
    from fedsim.deploy.interventions import server  # noqa: PLC0415  only where it fits

    @contextlib.contextmanager
    def opens(address: str, check: Check) -> Iterator[Grid]:
        server.start(address, app)
        with server.serverapp(address, check) as grid:
            yield grid

    yield Side({}, "process", server.register, server.header, opens)


@contextlib.contextmanager
def stock(home: Path, app: App) -> Iterator[Side]:
    """Flower starts a process of its own for the ServerApp, and its grid is reached from here."""
    word = secrets.token_bytes(32)
    for name, content in app.items():
        (home / "app").mkdir(exist_ok=True)
        (home / "app" / name).write_bytes(content)
    with relay.listening(home, word) as listener:
        told = {relay.SOCKET: str(listener.address), relay.WORD: word.hex()}
        try:
            yield Side(told, "subprocess", partial(_register, home), None, partial(_relayed, home, listener, word))
        finally:
            _end_all(home)


def _register(home: Path, address: str, keys: Mapping[int, Path]) -> dict[int, int]:
    """One call of Flower's command line for each key, a second each."""
    _connect(home, address)

    def one(path: Path) -> int:
        return int(_flwr(home, "supernode", "register", str(path.resolve()), _NAME)["node-id"])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as several:
        return dict(zip(keys, several.map(one, keys.values()), strict=True))


def _connect(home: Path, address: str) -> None:
    text = f'[superlink]\ndefault = "{_NAME}"\n\n[superlink.{_NAME}]\naddress = "{address}"\ninsecure = true\n'
    (home / "config.toml").write_text(text)


@contextlib.contextmanager
def _relayed(home: Path, listener: Listener, word: bytes, address: str, check: Check) -> Iterator[Grid]:
    _connect(home, address)
    run = str(_flwr(home, "run", str(home / "app"), _NAME)["run-id"])
    here = threading.Event()

    def come() -> bool:
        check()
        return not _status(home, run).startswith("finished")

    unblock = partial(Client, str(listener.address), authkey=word)
    threading.Thread(target=_give_up, args=(come, unblock, here), daemon=True).start()
    try:
        with relay.relayed(listener) as grid:
            here.set()
            yield grid
    except EOFError as error:
        raise RunError(f"Flower's server process did not come: {_status(home, run)}") from error
    except RunError as error:
        check()
        raise RunError(f"{error}: {_status(home, run)}") from error
    finally:
        here.set()
    end = time.monotonic() + GO_S
    while not _status(home, run).startswith("finished") and time.monotonic() < end:
        check()


def _give_up(come: Callable[[], bool], unblock: Callable[[], Any], here: threading.Event) -> None:
    """End the wait for Flower's server process if it will not come."""
    end = time.monotonic() + COME_S
    with contextlib.suppress(RunError):
        while time.monotonic() < end and not here.wait(0.5) and come():
            pass
    if not here.is_set():
        unblock().close()


def _status(home: Path, run: str) -> str:
    (found,) = _flwr(home, "list", _NAME, "--run-id", run)["runs"]
    return f"{found['status']} {found.get('status-details') or ''}".strip()


def _flwr(home: Path, *arguments: str) -> dict[str, Any]:
    """What Flower's command line answers."""
    call = command(home, "flwr", *arguments, "--format", "json")
    try:
        done = subprocess.run(
            call, env=environment(home, {}), cwd=home, capture_output=True, text=True, timeout=CLI_S, check=False
        )
        found: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        output = done.stdout + done.stderr if isinstance(error, ValueError) else f"no answer within {CLI_S:g} s"
        raise RunError(f"flwr {' '.join(arguments[:2])} failed: {output.strip()}") from error
    if not found.get("success", True):
        raise RunError(f"flwr {' '.join(arguments[:2])} failed: {found.get('error-message', found)}")
    return found


def _end_all(home: Path) -> None:
    """End what Flower started: in sessions of their own, so they are known by their private folder only."""
    end = time.monotonic() + GO_S
    while (left := _processes(home)) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _processes(home: Path) -> list[int]:
    """Processes whose environment names the folder; [] on systems that do not tell."""
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
