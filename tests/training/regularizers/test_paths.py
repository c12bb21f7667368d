"""Where the layers on branches go, with which probabilities, and what is refused."""

import pytest
import torch
from torch.func import functional_call, vmap

from fedsim import params as p
from fedsim import rng
from fedsim.models.fractal import fractal
from fedsim.models.layers.keyed import key_names, step_keys
from fedsim.models.layers.paths import DropPath, ShakeDrop, StochasticDepth
from fedsim.models.mlp import mlp
from fedsim.models.residual import resnet
from fedsim.models.residual_mlp import residual_mlp
from fedsim.training.objective import PLAIN
from fedsim.training.regularizers import REGULARIZERS, bind
from fedsim.training.regularizers.paths import droppath, shakedrop, stochastic_depth

SHAPE = (2, 7, 5)


def layers(model, kind):
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kind)]


@pytest.mark.parametrize(("make", "kind"), [(stochastic_depth, StochasticDepth), (shakedrop, ShakeDrop)])
@pytest.mark.parametrize("blocks", [3, 6, 54])
def test_every_block_has_a_layer_that_drops_the_likelier_the_later(make, kind, blocks):
    model = resnet(SHAPE, 3, depth=2 * blocks + 2)
    assert bind(model, [make()]) == PLAIN
    found = layers(model, kind)
    assert all(path.split(".")[2] == "norm2" for path, _ in found) and len(found) == blocks
    survival = [1 - layer.p for _, layer in found]
    assert survival == pytest.approx([1 - number / blocks * 0.5 for number in range(1, blocks + 1)])
    assert sum(survival) == pytest.approx((3 * blocks - 1) / 4)
    bind(uniform := resnet(SHAPE, 3, depth=2 * blocks + 2), [make(p=0.3, rule="uniform")])
    assert {layer.p for _, layer in layers(uniform, kind)} == {0.3}


def test_the_number_of_active_blocks_is_three_quarters_of_them():
    """n = 4,000 steps of 6 blocks: (3 L - 1) / 4 = 4.25, known to 0.015; the band is of five of these."""
    model = residual_mlp((3,), 2, depth=6, width=4)
    bind(model, [stochastic_depth()])
    names, keys = key_names(model), rng.bits(1, 4000)
    found = layers(model, StochasticDepth)

    def active(key):
        own = step_keys(names, key)
        one = torch.ones(1, 1)
        return sum(functional_call(layer, {"key": own[f"{path}.key"]}, (one,)) for path, layer in found).sum()

    counts = vmap(active)(keys)
    assert counts.mean().item() == pytest.approx((3 * 6 - 1) / 4, abs=5 * counts.std().item() / 4000**0.5)


def test_a_dropped_block_is_its_shortcut_in_blocks_that_widen_too():
    model, x = resnet(SHAPE, 3, depth=8).double(), rng.normal(1, 3, *SHAPE, dtype=torch.float64)
    bind(model, [stochastic_depth(p=0.99999, rule="uniform")])
    inner = model.norm1(model.conv1(x)).relu()
    expected = torch.zeros(3, 64, 2, 2, dtype=torch.float64)
    expected[:, :16] = inner[:, :, ::4, ::4]
    y = model.stage3(model.stage2(model.stage1(inner)))
    assert torch.equal(y, expected)
    model.eval()
    bind(whole := resnet(SHAPE, 3, depth=8).double(), [stochastic_depth(p=0.99999, rule="uniform", scaling="inverted")])
    whole.load_state_dict(model.state_dict())
    assert not torch.allclose(whole.eval()(x), model(x))


def test_evaluation_multiplies_each_branch_by_its_survival_probability():
    model, x = residual_mlp((3,), 2, depth=2, width=4).double(), rng.normal(1, 5, 3, dtype=torch.float64)
    plain = p.of(model)[0]
    bind(model, [stochastic_depth(p=0.6)])
    model.eval()
    y = torch.relu(x @ plain["fc1.weight"].T + plain["fc1.bias"])
    for number, survival in ((1, 0.7), (2, 0.4)):
        w = {name.rpartition(f"block{number}.")[2]: t for name, t in plain.items() if f"block{number}." in name}
        inner = torch.relu(y @ w["fc1.weight"].T + w["fc1.bias"])
        y = torch.relu(y + survival * (inner @ w["fc2.weight"].T + w["fc2.bias"]))
    assert torch.allclose(model(x), model.head(y), rtol=1e-10)


def test_droppath_draws_for_all_joins_of_the_net_at_once():
    model = fractal(SHAPE, 3, channels=[4, 6], columns=3)
    assert bind(model, [droppath()]) == PLAIN
    ((path, layer),) = layers(model, DropPath)
    assert (path, layer.joins) == ("body.droppath", ((1, 2), (0, 1, 2)) * 2)
    assert key_names(model) == ("body.droppath.key",)
    with pytest.raises(ValueError, match="has droppath already"):
        bind(model, [droppath()])
    for options in ({"p": 0.0}, {"share_global": 0.0}):
        bind(one := fractal(SHAPE, 3, channels=[4, 6]), [droppath(**options)])
        assert key_names(one)
    bind(none := fractal(SHAPE, 3, channels=[4, 6]), [droppath(p=0.0, share_global=0.0)])
    assert not key_names(none)


def test_after_stochastic_depth_comes_shakedrop_on_the_same_branch():
    model = resnet(SHAPE, 3, depth=8)
    bind(model, [stochastic_depth(), shakedrop()])
    assert len(key_names(model)) == 6
    with pytest.raises(ValueError, match="has shakedrop already"):
        bind(model, [shakedrop()])


@pytest.mark.parametrize("name", ["stochastic-depth", "shakedrop", "droppath"])
def test_models_without_such_places_are_refused(name):
    has = "columns; fractal has" if name == "droppath" else "residual blocks; resnet, resnet-8, .* residual-mlp have"
    with pytest.raises(ValueError, match=f"needs {has} them"):
        bind(mlp((4,), 3), [REGULARIZERS[name]()])
    if name == "droppath":
        with pytest.raises(ValueError, match="needs two columns or more; fractal has them unless"):
            bind(fractal(SHAPE, 3, columns=1), [droppath()])


def test_ends_that_are_no_range_are_refused():
    with pytest.raises(ValueError, match=r"^alpha must be a lower and an upper end, got \[1.0, -1.0\]"):
        shakedrop(alpha=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"^beta must be a lower and an upper end, got \[1.0\]"):
        shakedrop(beta=[1.0])
