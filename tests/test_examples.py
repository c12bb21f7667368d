"""Every example runs as its first line says, in a folder of its own, and stays short."""

import subprocess
import sys
from pathlib import Path

import pytest

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
