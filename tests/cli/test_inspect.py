import json

import pytest
import safetensors.torch
import torch

from fedsim.api.inspecting import inspect
from fedsim.errors import ConfigError
from fedsim.report.numbers import size

# config.yaml: an MLP of 64 inputs, 8 hidden units and 10 classes


@pytest.fixture
def run(fedsim, folder):
    fedsim("run", "config.yaml")
    (made,) = (folder / "runs").iterdir()
    return made


def rows(out: str) -> list[list[str]]:
    return [line.replace(" B", "B").replace(" kB", "kB").replace(" x ", "x").split() for line in out.splitlines()]


def test_a_config_shows_its_fresh_model_and_writes_nothing(fedsim):
    result = fedsim("inspect", "config.yaml")
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    title, *table = result.out.splitlines()
    assert title == "small: mlp, before training, for an input 1 x 8 x 8"
    head, *body = rows("\n".join(table))
    assert " ".join(head) == "layer kind shape parameters non-zeros MACs effective dense bitmask gaps coo"
    assert [row[:-4] for row in body] == [
        ["fc1", "Linear", "8x64", "520", "520", "512", "512"],
        ["head", "Linear", "10x8", "90", "90", "80", "80"],
        ["total", "610", "610", "592", "592"],
    ]
    bitmask = [2080 + 64 + 1, 360 + 10 + 2]  # a bit for each entry, of weight and bias
    coo = [2080 + 2080 + 2 + 1, 360 + 360 + 1 + 1]  # 4 bytes for each position, and how many there are
    for column, counts in ((-4, [2080, 360]), (-3, bitmask), (-1, coo)):
        assert [row[column] for row in body] == [size(n).replace(" ", "") for n in (*counts, sum(counts))]


def test_a_config_may_be_changed(fedsim):
    shown = fedsim("inspect", "config.yaml", "model={name: cnn, channels: [4], kernel: 3, hidden: 5, norm: batch}")
    found = {row[0]: row[1:7] for row in rows(shown.out)[2:]}
    assert found["conv1"] == ["Conv2d", "4x1x3x3", "40", "40", "2,304", "2,304"]
    assert found["norm1"] == ["BatchNorm2d", "4", "8", "4", "0", "0"]  # its shift is 0 before training
    assert found["fc1"][:3] == ["Linear", "5x64", "325"]


def test_a_run_shows_its_model_as_it_is_now(fedsim, run):
    file = run / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["fc1.weight"][:, 3:] = 0.0
    safetensors.torch.save_file(tensors, file)
    result = fedsim("inspect", run)
    assert (result.code, result.err, result.new) == (0, "", frozenset())
    title, _, fc1, *_ = result.out.splitlines()
    assert title == "small: mlp, after round 2, for an input 1 x 8 x 8"
    assert fc1.split()[5:9] == ["520", "32", "512", "24"]  # 8 biases and 8 * 3 weights are left


def test_json_has_every_number_of_layers_and_total(fedsim, run):
    for source in ("config.yaml", run):
        found = json.loads(fedsim("inspect", source, "--json").out)
        assert found["round"] == (None if source == "config.yaml" else 2)
        assert [layer["path"] for layer in found["layers"]] == ["fc1", "head"]
        assert found["input_shape"] == [1, 8, 8]
        for key in ("parameters", "nonzeros", "macs", "effective_macs"):
            assert found["total"][key] == sum(layer["numbers"][key] for layer in found["layers"])
        for form in ("dense", "bitmask", "gaps", "coo"):
            assert found["total"]["bytes"][form] == sum(layer["numbers"]["bytes"][form] for layer in found["layers"])
        assert found["total"]["macs"] == 64 * 8 + 8 * 10
        assert found["total"]["bytes"]["dense"] == 4 * 610


def test_bytes_in_forms_follow_from_the_zeros(fedsim, run):
    file = run / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["fc1.weight"][:, 1:] = 0.0
    safetensors.torch.save_file(tensors, file)
    (fc1, _) = json.loads(fedsim("inspect", run, "--json").out)["layers"]
    biases = {"dense": 32, "bitmask": 33, "coo": 1 + 64}
    weights = {"dense": 4 * 512, "bitmask": 512 // 8 + 4 * 8, "coo": 1 + 8 * (4 + 4)}
    found = fc1["numbers"]["bytes"]
    assert {form: found[form] for form in biases} == {form: biases[form] + weights[form] for form in biases}
    assert found["gaps"] < found["coo"]


def test_sequences_of_tokens_are_taken(fedsim, folder):
    (folder / "texts.py").write_text(
        "import numpy as np\n"
        "def texts():\n"
        "    tokens = np.arange(200, dtype=np.int64).reshape(40, 5) % 7\n"
        "    return {'x': tokens, 'y': tokens}\n"
    )
    changes = ["data={dataset: 'texts:texts', clients: 6}", "model={name: char-lstm, hidden: 6, embedding: 4}"]
    found = fedsim("inspect", "config.yaml", *changes)
    if found.code:
        pytest.fail(found.err)
    table = {row[0]: row[1:7] for row in rows(found.out)[2:]}
    assert table["lstm"][1:5] == [
        "24x4",
        str(4 * 6 * (4 + 6 + 6 + 6) + 96),
        str(4 * 6 * 22 + 96),
        f"{5 * 4 * 6 * 22:,}",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.yaml"], 2, "error: nowhere.yaml: no such file"),
        (["."], 3, "error: .: not a run folder (it has no environment.json)"),
        (["config.yaml", "model.hidden=[0]"], 2, "error: model.hidden"),
        (["config.yaml", "seed"], 2, "error: override seed: must be written key.path=value"),
        ([], 2, "error: Missing argument 'RUN|CONFIG' (fedsim inspect --help shows how)"),
    ],
)
def test_what_cannot_be_inspected_is_one_clear_line(fedsim, arguments, code, message):
    result = fedsim("inspect", *arguments)
    assert (result.code, result.out, result.new) == (code, "", frozenset())
    assert result.err.startswith(message)
    assert result.err.count("\n") == 1


def test_a_run_takes_no_changes(fedsim, run):
    result = fedsim("inspect", run, "seed=4")
    assert (result.code, result.out, result.new) == (2, "", frozenset())
    assert result.err == f"error: seed: a run has its config, and none of it can be changed, got {run}\n"


def test_a_run_without_a_model_is_one_clear_line(fedsim, run):
    for file in (run / "model.safetensors", run / "checkpoint" / "state.json"):
        file.unlink()
    result = fedsim("inspect", run)
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_a_model_that_cannot_be_called_is_a_config_error(folder):
    (folder / "models.py").write_text(
        "from torch import nn\ndef narrow(*, input_shape, num_classes):\n    return nn.Linear(3, num_classes)\n"
    )
    with pytest.raises(ConfigError, match=r"^model\.name: models:narrow: the model cannot be called with an input"):
        inspect("config.yaml", {"model": "models:narrow"})


def test_help_stands_by_itself(fedsim):
    assert "  inspect " in fedsim("--help").out
    text = fedsim("inspect", "--help").out
    assert text.startswith("Usage: fedsim inspect ")
    assert "RUN|CONFIG is a run folder" in text


def test_one_thread_is_given_back(folder):
    before = torch.get_num_threads()
    inspect("config.yaml")
    assert torch.get_num_threads() == before
