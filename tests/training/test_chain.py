"""Chains against autograd: the same gradients and losses, lane by lane, and steps that are the gradient's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune

from fedsim import params as p
from fedsim import rng
from fedsim.models.convolutional import cnn, conv_2, conv_4, conv_6
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.models.mlp import lenet_300_100, linear, mlp, two_nn
from fedsim.models.recurrent import char_lstm
from fedsim.models.residual import resnet_8
from fedsim.records import IGNORED, Examples
from fedsim.strategies.local_rules import plain
from fedsim.training.chain import chain_of
from fedsim.training.chain_layers import _ONEDNN_FROM, _last_dropped
from fedsim.training.client import LocalWork, gradient
from fedsim.training.optimizers import sgd

GREY, COLOUR, CLASSES = (1, 8, 8), (3, 8, 9), 5
ZOO = {
    "linear": (GREY, linear, {}),
    "mlp": (COLOUR, mlp, {"hidden": [7, 6], "dropout": 0.3}),
    "2nn": (GREY, two_nn, {}),
    "lenet-300-100": (GREY, lenet_300_100, {}),
    "cnn": (GREY, cnn, {"channels": [4, 6], "hidden": 16}),
    "cnn-colour": (COLOUR, cnn, {"channels": [4, 6], "hidden": 16, "kernel": 3}),
    "cnn-group": (GREY, cnn, {"channels": [8, 16], "hidden": 9, "norm": "group"}),
    "cnn-layer": (COLOUR, cnn, {"channels": [4, 6], "hidden": 9, "norm": "layer"}),
    "conv-2": ((3, 4, 4), conv_2, {}),
    "conv-4": (GREY, conv_4, {"norm": "group"}),
    "conv-6": (GREY, conv_6, {}),
}


def pfl():
    """Two convolutions before one pool, and dropout of feature maps and of a hidden layer."""
    features = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2), Dropout(0.25)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), Dropout(0.5), nn.Linear(8, CLASSES))


def zoo_model(name):
    shape, make, options = ZOO[name]
    with rng.torch_seeded(11):
        return shape, make(shape, CLASSES, **options)


def stack(model, shape, clients, *, counts=None, batch=4, dtype=torch.float64, seed=1):
    """Different parameters, examples and keys for each client; rows from counts[c] on are padding."""
    start, _ = p.of(model.to(dtype))
    local = {n: t + 0.1 * rng.normal(rng.fold(seed, n), clients, *t.shape, dtype=dtype) for n, t in start.items()}
    inputs = 2 * rng.normal(rng.fold(seed, "x"), clients, batch, *shape, dtype=dtype)
    labels = (rng.uniform(rng.fold(seed, "y"), clients, batch) * CLASSES).long()
    for row, count in zip(labels, counts or [batch] * clients, strict=True):
        row[count:] = IGNORED
    keys = {n: rng.bits(rng.fold(seed, n), clients) for n in key_names(model)}
    return local, inputs, labels, keys


def by_autograd(model, local, inputs, labels, keys):
    """Gradients and loss of each lane by the plain loop's code."""
    work = LocalWork(model.train(), key_names(model), sgd(), plain(), 1, None)
    lanes = []
    for c in range(len(labels)):
        own, own_keys = ({n: t[c].contiguous() for n, t in group.items()} for group in (local, keys))
        lanes.append(gradient(work, own, {}, Examples(inputs[c], labels[c]), own_keys))
    return {n: torch.stack([grads[n] for grads, _ in lanes]) for n in local}, torch.stack([loss for _, loss in lanes])


def assert_close(found, wanted, tolerance):
    """Each entry within tolerance times the largest entry of its tensor, or times 1e-3 where all are tiny."""
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        error = float((found[name] - tensor).abs().max())
        assert error <= tolerance * max(float(tensor.abs().max()), 1e-3), (name, error)


def assert_is_autograd(model, shape, clients, tolerance, **options):
    local, inputs, labels, keys = stack(model, shape, clients, **options)
    chain = chain_of(model)
    before = {n: t.clone() for n, t in local.items()} | {"x": inputs.clone(), "y": labels.clone()}
    grads, losses = chain.gradient(local, inputs, labels, keys)
    assert p.same_bits(before, local | {"x": inputs, "y": labels}) and list(grads) == list(local)
    wanted, wanted_losses = by_autograd(model, local, inputs, labels, keys)
    assert_close(grads | {"loss": losses}, wanted | {"loss": wanted_losses}, tolerance)


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", ZOO)
def test_gradients_of_the_zoo_are_those_of_autograd(name, clients):
    shape, model = zoo_model(name)
    assert_is_autograd(model, shape, clients, 1e-12, counts=[3, 1, 4][:clients])


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", ["mlp", "2nn", "cnn", "cnn-colour", "cnn-group", "conv-4"])
def test_gradients_in_float32_are_those_of_autograd_to_1e_5(name, clients):
    shape, model = zoo_model(name)
    assert_is_autograd(model, shape, clients, 1e-5, counts=[3, 1, 4][:clients], dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clients", [1, 2])
def test_dropout_of_feature_maps_draws_what_the_layer_draws(clients, dtype):
    with rng.torch_seeded(2):
        model = pfl()
    assert_is_autograd(model, (3, 8, 8), clients, 1e-12 if dtype == torch.float64 else 1e-5, dtype=dtype)
    between = nn.Sequential(nn.Conv2d(2, 3, 3), Dropout(0.4), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, CLASSES))
    assert_is_autograd(between, (2, 5, 5), clients, 1e-12 if dtype == torch.float64 else 1e-5, dtype=dtype)


ODD = {
    "grey": lambda: [nn.Conv2d(1, 3, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), nn.Tanh()],
    "grey later": lambda: [nn.Conv2d(2, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 2, bias=False), nn.ReLU()],
    "groups": lambda: [nn.Conv2d(2, 4, 3, groups=2, stride=(1, 2)), nn.Tanh(), nn.Conv2d(4, 4, 2, dilation=2)],
    "borders not counted": lambda: [nn.Conv2d(2, 3, 2), nn.AvgPool2d(3, padding=1, count_include_pad=False)],
    "other divisor": lambda: [nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d((2, 3), stride=1, divisor_override=5)],
    "pool of dropout": lambda: [nn.Conv2d(2, 3, 2), Dropout(0.6), nn.MaxPool2d(2, stride=(1, 2), padding=1)],
    "norm before pools": lambda: [nn.GroupNorm(1, 2), nn.MaxPool2d((2, 3), 1), nn.GroupNorm(2, 2), nn.AvgPool2d(2)],
    "norm first": lambda: [nn.GroupNorm(2, 2), nn.Conv2d(2, 3, 2), nn.ReLU()],
    "no parameters first": lambda: [nn.ReLU(), nn.MaxPool2d(2), nn.Tanh(), Dropout(0.2), nn.Conv2d(2, 3, 2)],
}


@pytest.mark.parametrize("name", ODD)
def test_options_of_layers_mean_what_they_mean_to_torch(name):
    with rng.torch_seeded(9):
        layers = ODD[name]()
        shape = (1 if name == "grey" else 2, 6, 7)
        features = nn.Sequential(*layers, nn.Flatten()).eval()(torch.ones(1, *shape)).numel()
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, CLASSES))
    assert_is_autograd(model, shape, 2, 1e-12, counts=[4, 2])


@pytest.mark.parametrize("clients", [1, 2])
def test_logits_may_come_from_a_pool(clients):
    with rng.torch_seeded(9):
        layers = [nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, CLASSES, 2), nn.AvgPool2d((2, 3)), nn.Flatten()]
        model = nn.Sequential(*layers)
    assert_is_autograd(model, COLOUR, clients, 1e-12, counts=[4, 2][:clients])


@pytest.mark.parametrize("clients", [1, 2])
def test_large_matrices_take_another_product_with_the_same_result(clients):
    model = nn.Sequential(nn.Flatten(), nn.Linear(1030, 300), nn.ReLU(), nn.Linear(300, 900), nn.Linear(900, CLASSES))
    assert model[1].weight.numel() >= _ONEDNN_FROM and model[3].weight.numel() >= _ONEDNN_FROM
    assert_is_autograd(model, (2, 515), clients, 1e-5, counts=[4, 3][:clients], dtype=torch.float32)


def test_gradients_are_those_of_central_differences():
    with rng.torch_seeded(4):
        model = nn.Sequential(
            *[nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten()],
            *[Dropout(0.5), nn.Linear(8, 3)],
        )
    local, inputs, labels, keys = stack(model, (1, 4, 4), 2, counts=[4, 2])
    labels %= 3
    labels[1, 2:] = IGNORED
    grads, losses = chain_of(model).gradient(local, inputs, labels, keys)
    model.train()

    def value(name, c, i, h):
        own = {n: t[c].clone() for n, t in local.items()}
        own[name].view(-1)[i] += h
        logits = functional_call(model, own | {n: k[c] for n, k in keys.items()}, (inputs[c],))
        return float(F.cross_entropy(logits, labels[c], ignore_index=IGNORED).detach())

    for name, tensor in local.items():
        for c in range(2):
            for i in range(tensor[c].numel()):
                slope = (value(name, c, i, 1e-5) - value(name, c, i, -1e-5)) / 2e-5
                assert float(grads[name][c].reshape(-1)[i]) == pytest.approx(slope, abs=1e-8), name
    assert losses.tolist() == pytest.approx([value("0.bias", c, 0, 0.0) for c in range(2)], abs=1e-14)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "cnn-group", "conv-2"])
def test_a_step_is_the_gradient_and_an_update(name, clients, weight_decay):
    shape, model = zoo_model(name)
    local, inputs, labels, keys = stack(model, shape, clients, counts=[2, 4, 1][:clients])
    chain = chain_of(model)
    grads, losses = chain.gradient(local, inputs, labels, keys)
    wanted = {n: w - 0.5 * (grads[n] + weight_decay * w) for n, w in local.items()}
    for start in ({n: t.clone() for n, t in local.items()}, {n: as_stacked(chain, t) for n, t in local.items()}):
        where = {n: t.data_ptr() for n, t in start.items()}
        found = chain.step_(start, inputs, labels, keys, lr=0.5, weight_decay=weight_decay)
        assert_close(start | {"loss": found}, wanted | {"loss": losses}, 1e-12)
        assert where == {n: t.data_ptr() for n, t in start.items()}


def as_stacked(chain, stack):
    """The same numbers in the layout that the chain's own stacks have."""
    copy = chain.stacked({"w": stack[0]}, len(stack))["w"]
    return copy.copy_(stack)


def test_stacks_are_fresh_copies():
    _, model = zoo_model("cnn")
    params, _ = p.of(model)
    stacks = chain_of(model).stacked(params, 3)
    assert list(stacks) == list(params)
    for name, tensor in params.items():
        assert all(torch.equal(lane, tensor) for lane in stacks[name])
        before = tensor.clone()
        stacks[name][0].zero_()
        assert torch.equal(tensor, before) and torch.equal(stacks[name][1], before)
    assert not any(t.requires_grad for t in stacks.values())
    assert stacks["conv2.weight"][1].is_contiguous(memory_format=torch.channels_last)


def test_slices_of_larger_stacks_will_do():
    """As when clients leave a group: views of the first ones, of batches that are cut, and labels in another order."""
    for name in ("mlp", "cnn-colour"):
        shape, model = zoo_model(name)
        local, inputs, labels, keys = stack(model, shape, 3, counts=[3, 2, 3])
        cut = {n: t[:2] for n, t in local.items()}, inputs[:2, :3], labels.t().contiguous().t()[:2, :3]
        grads, losses = chain_of(model).gradient(*cut, {n: k[:2] for n, k in keys.items()})
        wanted, wanted_losses = by_autograd(model, *cut, keys)
        assert_close(grads | {"loss": losses}, wanted | {"loss": wanted_losses}, 1e-12)
        losses = chain_of(model).step_(*cut, keys={n: k[:2] for n, k in keys.items()}, lr=0.5, weight_decay=0.0)
        losses += 1  # a tensor like any other
        stepped = {n: t[:2] for n, t in local.items()}
        assert_close(grads, wanted, 1e-12)
        assert p.same_bits(
            {n: t[2:] for n, t in stack(model, shape, 3)[0].items()}, {n: t[2:] for n, t in local.items()}
        )
        assert all(not torch.equal(stepped[n], t[:2]) for n, t in stack(model, shape, 3)[0].items())


def test_padding_rows_count_for_nothing_whatever_they_hold():
    for name in ("mlp", "cnn-group"):
        shape, model = zoo_model(name)
        local, inputs, labels, keys = stack(model, shape, 3, counts=[3, 1, 4])
        first = chain_of(model).gradient(local, inputs, labels, keys)
        other = torch.where((labels == IGNORED).view(3, 4, 1, 1, 1), 100 - inputs, inputs)
        again = chain_of(model).gradient(local, other, labels, keys)
        assert p.same_bits(first[0] | {"loss": first[1]}, again[0] | {"loss": again[1]})
        labels[2, 0] = labels[0, 0] = IGNORED  # padding ahead of other rows
        grads, losses = chain_of(model).gradient(local, inputs, labels, keys)
        wanted, wanted_losses = by_autograd(model, local, inputs, labels, keys)
        assert_close(grads | {"loss": losses}, wanted | {"loss": wanted_losses}, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_same_call_gives_the_same_bits_and_lanes_do_not_matter_to_each_other(name):
    shape, model = zoo_model(name)
    local, inputs, labels, keys = stack(model, shape, 3, counts=[3, 4, 4], dtype=torch.float32)
    chain, losses, ends = chain_of(model), [], []
    for seed in (1, 2, 1):  # something else in between
        x = inputs if seed == 1 else inputs.flip(0) - 1
        ends.append({n: t.clone() for n, t in local.items()})
        losses.append(chain.step_(ends[-1], x, labels, keys, lr=0.1, weight_decay=0.01))
    assert p.same_bits(ends[0], ends[2]) and torch.equal(losses[0], losses[2])
    assert not p.same_bits(ends[0], ends[1])
    for c in range(3):
        one = slice(c, c + 1)
        alone, own_keys = {n: t[one].clone() for n, t in local.items()}, {n: k[one] for n, k in keys.items()}
        chain.step_(alone, inputs[one], labels[one], own_keys, lr=0.1, weight_decay=0.01)
        assert_close(alone, {n: t[one] for n, t in ends[0].items()}, 1e-6)


def test_equal_entries_in_a_window_are_treated_as_autograd_treats_them():
    """Small integers, so that windows have equal largest entries, positive, zero and negative."""
    with rng.torch_seeded(6):
        model = nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Flatten(), nn.Linear(75, CLASSES)
        )
    local, inputs, labels, keys = stack(model, (1, 6, 6), 2, batch=8)
    local, inputs = {n: t.mul(3).round() for n, t in local.items()}, inputs.div(2).round()
    local["0.bias"] = torch.tensor([[-6.0, 1.0, -2.0]] * 2, dtype=torch.float64)
    maps = F.conv2d(inputs[0], local["0.weight"][0], local["0.bias"][0])
    windows = F.unfold(maps, 3).view(8, 3, 9, -1)
    ties = (windows == windows.amax(2, keepdim=True)).sum(2) > 1
    assert all(
        bool((ties & sign(windows.amax(2))).any()) for sign in (lambda t: t > 0, lambda t: t == 0, lambda t: t < 0)
    )
    grads, _ = chain_of(model).gradient(local, inputs, labels, keys)
    assert_close(grads, by_autograd(model, local, inputs, labels, keys)[0], 1e-12)


def test_rows_of_any_number_of_axes():
    """A model of features only also takes examples of (time, features), with a label for each time."""
    with rng.torch_seeded(8):
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.ReLU(), Dropout(0.3), nn.Linear(6, CLASSES))
    local, inputs, _, keys = stack(model, (7, 3), 2)
    labels = (rng.uniform(5, 2, 4, 7) * CLASSES).long()
    labels[1, 2:, 3:] = IGNORED
    grads, losses = chain_of(model).gradient(local, inputs, labels, keys)
    wanted, wanted_losses = by_autograd(model, local, inputs, labels, keys)
    assert_close(grads | {"loss": losses}, wanted | {"loss": wanted_losses}, 1e-12)


@given(st.floats(1e-9, 1 - 2**-53), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=200)
def test_dropout_compares_as_the_layer_does_next_to_p(p_dropped, key):
    """Draws around p, where rounding p to float32 decides; and the draws are those of ``rng.uniform``."""
    nearest = round(p_dropped * 2**24)
    draws = torch.arange(max(nearest - 3, 0), min(nearest + 4, 2**24)).float() * 2.0**-24
    assert torch.equal(draws > _last_dropped(p_dropped), draws >= p_dropped)
    keys = torch.stack([rng.as_tensor(key), rng.as_tensor(key + 1)])
    wanted = torch.stack([rng.uniform(k, 50) for k in keys])
    assert torch.equal(rng.uniforms(keys, 50), wanted)


@st.composite
def chains(draw):
    """A model of layers of all kinds in any order that fits, and the shape of its images."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(3, 7), st.integers(3, 7)))
    layers, maps = [], torch.zeros(2, *shape)  # two: group norm refuses a single number
    for kind in draw(
        st.lists(st.sampled_from(["conv", "max", "avg", "norm", "relu", "tanh", "drop", "same"]), max_size=5)
    ):
        layer = draw(map_layer(kind, maps.shape[1]))
        if min(maps.shape[2:]) >= 3 or kind not in ("conv", "max", "avg"):
            layers, maps = [*layers, layer], layer.eval()(maps)
    bias, width = draw(st.booleans()), draw(st.integers(1, 6))
    entrywise = draw(st.lists(st.sampled_from([nn.ReLU(), nn.Tanh(), Dropout(0.7)]), max_size=3, unique_by=type))
    dense = nn.Sequential(*entrywise, nn.Flatten(), nn.Linear(maps[0].numel(), width, bias=bias), nn.ReLU())
    return nn.Sequential(*layers, dense, nn.Identity(), nn.Linear(width, CLASSES)), shape


def map_layer(kind, channels):
    """Norms have a large eps: a group of one number multiplies rounding errors by 1 / sqrt(eps)."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    small = st.tuples(st.integers(1, 2), st.integers(1, 2))
    groups = st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0])
    conv = {
        "padding": st.sampled_from([0, 1, "valid", (1, 0)]),
        "bias": st.booleans(),
        "stride": small,
        "groups": groups,
    }
    return {
        "conv": st.builds(
            lambda out, k, groups, **o: nn.Conv2d(channels, groups * out, k, groups=groups, **o),
            st.integers(1, 3),
            pair,
            **conv,
        ),
        "same": groups.map(lambda g: nn.Conv2d(channels, channels, (3, 1), padding="same", dilation=2, groups=g)),
        "max": st.builds(nn.MaxPool2d, st.sampled_from([2, 3, (2, 3)]), small, st.integers(0, 1)),
        "avg": st.builds(
            nn.AvgPool2d,
            st.sampled_from([2, (3, 2)]),
            small,
            st.integers(0, 1),
            count_include_pad=st.booleans(),
            divisor_override=st.sampled_from([None, 3]),
        ),
        "norm": groups.map(lambda g: nn.GroupNorm(g, channels, eps=0.1)),
        "relu": st.builds(nn.ReLU),
        "tanh": st.builds(nn.Tanh),
        "drop": st.builds(Dropout, st.sampled_from([0.0, 0.25])),
    }[kind]


@given(chains(), st.integers(1, 3), st.integers(0, 2**32))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_gradients_of_random_chains_are_those_of_autograd(model_and_shape, clients, seed):
    model, shape = model_and_shape
    assert_is_autograd(model, shape, clients, 1e-10, counts=[3, 2, 1][:clients], batch=3, seed=seed)


class OtherLinear(nn.Linear):
    """A subclass, whose forward pass may be anything."""


def _with(change, model):
    change(model)
    return model


def small(*layers):
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 3))


class Skipping(nn.Sequential):
    """A subclass of the container."""

    def forward(self, x):
        return x + super().forward(x)


SHARED = nn.Linear(4, 4)
NO_CHAINS = {
    "subclass": lambda: small(OtherLinear(4, 4)),
    "subclass of the container": lambda: small(Skipping(nn.Linear(4, 4))),
    "batch norm": lambda: small(nn.BatchNorm1d(4)),
    "other layer": lambda: small(nn.GELU()),
    "torch's dropout": lambda: small(nn.Dropout(0.5)),
    "no sequence": lambda: resnet_8((3, 8, 8), CLASSES),
    "tokens": lambda: char_lstm((20,), 30),
    "batch norm of maps": lambda: cnn(GREY, CLASSES, norm="batch"),
    "hook": lambda: _with(lambda m: m[0].register_forward_hook(lambda *_: None), small()),
    "hook of the whole": lambda: _with(lambda m: m.register_forward_pre_hook(lambda *_: None), small()),
    "backward hook": lambda: _with(lambda m: m[0].register_full_backward_hook(lambda *_: None), small()),
    "patched": lambda: _with(lambda m: setattr(m[1], "forward", torch.sin), small(nn.ReLU())),
    "parametrised": lambda: _with(lambda m: nn.utils.parametrizations.orthogonal(m[0]), small()),
    "pruned by torch": lambda: _with(lambda m: prune.identity(m[0], "weight"), small()),
    "frozen": lambda: _with(lambda m: m[0].bias.requires_grad_(False), small()),
    "shared layer": lambda: small(SHARED, nn.ReLU(), SHARED),
    "shared weight": lambda: _with(lambda m: setattr(m[1], "weight", m[0].weight), small(nn.Linear(4, 4))),
    "one dropout called twice": lambda: small(*[Dropout(0.5)] * 2),
    "spare parameter": lambda: _with(lambda m: m.register_parameter("spare", nn.Parameter(torch.ones(2))), small()),
    "spare buffer": lambda: _with(lambda m: m[0].register_buffer("count", torch.zeros(())), small()),
    "two dtypes": lambda: _with(lambda m: m[0].double(), small()),
    "half": lambda: small().bfloat16(),
    "nothing to train": lambda: nn.Sequential(nn.Flatten(), nn.ReLU()),
    "maps as logits": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()),
    "linear on maps": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(4, 3), nn.Flatten()),
    "flat to maps": lambda: nn.Sequential(nn.Flatten(), nn.Conv2d(1, 2, 1), nn.Flatten()),
    "rows flattened": lambda: small(nn.Flatten()),
    "partly flattened": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(4, 3)),
    "reflected padding": lambda: convolution(padding=1, padding_mode="reflect"),
    "uneven padding": lambda: convolution(kernel_size=2, padding="same"),
    "rounded up": lambda: nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(4, 3)),
    "average rounded up": lambda: nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(4, 3)),
    "dilated pool": lambda: nn.Sequential(nn.MaxPool2d(2, dilation=2), nn.Flatten(), nn.Linear(4, 3)),
    "norm without scale": lambda: nn.Sequential(nn.GroupNorm(1, 4, affine=False), nn.Flatten(), nn.Linear(4, 3)),
}


def convolution(**options):
    return nn.Sequential(nn.Conv2d(1, 2, **{"kernel_size": 3, **options}), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("name", NO_CHAINS)
def test_other_models_are_no_chains(name):
    assert chain_of(NO_CHAINS[name]()) is None


def test_what_the_refusals_vary_is_a_chain():
    assert chain_of(small(nn.ReLU())) and chain_of(convolution(padding=1)) and chain_of(nn.Linear(4, 3))
    assert chain_of(nn.Sequential(nn.GroupNorm(1, 4), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3)))
