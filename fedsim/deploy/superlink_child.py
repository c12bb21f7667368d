"""Flower's SuperLink as a child process that ends when its parent does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

import fedsim
from fedsim.deploy.address import free_port
from fedsim.errors import RunError

START_S, STOP_S = 60.0, 5.0
TAIL_LINES = 12
_TRIES = 3  # a port that was free may be taken before the child has it
_IN_USE = "address already in use"
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    "FLWR_LOG_LEVEL": "WARNING",  # at INFO a line or two for every message
}


@dataclass(frozen=True)
class Child:
    """A running SuperLink.

    home: its private folder. log: file that its output goes to.
    """

    process: "subprocess.Popen[bytes]"
    port: int
    home: Path
    log: Path

    @property
    def address(self) -> str:
        """Of its interfaces; this machine alone can reach them."""
        return f"127.0.0.1:{self.port}"

    def check(self) -> None:
        """Complain if it has ended.

        Raises:
            RunError: it has; with its last words.
        """
        code = self.process.poll()
        if code is not None:
            raise RunError(f"Flower's SuperLink has ended (exit code {code}), see {self.log}:\n{self.tail()}")

    def tail(self) -> str:
        """Its last words."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 2**16))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def stop(self) -> None:
        """End it, orderly if it can."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in its group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_S)


def environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    """For Flower's programs: nothing that the user has set for Flower itself, but the level of its log.

    They look for each other by name, and an environment need not be activated to be used.
    """
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_") or k == "FLWR_LOG_LEVEL"}
    places = [str(Path(fedsim.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"FLWR_HOME": str(home), "PATH": programs, "PYTHONPATH": os.pathsep.join(places)}
    return {**_QUIET, **kept, **own, **more}


def command(home: Path, program: str, *arguments: str) -> list[str]:
    """How to start one of Flower's programs so that it ends with this process."""
    own = [sys.executable, "-P", "-m", "fedsim.deploy.superlink_process", str(os.getpid()), str(home)]
    return [*own, program, *arguments]


@contextlib.contextmanager
def running(home: Path, log: Path, more: Mapping[str, str], isolation: str) -> Iterator[Child]:
    """A SuperLink that answers, for as long as the context lasts.

    Args:
        home: private folder, for what Flower keeps.
        log: its output is appended to this file.
        more: environment variables.
        isolation: "process", somebody else runs the ServerApp; or "subprocess", it does itself.

    Raises:
        RunError: it does not start.
    """
    child = _started(home, log, more, isolation)
    try:
        yield child
    finally:
        child.stop()


def _started(home: Path, log: Path, more: Mapping[str, str], isolation: str, tries: int = _TRIES) -> Child:
    port = free_port()
    here = ["--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", isolation]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command(home, "flower-superlink", *here),
            env=environment(home, {**more, "PYTHONUNBUFFERED": "1"}),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    child = Child(process, port, home, log)
    try:
        _wait(child)
    except BaseException:
        child.stop()
        if tries > 1 and _IN_USE in child.tail():
            return _started(home, log, more, isolation, tries - 1)
        raise
    return child


def _wait(child: Child) -> None:
    """Until it answers."""
    end = time.monotonic() + START_S
    with httpx.Client(trust_env=False, timeout=1) as client:
        while True:
            child.check()
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"http://{child.address}/health").status_code == 200:
                    return
            if time.monotonic() >= end:
                raise RunError(f"Flower's SuperLink did not start within {START_S:g} s:\n{child.tail()}")
            time.sleep(0.05)
