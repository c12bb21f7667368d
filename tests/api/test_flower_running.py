"""Flower apps, written as their authors would, run from their folder and leave a run folder of what they show."""

import itertools
import json
import random
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import fedsim
from fedsim import runs
from fedsim.api.flower_running import flower_run
from fedsim.errors import ConfigError, DataError, RunError
from fedsim.report import report

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"
NAMES = itertools.count()

CLIENT = """
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
import numpy as np

app = ClientApp()

@app.train()
def train(message, context):
    k = context.node_config["partition-id"]
    w = message.content["arrays"]["w"].numpy() + context.run_config["step"] * (-2.0) ** k
    metrics = MetricRecord({"num-examples": k + 1, "train-loss": float(k)})
    return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    k, w = context.node_config["partition-id"], message.content["arrays"]["w"].numpy()
    metrics = {"num-examples": k + 1, "eval_loss": float(w.sum()) * (k - 1), "eval-acc": 0.25 * k, "many": [1.0, 2.0]}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
"""

SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    start = ArrayRecord({"w": Array(np.array([1.0, -1.0]))})
    FedAvg().start(grid, start, num_rounds=context.run_config["rounds"])
    print("the app says hello")
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Write an app with a package name of its own; returns its folder."""
    monkeypatch.chdir(tmp_path)

    def make(server=SERVER, client=CLIENT, more="", config="rounds = 3\nstep = 0.5"):
        package = f"flower_app_{next(NAMES)}"
        folder = tmp_path / "app"
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
        (folder / package / "server.py").write_text(textwrap.dedent(server))
        (folder / package / "client.py").write_text(textwrap.dedent(client))
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "my app"\nversion = "1"\n[tool.flwr.app.components]\n'
            f'serverapp = "{package}.server:app"\nclientapp = "{package}.client:app"\n'
            f"[tool.flwr.app.config]\n{config}\n{more}\n"
        )
        return folder

    return make


def step(clients=3):
    """What a round of FedAvg adds, with weights 1, 2, ..."""
    return 0.5 * np.average([(-2.0) ** k for k in range(clients)], weights=range(1, clients + 1))


def test_an_app_leaves_a_folder_with_its_rounds_its_model_and_its_log(app, capsys):
    path = list(sys.path)
    run = flower_run(app(), clients=3)
    assert run.folder.name.startswith("my-app-")
    found = run.summary
    assert (found["kind"], found["status"], found["rounds"], found["rounds_done"]) == ("flower-app", "finished", 3, 3)
    assert (found["clients"], found["strategies"], found["failed_messages"], found["not_seen"]) == (
        3,
        ["FedAvg"],
        0,
        [],
    )
    w = [np.array([1.0, -1.0]) + r * step() for r in range(4)]
    np.testing.assert_allclose(safetensors.torch.load_file(run.folder / "model.safetensors")["w"], w[3])
    for r, record in enumerate(run.rounds, 1):
        assert (record.round, record.clients, record.cohort) == (r, 3, (0, 1, 2))
        assert record.train_loss == pytest.approx((0 + 2 * 1 + 3 * 2) / 6)
        assert record.accuracy == pytest.approx((0 + 2 * 0.25 + 3 * 0.5) / 6)
        assert record.loss == pytest.approx(w[r].sum() * (-1 * 1 + 0 + 1 * 3) / 6)
        assert record.client_accuracy_mean == pytest.approx(0.25)
        assert record.bytes_up > 0 < record.bytes_down
        assert record.seconds > 0
    assert [(e.client, e.num_examples, e.accuracy) for e in run.clients[:3]] == [(0, 1, 0.0), (1, 2, 0.25), (2, 3, 0.5)]
    metrics = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert metrics[1]["round"] == 2
    assert metrics[1]["evaluate"]["many"] == pytest.approx([1.0, 2.0])
    assert metrics[1]["server"] == {}
    log = (run.folder / "log.txt").read_text()
    assert "the app says hello" in log
    assert "[ROUND 2/3]" in log
    assert "the app says hello" in capsys.readouterr().out
    assert run.config["run_config"] == {"rounds": 3, "step": 0.5}
    assert sys.path == path


def test_the_folder_can_be_opened_reported_and_is_refused_where_it_makes_no_sense(app):
    run = fedsim.load(flower_run(app(), clients=2).folder)
    page = report.write(run.folder).read_text()
    assert "A Flower app, run as it is" in page
    assert "What it does not show" not in page
    assert "of 3 planned" in page
    with pytest.raises(DataError, match="a Flower app has no checkpoint and cannot be resumed"):
        fedsim.resume(run.folder)
    with pytest.raises(DataError, match="a Flower app makes its model in its own code"):
        run.model()
    assert runs.open_run(run.folder).model()["w"].shape == (2,)


def test_the_run_config_is_the_apps_with_changes(app):
    run = flower_run(app(), clients=2, run_config=["rounds=1 step=-2.0"])
    assert run.config["run_config"] == {"rounds": 1, "step": -2.0}
    w = np.array([1.0, -1.0]) - 2.0 * (1 - 2 * 2) / 3
    np.testing.assert_allclose(runs.open_run(run.folder).model()["w"], w)


def test_clients_are_those_of_the_default_federation_or_ten(app):
    more = '[tool.flwr.federations]\ndefault = "a"\n[tool.flwr.federations.a]\noptions.num-supernodes = 4'
    folder = app(more=more)
    assert flower_run(folder).summary["clients"] == 4
    assert flower_run(folder, clients=2).summary["clients"] == 2
    (folder / "pyproject.toml").write_text((folder / "pyproject.toml").read_text().replace(more, ""))
    assert flower_run(folder).summary["clients"] == 10


SERVER_EVALUATES = (
    SERVER.replace("num_rounds=", "evaluate_fn=test, num_rounds=")
    + """
from flwr.app import MetricRecord

def test(server_round, arrays):
    return MetricRecord({"accuracy": 0.1 * server_round, "loss": float(arrays["w"].numpy()[0])})
"""
)


def test_the_servers_own_evaluation_comes_before_the_clients(app):
    run = flower_run(app(SERVER_EVALUATES), clients=3)
    assert [r.accuracy for r in run.rounds] == pytest.approx([0.1, 0.2, 0.3])
    assert [r.loss for r in run.rounds] == pytest.approx([1 + r * step() for r in (1, 2, 3)])
    assert run.summary["initial"] == {"round": 0, "loss": 1.0, "accuracy": 0.0}


OWN_LOOP = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    w = np.array([1.0, -1.0])
    for r in (1, 2):
        for kind in ("train", "evaluate"):
            said = ConfigRecord({"server-round": r} if context.run_config["say"] else {})
            content = RecordDict({"arrays": ArrayRecord({"w": Array(w)}), "config": said})
            replies = grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()])
            if kind == "train":
                w = np.mean([reply.content["arrays"]["w"].numpy() for reply in replies], axis=0)
"""


def test_of_a_loop_without_a_strategy_the_messages_are_seen(app):
    run = flower_run(app(OWN_LOOP, config="say = true\nstep = 0.5"), clients=3)
    assert [r.round for r in run.rounds] == [1, 2]
    assert run.rounds[0].train_loss == pytest.approx((0 + 2 * 1 + 3 * 2) / 6)
    assert run.rounds[0].accuracy == pytest.approx((0 + 2 * 0.25 + 3 * 0.5) / 6)
    told = run.summary["not_seen"]
    assert len(told) == 2
    assert told[0].startswith("The server's own metrics: the app starts no Flower strategy")
    assert told[1].startswith("The final model")
    assert not (run.folder / "model.safetensors").exists()
    with pytest.raises(DataError, match="has not shown any arrays"):
        runs.open_run(run.folder).model()


def test_an_app_whose_rounds_cannot_be_seen_runs_and_its_folder_says_so(app):
    run = flower_run(app(OWN_LOOP, config="say = false\nstep = 0.5"), clients=3)
    assert run.rounds == []
    assert run.summary["status"] == "finished"
    assert run.summary["not_seen"][0].startswith("Rounds: the app starts no Flower strategy, and its messages")
    assert "What it does not show: Rounds:" in report.write(run.folder).read_text()


SUBCLASS = SERVER.replace("FedAvg().start", "Mine().start").replace(
    "app = ServerApp()",
    """
from flwr.serverapp.strategy import Result

class Mine(FedAvg):
    def start(self, grid, initial_arrays, num_rounds):
        first = super().start(grid, initial_arrays, num_rounds=num_rounds)
        return super().start(grid, first.arrays, num_rounds=1)

app = ServerApp()
""",
)
TWICE = SERVER.replace("    print", "    FedAvg(fraction_evaluate=0.0).start(grid, start, num_rounds=2)\n    print")


def test_rounds_of_a_second_strategy_are_counted_on(app):
    run = flower_run(app(TWICE), clients=2)
    assert [r.round for r in run.rounds] == [1, 2, 3, 4, 5]
    assert [r.loss is None for r in run.rounds] == [False, False, False, True, True]
    assert run.summary["rounds"] == 5
    assert run.summary["strategies"] == ["FedAvg", "FedAvg"]
    np.testing.assert_allclose(runs.open_run(run.folder).model()["w"], np.array([1.0, -1.0]) + 2 * step(2))


def test_the_start_of_a_subclass_is_seen_and_put_back(app):
    from flwr.serverapp.strategy import FedAvg, Strategy

    before = Strategy.__dict__["start"]
    run = flower_run(app(SUBCLASS), clients=2)
    assert run.summary["strategies"] == ["Mine"]
    np.testing.assert_allclose(runs.open_run(run.folder).model()["w"], np.array([1.0, -1.0]) + 4 * step(2))
    assert Strategy.__dict__["start"] is before
    assert "start" not in FedAvg.__dict__


RAISES = CLIENT.replace("    w = message", "    if k == 1: raise ValueError('no data here')\n    w = message", 1)


def test_a_client_that_raises_is_counted_named_and_logged(app):
    told = []
    run = flower_run(app(client=RAISES), clients=3, on_round=told.append)
    assert [r.failed for r in run.rounds] == [{1: "train: ValueError: no data here"}] * 3
    assert [r.cohort for r in told] == [(0, 2)] * 3
    assert run.summary["failed_messages"] == 3
    assert run.summary["first_failure"] == "round 1, client 1 (node 3), train: ValueError: no data here"
    log = (run.folder / "log.txt").read_text()
    assert 'client.py", line' in log
    assert "Traceback" in log


def test_a_run_in_which_no_client_ever_answers_fails(app):
    broken = CLIENT.replace("    k = context", "    raise OSError('no disk')\n    k = context").replace(
        "    k, w", "    1 / 0\n    k, w"
    )
    with pytest.raises(RunError, match=r"no client ever .*round 1, client \d \(node \d\), train: OSError: no disk"):
        flower_run(app(client=broken), clients=2)
    (folder,) = Path("runs").iterdir()
    assert runs.open_run(folder).summary()["status"] == "failed"


@pytest.mark.parametrize(
    ("change", "status"),
    [("raise KeyError('w')", "failed"), ("raise KeyboardInterrupt", "interrupted"), ("exit(3)", "failed")],
)
def test_a_server_that_breaks_off_leaves_its_rounds_and_its_last_model(app, change, status):
    folder = app(SERVER.replace("    print", f"    {change}\n    print"))
    with pytest.raises(KeyboardInterrupt if status == "interrupted" else RunError) as caught:
        flower_run(folder, clients=2)
    run = runs.open_run(next(Path("runs").iterdir()))
    assert len(run.rounds()) == 3
    assert run.summary()["status"] == status
    np.testing.assert_allclose(run.model()["w"], np.array([1.0, -1.0]) + 3 * step(2))
    if change.startswith("raise KeyError"):
        assert "failed: KeyError: 'w' (flower_app_" in str(caught.value)
        assert "server.py, line 13)" in str(caught.value)
        assert "Traceback" in (run.path / "log.txt").read_text()


def test_a_strategy_that_breaks_off_leaves_what_it_had_aggregated(app):
    breaks = SERVER_EVALUATES.replace(
        "    return MetricRecord", "    if server_round == 2: raise OSError('no disk')\n    return MetricRecord"
    )
    with pytest.raises(RunError, match="OSError: no disk"):
        flower_run(app(breaks), clients=3)
    run = runs.open_run(next(Path("runs").iterdir()))
    assert [(r.round, r.accuracy) for r in run.rounds()] == [(1, 0.1), (2, pytest.approx((0.5 + 1.5) / 6))]
    np.testing.assert_allclose(run.model()["w"], np.array([1.0, -1.0]) + 2 * step())
    assert run.summary()["rounds"] == 3


def test_what_a_module_draws_while_it_is_imported_is_seeded_too(app):
    server = SERVER.replace("app = ServerApp()", "W = np.random.rand(2)\napp = ServerApp()").replace(
        "np.array([1.0, -1.0])", "W"
    )
    run = flower_run(app(server), clients=2, seed=5, run_config=["rounds=1"])
    np.testing.assert_allclose(runs.open_run(run.folder).model()["w"], np.random.RandomState(5).rand(2) + step(2))


def test_a_seed_makes_an_app_repeat_and_changes_no_generator():
    before = random.getstate(), torch.get_rng_state()
    found = [flower_run(EXAMPLE, clients=6, seed=seed, output="runs") for seed in (1, 1, 2)]
    first, again, other = (runs.open_run(run.folder).model() for run in found)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    rounds = [[(r.cohort, r.loss, r.accuracy) for r in run.rounds] for run in found]
    assert rounds[0] == rounds[1] != rounds[2]
    assert rounds[0][-1][2] > 0.6
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clients": 0}, "--clients: must be >= 1, got 0"),
        ({"seed": -1}, r"--seed: must be in \[0, 4294967296\), got -1"),
        ({"threads": 0}, "--threads: must be >= 1, got 0"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(app, given, message):
    with pytest.raises(ConfigError, match=message):
        flower_run(app(), **given)
    assert not Path("runs").exists()


def test_an_app_of_the_older_api_is_refused_by_name(app):
    with pytest.raises(ConfigError, match="this one was made with server_fn, for Flower's older API"):
        flower_run(app("from flwr.serverapp import ServerApp\napp = ServerApp(server_fn=lambda context: None)"))
