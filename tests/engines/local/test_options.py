"""What ``precision``, ``compile`` and ``device`` change, and what they do not."""

import shutil

import pytest
import torch
from federations import federation, result, tensors

from fedsim import params as p
from fedsim.engines.local import local
from fedsim.federation import job


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("mode", ["sequential", "vectorised"])
def test_bf16_rounds_what_goes_forward_and_keeps_parameters_in_float32(mode):
    """bfloat16 has 8 bits: sums of products are off by about 1 %, and so are the steps made from them."""
    made = federation("plain")
    exact = tensors(result(made, local(mode=mode, workers=1))[0])
    rounded = tensors(result(made, local(mode=mode, workers=1, precision="bf16"))[0])
    begun = p.of(made.work.model)[0]
    for name, tensor in exact.items():
        assert rounded[name].dtype == torch.float32
        moved, off = (tensor - begun[name]).norm(), (rounded[name] - tensor).norm()
        assert 1e-5 * moved < off < 0.05 * moved, name


def test_bf16_repeats():
    made, engine = federation("dropout"), local(mode="vectorised", workers=1, precision="bf16")
    assert p.same_bits(tensors(result(made, engine)[0]), tensors(result(made, engine)[0]))


@pytest.mark.parametrize(
    ("options", "why"), [({"precision": "bf16"}, "for float32"), ({"compile": True}, "not compiled")]
)
def test_fused_steps_take_neither_option(options, why):
    made = federation("plain")
    with pytest.raises(ValueError, match=rf"fused steps are written by hand, {why}"):
        local(mode="fused", workers=1, **options).prepared(job(made), {})
    assert local(workers=1, **options).prepared(job(made), {}).choices.plan.plan.path != "fused"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch deprecates
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_steps_agree_up_to_rounding_and_repeat():
    """Tolerance as for the other stacked paths of the contract, doubled for the fused multiply-adds of the compiler."""
    made = federation("batch norm")  # clients of one size: few shapes to compile
    recorded = {"path": "vectorised", "chunk": 2}
    plain = tensors(result(made, local(mode="vectorised", workers=1).prepared(job(made), recorded))[0])
    engine = local(mode="vectorised", workers=1, compile=True).prepared(job(made), {**recorded, "compiled": True})
    assert engine.describe()["compiled"] is True
    compiled = tensors(result(made, engine)[0])
    for name, tensor in plain.items():
        assert torch.allclose(compiled[name], tensor, rtol=4e-6, atol=4e-6), name
    assert p.same_bits(compiled, tensors(result(made, engine)[0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_cuda_is_refused_where_there_is_none_and_auto_is_the_cpu():
    elsewhere = local(device="cuda")  # so that a run folder that came from there can be opened
    with pytest.raises(ValueError, match="device: torch finds no cuda here"):
        elsewhere.prepared(job(federation("plain")), {})
    assert local().describe()["device"] == "cpu"


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"compile: needs a C\+\+ compiler, and neither .* nor clang\+\+ is found"):
        local(compile=True, device="cpu")
