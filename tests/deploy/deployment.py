"""A federation of real processes on loopback: a server and its clients as their users start them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fedsim.deploy import authority

CONFIG = """
name: apart
seed: 3
data: {{dataset: digits, clients: {clients}, split: {{name: dirichlet, alpha: 1.0}}}}
model: {{name: mlp, hidden: [16]}}
train: {{rounds: {rounds}, batch_size: 32, optimizer: {{name: sgd, lr: 0.1}}}}
"""


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@dataclass
class Deployment:
    folder: Path
    clients: int = 3
    rounds: int = 4
    secure: bool = True
    stock: bool = False
    prefix: dict = field(default_factory=dict)  # name of a process -> words before its command
    host: str = "127.0.0.1"
    names: tuple = ("127.0.0.1",)  # of the server
    processes: dict = field(default_factory=dict)

    def __post_init__(self):
        self.address = f"{self.host}:{free_port()}"
        (self.folder / "config.yaml").write_text(CONFIG.format(clients=self.clients, rounds=self.rounds))
        if self.secure:
            authority.make(self.folder / "certs", self.names, self.clients)

    def start(self, name, *arguments):
        """Start a command of fedsim; what it prints goes to NAME.log."""
        security = ["--certs", "certs"] if self.secure else ["--insecure"]
        security = [] if "--certs" in arguments else security
        command = [*self.prefix.get(name, []), sys.executable, "-m", "fedsim", *map(str, arguments), *security]
        command += ["--stock"] * self.stock
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        return self.processes[name]

    def server(self, *more):
        return self.start("server", "server", "config.yaml", "--listen", self.address, *more)

    def resume(self, run):
        return self.start("server", "server", "--resume", run, "--listen", self.address)

    def client(self, k, *more, server=None):
        address = self.address if server is None else f"{server}:{self.address.rpartition(':')[2]}"
        fixed = ("--server", address, "--partition", k, "--state", self.folder / f"state-{k}")
        return self.start(f"client-{k}", "client", "config.yaml", *fixed, *more)

    def said(self, name):
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def until(self, name, text, seconds=60):
        """Wait until a process has said something."""
        wait(lambda: text in self.said(name), seconds, lambda: f"{name} did not say {text!r}:\n{self.told()}")

    def run(self):
        (found,) = (self.folder / "runs").iterdir()
        return found

    def lines(self):
        path = next(iter((self.folder / "runs").glob("*/rounds.jsonl")), None)
        return [json.loads(line) for line in path.read_text().splitlines()] if path else []

    def until_round(self, round, seconds=60):
        wait(lambda: len(self.lines()) >= round, seconds, lambda: f"round {round} did not end:\n{self.told()}")

    def ends(self, name, seconds=60):
        """The exit code of a process."""
        try:
            return self.processes[name].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} did not end:\n{self.told()}") from None

    def told(self):
        return "\n".join(f"--- {name}\n{self.said(name)}" for name in self.processes)

    def left(self):
        """Processes of this deployment that are still there, children included: they carry the folder's name."""
        mark, found = str(self.folder).encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = path.joinpath("environ").read_bytes() + path.joinpath("cmdline").read_bytes()
                if mark in words and path.name != str(os.getpid()) and path.joinpath("cmdline").read_bytes():
                    found.append((int(path.name), path.joinpath("cmdline").read_bytes().replace(b"\0", b" ")[:200]))
        return found

    def close(self):
        for pid, _ in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait(10)


def wait(true, seconds, message):
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError(message())
        time.sleep(0.05)
