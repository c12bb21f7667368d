import itertools
from dataclasses import replace

import pytest
import torch
from federations import ROUNDS, federation, result, tensors
from torch import Tensor, nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.engines.local import local
from fedsim.federation import Federation, job
from fedsim.models.cost import macs
from fedsim.models.layers.fbs import GatedConv2d
from fedsim.models.layers.keyed import key_names
from fedsim.models.zoo import MODELS
from fedsim.pruning.fbs import bind_fbs, density_at, fbs, gates_used, set_density
from fedsim.pruning.fbs_cost import fbs_macs
from fedsim.pruning.skipping import SkippingConv2d, skipping
from fedsim.records import IGNORED, Examples
from fedsim.training.objective import PLAIN, watched

CIFAR, SMALL = (3, 32, 32), (1, 8, 8)


def model_of(name: str, key: int = 0, **keys: object) -> nn.Module:
    with rng.torch_seeded(key):
        return MODELS[name](SMALL, 10, **keys)


def gated(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, GatedConv2d)]


def stirred(model: nn.Module) -> nn.Module:
    """With gates that differ from example to example, and running statistics of some data."""
    for i, module in enumerate(model.modules()):
        if isinstance(module, GatedConv2d):
            with torch.no_grad():
                module.gate.phi.copy_(rng.normal(i, *module.gate.phi.shape))
                module.beta.copy_(rng.normal(i + 100, len(module.beta)))
    for _ in range(20):
        model.train()(rng.normal(50, 64, *SMALL).to(next(model.parameters())))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("cnn", {"norm": "none"}, ["conv1", "conv2"]),
        ("cnn", {"norm": "batch"}, ["conv1", "conv2"]),
        ("conv-4", {"norm": "group"}, ["conv1", "conv2", "conv3", "conv4"]),
        ("m-cifarnet-small", {}, [f"conv{i}" for i in range(8)]),
        ("resnet-8", {"norm": "batch"}, ["conv1", *(f"stage{i}.block1.conv1" for i in (1, 2, 3))]),
    ],
)
def test_which_convolutions_are_gated_and_that_weights_keep_their_names(
    name: str, keys: dict[str, object], expected: list[str]
) -> None:
    plain, model = model_of(name, **keys), model_of(name, **keys)
    objective = bind_fbs(model, PLAIN)
    assert gated(model) == expected and [path for path, _ in objective.maps] == [f"{path}.gate" for path in expected]
    before, after = dict(plain.named_parameters()), dict(model.named_parameters())
    weights = {n: t for n, t in before.items() if t.dim() > 1}
    assert all(torch.equal(after[n], t) for n, t in weights.items())
    x = rng.normal(1, 4, *SMALL)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_models_without_a_place_are_refused() -> None:
    for model in (model_of("mlp"), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), nn.Conv2d(1, 2, 3)):
        with pytest.raises(ValueError, match="needs convolutions with a ReLU behind them"):
            bind_fbs(model, PLAIN)


def test_fully_open_gates_are_the_plain_model_in_either_mode() -> None:
    plain, model = model_of("m-cifarnet-small").double(), model_of("m-cifarnet-small").double()
    bind_fbs(model, PLAIN)
    for path in gated(model):
        one = model.get_submodule(path)
        assert isinstance(one, GatedConv2d)
        nn.init.zeros_(one.gate.phi)
        nn.init.zeros_(one.beta)
    x = rng.normal(3, 6, *SMALL, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_the_penalty_is_a_sum_over_channels_and_a_mean_over_the_examples_that_count() -> None:
    g, labels = torch.tensor([[1.0, 0.0, 2.5], [0.5, 4.0, 0.0], [9.0, 9.0, 9.0]]), torch.tensor([1, 0, IGNORED])
    assert float(gates_used(g, labels, strength=0.1)) == pytest.approx(0.1 * (3.5 + 4.5) / 2)
    assert bind_fbs(model_of("cnn"), PLAIN, penalty=0.0) == PLAIN
    model = model_of("cnn")
    objective = bind_fbs(model, PLAIN, penalty=0.5)
    with torch.no_grad(), watched(model, objective) as returned:
        model(rng.normal(1, 2, *SMALL))
    total = sum(float(penalty(returned[path], torch.zeros(2))) for path, penalty in objective.maps)
    assert total == pytest.approx(0.5 * sum(float(t.sum()) / 2 for t in returned.values())) and len(returned) == 2


def test_densities_fall_by_steps_to_the_last() -> None:
    def all_of(rounds: int, **keys: float) -> list[float]:
        return [density_at(now, rounds, **keys) for now in range(1, rounds + 1)]

    assert all_of(10, density=0.5, step=0.1, until=0.5) == [1.0, 0.9, 0.8, 0.7, 0.6, *[0.5] * 5]
    assert all_of(4, density=0.25, step=0.5, until=1.0) == [1.0, 1.0, 0.5, 0.5]
    assert all_of(3, density=0.3, step=0.1, until=0.0) == [0.3] * 3
    assert all_of(3, density=1.0, step=0.1, until=0.5) == [1.0] * 3


def small_federation() -> Federation:
    """A federation of the contract's, with images and gated convolutions; all densities fall in three rounds."""
    base = federation("batch norm")
    method = fbs(density=0.3, step=0.35, until=0.6, penalty=1e-3)
    model = model_of("m-cifarnet-small", channels=[5, 6, 7])
    with rng.torch_seeded(2):
        objective = method.bind(model, PLAIN)
    train = Examples(rng.normal(2, len(base.data.train), *SMALL), base.data.train.labels)
    test = Examples(rng.normal(3, len(base.data.test), *SMALL), base.data.test.labels)
    data = replace(base.data, train=train, test=test, client_test=test)
    work = replace(base.work, model=model, objective=objective, key_names=key_names(model), rounds=ROUNDS)
    return replace(base, data=data, work=work, pruning=method)


@pytest.mark.parametrize("mode", ["sequential", "vectorised"])
def test_evaluation_uses_the_density_of_training_on_every_path_and_after_resume(mode: str) -> None:
    made = small_federation()
    engine = local(mode=mode, workers=1).prepared(job(made), {"path": mode, "chunk": 1 if mode == "sequential" else 4})
    final, records, states = result(made, engine)
    names = [n for n in final.buffers if n.endswith(".density")]
    assert len(names) == 8
    expected = [density_at(now, ROUNDS, density=0.3, step=0.35, until=0.6) for now in range(1, ROUNDS + 1)]
    assert expected == [1.0, 0.65, 0.3]
    for state, density in zip(states[1:], expected, strict=True):
        assert all(torch.equal(state.buffers[n], torch.tensor(density)) for n in names)
    resumed = result(made, engine, states[2])
    assert p.same_bits(tensors(resumed[0]), tensors(final)) and resumed[1][-1] == records[-1]
    moved = [n for n in final.params if not torch.equal(final.params[n], states[0].params[n])]
    assert sorted(moved) == sorted(final.params)
    model = made.work.model.eval()
    shown = {}
    conv = model.get_submodule("conv3")
    handle = conv.register_forward_hook(lambda module, args, output: shown.update(y=output))
    functional_call(model, {**final.params, **final.buffers}, (made.data.test.inputs,))
    handle.remove()
    assert int((shown["y"] != 0).flatten(2).any(-1).sum(-1).max()) == 2  # of 6


def test_lanes_train_as_one_client_after_the_other_does() -> None:
    made = small_federation()
    ends = []
    for mode in ("sequential", "vectorised"):
        plan = {"path": mode, "chunk": 1 if mode == "sequential" else 4}
        ends.append(result(made, local(mode=mode, workers=1).prepared(job(made), plan))[0])
    for name, tensor in ends[0].params.items():
        torch.testing.assert_close(ends[1].params[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "keys"),
    [("m-cifarnet-small", {}), ("cnn", {"kernel": 3, "hidden": 16}), ("resnet-8", {"norm": "batch"})],
)
def test_skipping_is_the_masked_model(name: str, keys: dict[str, object], density: float, dtype: torch.dtype) -> None:
    model = model_of(name, **keys).to(dtype)
    bind_fbs(model, PLAIN)
    set_density(stirred(model), density)
    skipped = skipping(model)
    x = rng.normal(8, 7, *SMALL, dtype=torch.float64).to(dtype)
    x[3] = 0.0
    expected, found = model(x).detach(), skipped(x).detach()
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) <= (1e-5 if dtype == torch.float32 else 1e-12) * max(scale, 1.0)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-3 * scale  # the logits tell examples apart
    assert sum(isinstance(one, SkippingConv2d) for one in skipped.modules()) == len(gated(model))


def test_skipping_computes_only_what_is_open_from_what_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("m-cifarnet-small")
    bind_fbs(model, PLAIN)
    set_density(stirred(model), 0.5)
    seen: list[tuple[int, ...]] = []
    whole = torch.nn.functional.conv2d

    def conv2d(x: Tensor, weight: Tensor, *args: object) -> Tensor:
        seen.append(tuple(weight.shape[:2]))
        return whole(x, weight, *args)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr("torch.nn.functional.conv2d", conv2d)
    skipping(model)(rng.normal(8, 1, *SMALL))
    widths = [16, 16, 32, 32, 32, 48, 48, 48]
    assert len(seen) == 8
    for (out, used), width, before in zip(seen, widths, [2, *widths[:-1]], strict=True):
        assert 1 <= out <= width // 2 and 1 <= used <= before // 2


def test_skipping_refuses_what_needs_all_channels() -> None:
    model = model_of("cnn", norm="group")
    bind_fbs(model, PLAIN)
    for refused in (model, model_of("cnn")):
        with pytest.raises(ValueError, match="needs gated convolutions with batch norm or without a norm"):
            skipping(refused)


@pytest.mark.parametrize(
    ("density", "saving"),
    [(1.0, 0.998), (0.9, 1.22), (0.8, 1.53), (0.7, 2.01), (0.6, 2.71), (0.5, 3.93), (0.4, 5.95), (0.3, 10.2)],
)
def test_multiply_accumulates_of_m_cifarnet(density: float, saving: float) -> None:
    """By a count of its own, and the savings derived for the paper's table."""
    model = MODELS["m-cifarnet"](CIFAR, 10)
    dense = macs(model, CIFAR)
    bind_fbs(model, PLAIN)
    found = fbs_macs(model, CIFAR, density)
    assert dense / sum(found.values()) == pytest.approx(saving, rel=4e-3)
    widths, sides = [3, 64, 64, 128, 128, 128, 192, 192, 192], [30, 30, 15, 15, 15, 8, 8, 8]
    inputs = [32, 30, 31, 15, 15, 17, 8, 8]  # padded where the padding is a layer
    for i, (before, width) in enumerate(itertools.pairwise(widths)):
        used, k = (-(-round(100 * density) * n // 100) for n in (before, width))
        taken = 9 * (used if i else 3) * k * sides[i] ** 2 + before * width + before * inputs[i] ** 2
        assert found[f"conv{i}"] == taken
    assert found["head"] == 10 * -(-round(100 * density) * 192 // 100)
    assert float(model.get_submodule("conv1").density) == 1.0


def test_inputs_that_come_through_a_shortcut_are_not_saved() -> None:
    model = model_of("resnet-8", norm="batch")
    bind_fbs(model, PLAIN)
    found = fbs_macs(model, SMALL, 0.5)
    assert found["stage1.block1.conv1"] == 9 * 8 * 8 * 64 + 16 * 16 + 16 * 64  # of the stem, which is gated
    assert found["stage1.block1.conv2"] == 9 * 8 * 16 * 64
    assert found["stage2.block1.conv1"] == 9 * 16 * 16 * 16 + 16 * 32 + 16 * 64
    with pytest.raises(ValueError, match="no gated convolutions"):
        fbs_macs(model_of("cnn"), SMALL)
