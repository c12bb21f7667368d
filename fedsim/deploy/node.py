"""Flower's SuperNode in a process of its own, and what its log says."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedsim import runs
from fedsim.deploy.address import Address, free_port
from fedsim.deploy.certificates import ClientFiles

STOP_S = 6.0  # it tells the server and ends in one; after five it ends in any case
KEPT_LINES = 200
END = "query.end"  # type of the message that says that the run is over

_FLOWERS = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) *:|(?=Successfully installed )")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "FLWR_LOG_LEVEL": "INFO",  # what is read below
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Setup:
    """How to start a SuperNode.

    files: None: no TLS and no key. partition: of the node's config. quick: with interventions, and its tasks are done
    by this process; else by Flower's own ways.
    """

    server: Address
    files: ClientFiles | None
    partition: int
    quick: bool


@dataclass(frozen=True)
class Ended:
    """How a SuperNode ended.

    status: of the process; negative: the signal. code: Flower's own exit code, 0 if it gave none. told: what it said
    about it. online: whether it had reached the server.
    """

    status: int
    code: int
    told: str
    online: bool


@dataclass
class Log:
    """What the lines of a SuperNode's log have said so far.

    node: its id, once it is online. away: since when (``time.monotonic``) the server does not answer, or None.
    idle: no message is between its arrival and the end of its reply. over: the server has said that the run is over,
        and has the reply. code: exit code.
    """

    node: int | None = None
    away: float | None = None
    idle: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    code: int = 0
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    _ending: bool = False

    def __post_init__(self) -> None:
        self.idle.set()

    def read(self, line: str) -> str | None:
        """Take in a line; the line if it is not Flower's but of an app that prints."""
        plain = _COLOUR.sub("", line.rstrip())
        flowers = _FLOWERS.match(plain)
        text = plain[flowers.end() :].strip() if flowers else plain
        if text:
            self.lines.append(text)
        if flowers is None:
            return plain if plain and not self.code else None
        self._note(text)
        return None

    def _note(self, text: str) -> None:
        if found := re.fullmatch(r"SuperNode ID: (\d+)", text):
            self.node, self.away = int(found[1]), None
        elif found := re.match(r"Exit Code: (\d+)", text):
            self.code = int(found[1])
            self.lines.clear()  # what follows is about it
        elif found := re.match(r"Receiving: (\S+) message", text):
            self._ending = found[1] == END
            self.idle.clear()
        elif text.startswith("Connection attempt failed"):
            self.away = self.away or time.monotonic()
        elif text.startswith("Connection successful"):
            self.away = None
        elif re.match(r"Sent successfully|Failed to|.*Ignoring ", text):
            if self._ending and text == "Sent successfully":
                self.over.set()
            self.idle.set()

    def told(self) -> str:
        """The last words, without addresses of Flower's help pages."""
        whole = itertools.takewhile(lambda line: not line.startswith("For more information"), list(self.lines))
        return "; ".join(list(whole) if self.code else list(self.lines)[-3:])


class SuperNode:
    """A running SuperNode. Lines that are not Flower's own go to ``say``, if Flower runs the app itself."""

    def __init__(self, setup: Setup, say: Callable[[str], None]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedsim-node-"))
        self.secret = secrets.token_bytes(32)
        self.runtime = Address("127.0.0.1", free_port())
        self.log = Log()
        self._ended: Ended | None = None
        self._clearing = threading.Lock()  # two threads may find that it has to go
        self._say = (lambda line: None) if setup.quick else say  # no app prints there, only what goes wrong in Flower
        self._process = subprocess.Popen(
            self._command(setup),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="SuperNode's log", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of its process, and of the group of all that it starts."""
        return self._process.pid

    def wait(self, seconds: float) -> bool:
        """Wait for its end; whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> bool:
        """End it and all that it started; whether it ended by itself, and so could tell the server."""
        self._process.terminate()
        ended = self.wait(STOP_S)
        self.clear()
        return ended

    def clear(self) -> Ended:
        """Remove what is left of it: how it ended."""
        with self._clearing:
            if self._ended is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                status = self._process.wait()
                self._reader.join(2)
                shutil.rmtree(self.folder, ignore_errors=True)
                self._ended = Ended(status, self.log.code, self.log.told(), self.log.node is not None)
        return self._ended

    def _command(self, setup: Setup) -> list[str]:
        module = [sys.executable, "-P", "-m", "fedsim.deploy.supernode_process"]
        ours = [str(os.getpid()), str(self.folder), "quick" if setup.quick else "stock"]
        files = setup.files
        security = ["--insecure"]
        if files is not None:
            security = ["--root-certificates", str(files.ca), "--auth-supernode-private-key", str(files.key)]
        node = ["--superlink", str(setup.server), "--node-config", f"partition-id={setup.partition}"]
        runtime = ["--host", self.runtime.host, "--port", str(self.runtime.port)]
        if setup.quick:
            secret = self.folder / "secret"
            secret.write_bytes(self.secret)  # the folder is this user's alone
            runtime += ["--isolation", "process", "--superexec-auth-secret-file", str(secret)]
        return [*module, *ours, *security, *node, *runtime]

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                told = self.log.read(line)
                if told is not None:
                    self._say(told)


def _environment() -> dict[str, str]:
    """That of this process, with Flower's network services off, its programs found, and no proxy between processes."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    direct = ",".join(
        filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1,localhost,::1"])
    )
    return {**os.environ, **_ENVIRONMENT, "PATH": path, "NO_PROXY": direct, "no_proxy": direct}


@dataclass(frozen=True)
class Remembered:
    """The id of a key's node, in a file: with it, a client that comes back can say that its former self is gone.

    path: of the file. public: the key's public part; the id of another key's node is of no use.
    """

    path: Path
    public: Path

    def read(self) -> int | None:
        """The id; None if it is not known, or is that of another key."""
        try:
            found = json.loads(self.path.read_text())
            return int(found["node"]) if found["key"] == self._fingerprint() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, node: int) -> None:
        """Keep it, if the folder can be written to."""
        with contextlib.suppress(OSError):
            runs.write_bytes(self.path, json.dumps({"key": self._fingerprint(), "node": node}).encode())

    def _fingerprint(self) -> str:
        return hashlib.sha256(self.public.read_bytes()).hexdigest()
