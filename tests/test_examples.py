"""Every example runs as its first line says, in a folder of its own, and stays short."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fedsim

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_five_examples():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_reports_a_sensible_accuracy(path, tmp_path):
    assert len(path.read_text().splitlines()) < 60
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    numbers = [float(word.strip(":,;")) for word in last.split() if word.strip(":,;").startswith("0.")]
    assert numbers, last
    assert numbers[0] > 0.5  # chance is 0.1, or 0.63 for the majority class of the hospitals


@pytest.mark.slow
def test_a_server_and_two_clients_do_what_the_script_says(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "two_machines" / "run.sh"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PORT": port}
    done = subprocess.run(
        ["sh", script, tmp_path], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "the server says that the run is over" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    assert fedsim.load(run).summary["accuracy"] > 0.9 and fedsim.verify(run, "all").status == "equal"
