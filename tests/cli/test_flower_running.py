"""fedsim flower-run, on the app of the examples."""

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"


def test_an_app_runs_and_its_rounds_and_folder_are_shown(fedsim, folder):
    told = fedsim("flower-run", EXAMPLE, "--seed", "1", "--run-config", "num-server-rounds=2")
    assert told.code == 0, told.err
    lines = told.out.splitlines()
    assert lines[0] == "digits-app: Flower app, 20 clients (as its pyproject.toml says), in one process"
    assert sum(line.startswith(("round 1  loss ", "round 2  loss ")) for line in lines) == 2
    assert any(line.startswith("accuracy on the server's images: ") for line in lines)
    (run,) = (folder / "runs").iterdir()
    assert (run / "report.html").exists()
    assert lines[-2].endswith(f"runs/{run.name}")
    assert fedsim("report", run).code == 0


def test_the_same_seed_prints_the_same_numbers(fedsim):
    def numbers(seed):
        out = fedsim("flower-run", EXAMPLE, "--seed", seed, "--clients", "4", "--output", "elsewhere").out
        return [line.split("  sent")[0] for line in out.splitlines() if line.startswith("round")]

    first = numbers(3)
    assert len(first) == 5
    assert numbers(3) == first != numbers(4)


@pytest.fixture
def app(folder):
    """A copy of the example's pyproject, to be spoilt, with components of its own."""
    made = folder / "app"
    (made / "spoilt_app").mkdir(parents=True)
    text = (EXAMPLE / "pyproject.toml").read_text().replace("digits_app", "spoilt_app")
    (made / "pyproject.toml").write_text(text)
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "error: .: not a Flower app, it has no pyproject.toml"),
        ([EXAMPLE, "--run-config", "learning-rat=1"], "(did you mean learning-rate?)"),
        ([EXAMPLE, "--clients", "0"], "error: --clients: must be >= 1, got 0"),
        (["app"], "cannot be imported: ModuleNotFoundError: No module named 'spoilt_app.server_app'"),
    ],
)
def test_mistakes_are_told_in_one_line_without_a_traceback(fedsim, app, arguments, message):
    told = fedsim("flower-run", *arguments)
    assert told.code == 2
    assert message in told.err
    assert "Traceback" not in told.err
    assert len(told.err.splitlines()) == 1
    assert not told.new


CLIENT = """
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(message, context):
    raise OSError("no disk")
"""
SERVER = """
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
import numpy as np
app = ServerApp()
@app.main()
def main(grid, context):
    FedAvg().start(grid, ArrayRecord({"w": Array(np.zeros(2))}), num_rounds=2)
"""


def test_clients_that_raise_are_named_and_end_the_run_with_code_4(fedsim, app):
    (app / "spoilt_app" / "client_app.py").write_text(CLIENT)
    (app / "spoilt_app" / "server_app.py").write_text(SERVER)
    told = fedsim("flower-run", app, "--clients", "2", "--output", "runs")
    assert told.code == 4
    assert "  client 1 failed, train: OSError: no disk" in told.out
    assert "no client ever answered without an error" in told.err
    assert "(node " in told.err
    assert "Traceback" not in told.err + told.out
