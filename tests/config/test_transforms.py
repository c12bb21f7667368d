"""``transforms``: a list of components in order, checked like all others, and what a run with them records."""

import pytest

import fedsim
from fedsim import baselines
from fedsim.config import catalogue
from fedsim.config.build import federation
from fedsim.config.load import load, resolved
from fedsim.errors import ConfigError

BASE = {
    "data": {"dataset": "digits", "clients": 4},
    "model": {"name": "mlp", "hidden": [8]},
    "train": {"rounds": 2, "batch_size": 64},
}
CODED = [{"name": "top-k", "fraction": 0.1}, {"name": "quantise", "bits": 8}]


def with_(*transforms):
    return load(BASE, {"transforms": list(transforms)})


def test_defaults_are_filled_in_and_read_again():
    config = with_("sign", {"name": "top-k", "fraction": 1})
    found = [{"name": "sign", "error_feedback": True}, {"name": "top-k", "fraction": 1, "error_feedback": True}]
    assert resolved(config)["transforms"] == found
    assert load(resolved(config)) == config
    assert resolved(load(BASE))["transforms"] == [] and federation(load(BASE))[0].compression is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["topk"], "transforms.0.name: unknown name 'topk' (did you mean top-k?); known: top-k, random-k, "),
        (["sign", {"name": "half", "bits": 3}], "transforms.1.bits: unknown key"),
        ([{"name": "random-k", "fraction": 1.5}], "transforms.0.fraction: must be <= 1, got 1.5"),
        ([{"name": "half", "dtype": "fp8"}], "transforms.0.dtype: must be 'fp16' or 'bf16', got 'fp8'"),
        ("sign", "transforms: must be a list, got 'sign'"),
    ],
)
def test_each_problem_stands_under_its_key(given, problem):
    with pytest.raises(ConfigError) as found:
        load(BASE, {"transforms": given})
    assert any(line.startswith(problem) for line in found.value.problems), found.value.problems


def test_an_order_that_makes_no_sense_is_refused_before_data_is_loaded():
    unknown = {"data.root": "/no/such/folder", "data.dataset": "mnist"}
    with pytest.raises(ConfigError, match=r"^transforms: top-k must come before quantise: "):
        federation(load(BASE, {"transforms": CODED[::-1], **unknown}))
    with pytest.raises(ConfigError, match=r"^transforms: at most one may code values, got sign and half$"):
        federation(load(BASE, {"transforms": ["sign", "half"], **unknown}))


def test_somebody_elses_must_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_transform.py").write_text(
        "from fedsim.transforms.transform import Transform\n"
        "def nothing(): return 3\n"
        "def two_bits(): return Transform('two-bits', coding='qsgd2')\n"
    )
    changes = {"output": str(tmp_path), "transforms": ["own_transform:two_bits"]}
    assert (
        fedsim.run(BASE, changes).rounds[-1].bytes_up
        < fedsim.run(BASE, {**changes, "transforms": []}).rounds[-1].bytes_up
    )
    with pytest.raises(ConfigError, match=r"^transforms\.0\.name: must make fedsim's Transform, but .* made int$"):
        fedsim.run(BASE, {**changes, "transforms": ["own_transform:nothing"]})


def test_they_are_listed_with_their_keys():
    found = {entry.name: entry.keys for entry in catalogue.entries("transforms")}
    assert found["qsgd"] == (("bits", "8 | 4 | 2", "default 8"),)
    assert found["sparse"] == () and len(found) == 7


@pytest.mark.parametrize("engine", ["flower", {"name": "local", "mode": "fused", "workers": 1}])
def test_a_run_sends_less_up_and_as_much_down_and_verifies(engine, tmp_path):
    changes = {"output": str(tmp_path), "engine": engine}
    plain, made = (fedsim.run(BASE, {**changes, "transforms": one}) for one in ([], CODED))
    for one, other in zip(made.rounds, plain.rounds, strict=True):
        assert one.bytes_down == other.bytes_down and one.bytes_up < 0.6 * other.bytes_up  # headers are most of it
    found = fedsim.verify(made.folder, "all", {"engine": "reference"})
    assert found.equal and found.tensors


def test_a_resumed_run_goes_on_with_what_clients_remember(tmp_path):
    changes = {"output": str(tmp_path), "transforms": CODED, "engine": "reference"}
    whole = fedsim.run(BASE, changes)
    half = fedsim.run(BASE, {**changes, "train.rounds": 1})
    rest = fedsim.resume(half.folder, rounds=2)
    assert rest.rounds[-1].loss == whole.rounds[-1].loss


def test_baselines_send_nothing_and_so_lose_nothing():
    made, _ = federation(with_("sign"))
    assert made.compression is not None
    assert baselines.centralised(made).compression is None and baselines.alone(made, 2).compression is None
