"""The command line called in this process, in an empty folder, with what it printed and whether it left anything."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsim import cli

CONFIG = """
name: small
seed: 3
data: {dataset: digits, clients: 6, split: {name: dirichlet, alpha: 0.5}}
model: {name: mlp, hidden: [8]}
train: {rounds: 2, clients_per_round: 3, batch_size: 32}
"""


@dataclass(frozen=True)
class Result:
    """code: exit code. new: files and folders that were not there before."""

    code: int
    out: str
    err: str
    new: frozenset[str]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder with config.yaml in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def fedsim(folder, monkeypatch, capsys) -> Callable[..., Result]:
    """Call the command line with arguments."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: str) -> Result:
        there = {str(path) for path in folder.rglob("*")}
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        now = {str(path) for path in folder.rglob("*") if "__pycache__" not in str(path)}
        return Result(int(ended.value.code or 0), out, err, frozenset(now - there))

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def process(folder) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line in a process of its own."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        # A process started in the background of a script ignores SIGINT, and so do its children: ask for it again.
        heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heard}; import sys; from fedsim.cli import main; sys.argv[0] = 'fedsim'; main()"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
