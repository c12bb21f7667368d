"""What summary.json says of a run that prunes, against the model and against what ``inspect`` counts."""

import math
from typing import Any

import pytest

import fedsim
from fedsim.api.inspecting import inspect

CONFIG: dict[str, Any] = {
    "name": "pruned",
    "seed": 3,
    "data": {"dataset": "digits", "clients": 4, "split": {"name": "iid"}},
    "model": {"name": "cnn", "channels": [4, 8], "hidden": 16, "norm": "group"},
    "train": {"rounds": 3, "clients_per_round": 2, "local_epochs": 1, "batch_size": 64},
}
PRUNINGS = {
    "masks": {"name": "magnitude", "sparsity": 0.7, "start": 1, "end": 1},
    "channels": {"name": "l1-filter", "sparsity": 0.5, "at": 1},
}


@pytest.mark.parametrize("kind", PRUNINGS)
def test_what_is_left_is_what_the_model_holds(tmp_path, kind):
    run = fedsim.run({**CONFIG, "pruning": PRUNINGS[kind], "output": str(tmp_path)})
    summary, parameters = run.summary, dict(run.model().named_parameters())
    left = sum(int(tensor.count_nonzero()) for name, tensor in parameters.items() if name in summary["remaining"])
    others = sum(tensor.numel() for name, tensor in parameters.items() if name not in summary["remaining"])
    facts = summary["model"]
    assert facts["parameters_left"] == left + others < facts["parameters"]
    first = sum(math.prod(facts["weights"][name]["shape"]) for name in summary["remaining"])
    assert 1 - summary["sparsity"] == pytest.approx(left / first)
    assert summary["remaining"] == run.rounds[-1].remaining


@pytest.mark.parametrize("model", [CONFIG["model"], {"name": "mlp", "hidden": [20]}])
def test_uses_of_a_weight_give_the_arithmetic_of_its_layer(tmp_path, model):
    config = {**CONFIG, "model": model, "output": str(tmp_path)}
    weights = fedsim.run({**config, "pruning": PRUNINGS["masks"]}, {"train.rounds": 2}).summary["model"]["weights"]
    told = {name.removesuffix(".weight"): one["uses"] * math.prod(one["shape"]) for name, one in weights.items()}
    assert told == {layer.path: layer.numbers.macs for layer in inspect(config).layers if layer.numbers.macs}


def test_a_run_that_does_not_prune_says_nothing_of_it(tmp_path):
    summary = fedsim.run({**CONFIG, "output": str(tmp_path)}, {"train.rounds": 1}).summary
    assert not {"sparsity", "remaining"} & summary.keys()
    assert summary["model"].keys() == {"name", "parameters", "input_shape", "num_classes"}
