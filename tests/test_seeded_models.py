"""Models that draw from torch's global generator: whole runs repeat, wherever and in whatever order clients train."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import fedsim
from fedsim import params as p
from fedsim import runs
from fedsim.baselines import each_alone, train_centralised
from fedsim.config import build, load
from fedsim.engines.engine import client_key
from fedsim.engines.reference import reference
from fedsim.federation import job, start
from fedsim.records import Broadcast
from fedsim.training.client import train_client

DRAWING = """
import torch
import torch.nn.functional as F
from torch import nn

from fedsim import rng


def few():
    return rng.normal(1, 150, 1, 8, 8).numpy(), (rng.bits(2, 150) % 3).numpy()


class Drawing(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.rows = nn.LSTM(8, 6, num_layers=2, dropout=0.4, batch_first=True)
        self.norm, self.drop, self.head = nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, num_classes)

    def forward(self, x):
        x = F.dropout(self.rows(x[:, 0])[0][:, -1], 0.3, self.training)
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.head(self.drop(self.norm(x)))
"""
SEEDED = (
    "model: draws from torch's global generator (rows (LSTM)); its draws are seeded per client and round, so the run "
    "repeats with the same torch version, but each client is trained by itself"
)
ROUNDS = 3


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "drawing_model.py").write_text(DRAWING)
    yield
    sys.modules.pop("drawing_model", None)


def config(engine="reference", seed=3):
    return {
        "name": "drawing",
        "seed": seed,
        "data": {"dataset": "drawing_model:few", "seed": 1, "clients": 6, "split": {"name": "dirichlet", "alpha": 1.0}},
        "model": "drawing_model:Drawing",
        "train": {
            "rounds": ROUNDS,
            "clients_per_round": 4,
            "batch_size": 9,
            "optimizer": {"name": "sgd", "lr": 0.3, "momentum": 0.5},
        },
        "engine": engine,
    }


def made():
    return build.federation(load.load(config()))


def left(run):
    """All that a run leaves behind, but for time and the bytes of an engine's frames."""
    lines = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    uncounted = {"seconds": 0, "bytes_up": 0, "bytes_down": 0}
    return [line | uncounted for line in lines], run.clients, (run.folder / "model.safetensors").read_bytes()


def test_a_run_repeats_bit_for_bit_on_either_engine_and_says_how(capsys):
    first = fedsim.run(config())
    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        before = torch.get_rng_state()
        again, flower = fedsim.run(config()), fedsim.run(config("flower"))
        assert torch.equal(torch.get_rng_state(), before)
    assert left(first) == left(again) == left(flower)
    assert left(first) != left(fedsim.run(config(seed=4)))
    told = runs.open_run(first.folder).environment()["model"]
    assert told == {"keyed": ["drop"], "seeded": SEEDED}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("engine", "stopped"), [("reference", 2), ("flower", 1), ("local", 1)])
def test_a_run_resumed_in_the_middle_ends_with_the_same_bits(engine, stopped):
    folders = []

    def stop(record):
        if record.round == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(config(engine), on_start=lambda run, _: folders.append(run.folder), on_round=stop)
    assert runs.load_checkpoint(folders[0]).round == stopped
    assert left(fedsim.resume(folders[0])) == left(fedsim.run(config()))


def test_the_order_in_which_clients_train_does_not_matter():
    federation, _ = made()
    initial, key = start(federation), 11
    broadcast = Broadcast(initial.params, initial.buffers, {}, 1)

    def update(client):
        own = federation.data.client(client)
        return train_client(federation.work, broadcast, client, own, state={}, key=client_key(key, client))

    forward = {client: update(client) for client in range(6)}
    for client in reversed(range(6)):
        again = update(client)
        assert p.same_bits(again.update, forward[client].update) and again.metrics == forward[client].metrics
        assert p.same_bits(again.buffers, forward[client].buffers)
    cohorts = []

    def loop(running):
        cohorts.extend(running.run_cohort(broadcast, clients, {}, key) for clients in ([5, 3, 2, 0], [0, 2, 3, 5], [3]))

    reference().drive(job(federation), loop)
    assert p.same_bits(cohorts[0].update, cohorts[1].update) and p.same_bits(cohorts[0].buffers, cohorts[1].buffers)
    assert cohorts[2].metrics == forward[3].metrics


def test_the_seed_is_what_makes_these_runs_repeat():
    """Without it the same client, trained twice in a row, ends elsewhere."""
    federation, _ = made()
    assert federation.work.seeded
    initial = start(federation)
    with torch.random.fork_rng(devices=[]):
        one, other = (
            train_client(
                replace(federation.work, seeded=False),
                Broadcast(initial.params, initial.buffers, {}, 1),
                0,
                federation.data.client(0),
                state={},
                key=5,
            )
            for _ in range(2)
        )
    assert not p.same_bits(one.update, other.update)


def test_the_baselines_repeat_too_and_say_how():
    lines = []
    for _ in range(2):
        federation, engine = made()
        torch.rand(3)
        together, final = train_centralised(federation, engine, lambda record: None)
        alone = [(one.client, one.evaluations) for one in each_alone(federation, engine)]
        records = [replace(record, seconds=0.0) for record, _ in together]
        lines.append((records, alone, {name: tensor.tolist() for name, tensor in final.params.items()}))
    assert lines[0] == lines[1]
    done = fedsim.baseline({**config(), "train": {**config()["train"], "rounds": 1}})
    for run in (done.centralised, done.alone):
        assert runs.open_run(run.folder).environment()["model"]["seeded"] == SEEDED
