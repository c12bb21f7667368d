"""Pruning a finished run: the old folder is left alone, and the new run is what one config would have made."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fedsim
from fedsim import params as p
from fedsim import runs
from fedsim.errors import ConfigError
from fedsim.models import cost
from fedsim.pruning.table import PRUNING

SHAPE = (1, 8, 8)
CONFIG = {
    "name": "small",
    "seed": 3,
    "data": {"dataset": "digits", "clients": 5, "split": "iid"},
    "model": {"name": "cnn", "channels": [3, 4], "kernel": 3, "hidden": 6, "norm": "batch"},
    "train": {"rounds": 3, "clients_per_round": 2, "batch_size": 32},
    "engine": {"name": "local", "mode": "sequential", "workers": 1},
}
L1 = {"name": "l1-filter", "sparsity": 0.5, "at": 3}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("dense"))
        return Path(fedsim.run(CONFIG).folder).absolute()


@pytest.fixture
def dense(made_once, here):
    return fedsim.load(shutil.copytree(made_once, Path("runs") / made_once.name))


def digests(folder):
    found = (path for path in Path(folder).rglob("*") if path.is_file() and "pruned" not in path.parts)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found if path.name != ".lock"}


def lines(run):
    """Of rounds.jsonl, without the time that each took."""
    read = (json.loads(line) for line in (Path(run.folder) / "rounds.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read]


def model_of(run):
    return safetensors.torch.load_file(Path(run.folder) / "model.safetensors")


@pytest.mark.parametrize("name", ["l1-filter", "network-slimming", "thinet", "reconstruction", "magnitude"])
def test_a_pruned_model_is_written_beside_the_run_and_nothing_else_changes(dense, name):
    before = digests(dense.folder)
    done = fedsim.prune(dense.folder, name, 0.5)
    assert digests(dense.folder) == before and done.run is None
    tensors, facts = done.files
    assert tensors.name == f"{name}-0.5.safetensors" and tensors.parent == Path(dense.folder) / "pruned"
    written = safetensors.torch.load_file(tensors)
    own = model_of(dense)
    assert done.before.numbers.parameters == sum(
        t.numel() for n, t in own.items() if n in dict(dense.model().named_parameters())
    )
    parameters = {n: t for n, t in written.items() if "running" not in n and "num_batches" not in n}
    assert done.after.numbers.parameters == sum(t.numel() for t in parameters.values())
    assert done.after.numbers.nonzeros == sum(int(t.count_nonzero()) for t in parameters.values())
    assert done.after.numbers.nonzeros < done.before.numbers.nonzeros
    assert (done.after.numbers.parameters == done.before.numbers.parameters) == (name == "magnitude")
    said = json.loads(facts.read_text())
    assert said["after"]["accuracy"] == done.after.accuracy and said["pruning"]["name"] == name
    assert done.before.accuracy == pytest.approx(dense.summary["accuracy"])


@pytest.mark.parametrize(
    "name",
    ["l1-filter", "network-slimming", *(pytest.param(n, marks=pytest.mark.slow) for n in ("thinet", "magnitude"))],
)
def test_finetuning_is_what_one_config_with_that_pruning_makes(dense, name):
    before = digests(dense.folder)
    done = fedsim.prune(dense.folder, name, 0.5, finetune=2)
    assert digests(dense.folder) == before and done.files == ()
    when = {"magnitude": {"start": 3, "end": 3}, "network-slimming": {"at": 3, "strength": 0.0}}.get(name, {"at": 3})
    whole = fedsim.run(CONFIG, {"pruning": {"name": name, "sparsity": 0.5, **when}, "train.rounds": 5})
    assert lines(done.run) == lines(whole) and lines(done.run)[:3] == lines(dense)
    assert p.same_bits(model_of(done.run), model_of(whole))
    assert done.run.summary["accuracy"] == whole.summary["accuracy"] and done.run.summary["status"] == "finished"


def test_a_pruned_run_can_be_opened_inspected_and_verified(dense):
    run = fedsim.prune(dense.folder, "l1-filter", 0.5, finetune=2).run
    model, saved = fedsim.load(run.folder).model(), model_of(run)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {n: tuple(t.shape) for n, t in saved.items()}
    assert model.conv1.out_channels == 2 and model(torch.zeros(2, *SHAPE)).shape == (2, 10)
    seen = fedsim.inspect(run.folder)
    assert seen.total.parameters == sum(t.numel() for t in model.parameters())
    assert seen.total.macs == cost.macs(model, SHAPE)
    assert fedsim.verify(run.folder, 5).equal


def test_scratch_trains_new_weights_for_as_many_rounds_or_as_many_multiplications(dense):
    e = fedsim.prune(dense.folder, "l1-filter", 0.5, scratch="e")
    b = fedsim.prune(dense.folder, "l1-filter", 0.5, scratch="b")
    assert len(lines(e.run)) == 6
    large, small = cost.macs(dense.model(), SHAPE), cost.macs(e.run.model(), SHAPE)
    assert (e.before.numbers.macs, e.after.numbers.macs) == (large, small) and large > 2 * small
    assert len(lines(b.run)) == 3 + int(3 * large / small)
    assert lines(b.run)[:6] == lines(e.run)[:6]
    assert e.run.config["pruning"]["then"] == "scratch"
    assert e.after.loss > fedsim.prune(dense.folder, "l1-filter", 0.5).after.loss  # nothing learnt is left


@pytest.mark.parametrize("stopped", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_new_run_that_is_stopped_goes_on_to_the_same_bits(dense, stopped):
    whole = fedsim.prune(dense.folder, "l1-filter", 0.5, finetune=3).run

    def stop(record):
        if record.round == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.prune(dense.folder, "l1-filter", 0.5, finetune=3, on_round=stop)
    folder = max((path for path in Path("runs").iterdir()), key=lambda path: int(path.name.rpartition("-")[2]))
    assert runs.open_run(folder).summary()["status"] == "interrupted"
    again = fedsim.resume(folder)
    assert p.same_bits(model_of(again), model_of(whole)) and lines(again) == lines(whole)


@pytest.mark.parametrize(
    "stopped", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_that_prunes_and_is_stopped_before_at_or_after_it_goes_on_to_the_same_bits(stopped):
    config = {**CONFIG, "pruning": {**L1, "at": 2}, "train": {**CONFIG["train"], "rounds": 4}}
    whole = fedsim.run(config)

    def stop(record):
        if record.round == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(config, on_round=stop)
    (folder,) = (path for path in Path("runs").iterdir() if path != Path(whole.folder))
    again = fedsim.resume(folder)
    assert p.same_bits(model_of(again), model_of(whole)) and lines(again) == lines(whole)


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("l1",), {}, "criterion: must be one of"),
        (("lottery-ticket",), {}, "criterion: must be one of"),
        (("soft-filter", 0.5), {}, "criterion: soft-filter works while a model is trained"),
        (("network-slimming",), {"options": {"strength": 0.1}}, "strength: follows from the run"),
        (("l1-filter", 0.5), {"options": {"at": 2}}, "at: follows from the run"),
        (("magnitude", 0.5), {"options": {"end": 2}}, "end: follows from the run"),
        (("l1-filter", 0.5), {"scratch": "e", "finetune": 2}, "exclude each other"),
        (("l1-filter", 0.5), {"finetune": -1}, "finetune: must be >= 0, got -1"),
        (("l1-filter", 1.5), {}, "pruning.sparsity"),
        (("l1-filter", 0.5), {"options": {"layers": ["conv9"]}}, "pruning.layers: must be among"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(dense, arguments, options, says):
    before = digests("runs")
    with pytest.raises(ConfigError, match=says):
        fedsim.prune(dense.folder, *arguments, **options)
    assert digests("runs") == before and len(list(Path("runs").iterdir())) == 1


def test_a_pruned_run_cannot_be_pruned_again(dense):
    run = fedsim.prune(dense.folder, "l1-filter", 0.5, finetune=1).run
    with pytest.raises(ConfigError, match="can be pruned only once"):
        fedsim.prune(run.folder, "magnitude", 0.5)


def test_every_method_that_prunes_at_one_time_is_offered(dense):
    with pytest.raises(ConfigError) as refused:
        fedsim.prune(dense.folder, "nothing")
    offered = set(str(refused.value).split("must be one of ")[1].split(", got")[0].split(", "))
    assert offered <= set(PRUNING) and {"l1-filter", "thinet", "reconstruction", "magnitude"} <= offered
    assert "lottery-ticket" not in offered
