"""``model.init: fixup``: what it makes of a federation, whole runs of it, and what it is refused with."""

import json
from pathlib import Path

import pytest
import torch

import fedsim
from fedsim import params as p
from fedsim.config import build
from fedsim.config.load import load
from fedsim.errors import ConfigError

BASE = {
    "data": {"dataset": "digits", "clients": 4},
    "model": {"name": "residual-mlp", "depth": 3, "width": 12, "init": "fixup"},
    "train": {"rounds": 2, "clients_per_round": 2, "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.2}},
}


def made(**changes):
    return build.federation(load(BASE, changes))[0].work


def test_scalars_learn_with_a_tenth_of_the_step_size_whatever_the_optimizer():
    for optimizer in ("sgd", "adam"):
        work = made(**{"train.optimizer": {"name": optimizer, "lr": 0.2}})
        params = p.of(work.model)[0]
        assert work.optimizer.folded is None
        ones = {name: torch.ones_like(tensor) for name, tensor in params.items()}
        stepped, _ = work.optimizer.step(params, ones, work.optimizer.init(params), 1, 1.0)
        for name, tensor in params.items():
            slow = name.endswith("scale") or ("bias" in name and name != "head.bias")
            assert torch.allclose(tensor - stepped[name], torch.tensor(0.02 if slow else 0.2), rtol=1e-3), name
    assert made(**{"model.init": "default"}).optimizer.folded is not None


def test_the_seed_decides_the_first_weights():
    one, again, other = (p.of(made(seed=seed).model)[0] for seed in (1, 1, 2))
    assert p.same_bits(one, again) and not p.same_bits(one, other)


@pytest.mark.parametrize("mode", ["sequential", "vectorised"])
def test_a_run_starts_at_ln_10_and_learns(tmp_path, mode):
    changes = {"engine.mode": mode, "model.regularizers": [{"name": "stochastic-depth", "p": 0.2}]}
    folder = Path(fedsim.run(BASE, {**changes, "output": str(tmp_path)}).folder)
    summary = json.loads((folder / "summary.json").read_text())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert summary["initial"]["loss"] == pytest.approx(2.302585, rel=1e-6)
    assert rounds[-1]["loss"] < 2.302585


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "mlp"}, "^model: needs residual blocks; resnet, resnet-8, resnet-20 and residual-mlp have them"),
        ({"name": "residual-mlp", "norm": "layer"}, "^model.norm: must be none with init: fixup, got .* LayerNorm"),
    ],
)
def test_a_model_without_a_place_for_it_is_a_config_error(model, message):
    with pytest.raises(ConfigError, match=message):
        made(model={**model, "init": "fixup"})
