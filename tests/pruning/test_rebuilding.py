"""Pruning by what the next layer reads: against brute force over channels, and where the rest can make up for all."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.config import build, load
from fedsim.config.pruned import check_apart
from fedsim.deploy import server
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.errors import ConfigError
from fedsim.federation import cohort, run, start
from fedsim.pruning.fitting import fitted
from fedsim.pruning.pruning import Moment
from fedsim.pruning.rebuilding import channel_reconstruction, thinet
from fedsim.records import Examples

SHAPE, ALL = (1, 6, 6), 10_000  # positions: more than there are
METHODS = {"thinet": thinet, "reconstruction": channel_reconstruction}


def network(seed=1):
    with rng.torch_seeded(seed):
        front = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()]
        return nn.Sequential(*front, nn.Flatten(), nn.Linear(16, 5)).double()


def inputs(n=20, seed=3):
    return rng.normal(seed, n, *SHAPE, dtype=torch.float64)


def moment(model, x, round=2):
    params, buffers = p.of(model)
    seen = Examples(x, torch.zeros(len(x), dtype=torch.int64))
    asked = dict.fromkeys(("probe", "product", "fresh"))  # for none of which there is a reason here
    facts = {"memory": {}, "key": 5, "model": model, "input_shape": SHAPE, "examples": lambda n: seen}
    return Moment(round=round, rounds=9, params=params, buffers=buffers, **facts, **asked)


def pruned(method, model, x, **options):
    change = method(at=1, positions=ALL, **options).before(moment(model, x))
    small = fitted(model, change.params, SHAPE)
    small.load_state_dict({**change.params, **change.buffers})
    return small, change


def summands(model, x):
    """What each channel adds to the second convolution and to the linear layer, without biases: (channels, numbers)."""
    with torch.no_grad():
        first = model[1](model[0](x))
        second = model[3](model[2](first))
        conv = [F.conv2d(first[:, [j]], model[2].weight[:, [j]]).flatten() for j in range(first.shape[1])]
        flat, each = second.flatten(1), 4
        parts = [slice(each * j, each * j + each) for j in range(second.shape[1])]
        linear = [(flat[:, part] @ model[5].weight[:, part].T).flatten() for part in parts]
    return torch.stack(conv), torch.stack(linear)


def greedy(parts, gone):
    """By trying every channel, with the sums themselves and not their products."""
    removed = []
    for _ in range(gone):
        costs = {j: float(parts[[*removed, j]].sum(0).square().sum()) for j in range(len(parts)) if j not in removed}
        removed.append(min(costs, key=costs.get))
    return [j for j in range(len(parts)) if j not in removed]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_thinet_is_brute_force_layer_by_layer(seed):
    model, x = network(seed), inputs()
    small, _ = pruned(thinet, model, x, sparsity=0.5)
    conv, _ = summands(model, x)
    first = greedy(conv, 3)
    scales = np.linalg.lstsq(conv[first].T.numpy(), conv.sum(0).numpy(), rcond=None)[0]
    expected = model[2].weight.detach()[:, first] * torch.from_numpy(scales)[None, :, None, None]
    assert torch.equal(small[0].weight, model[0].weight[first])
    between = nn.Sequential(small[0], model[1], nn.Conv2d(3, 4, 3), *list(model)[3:]).double()
    with torch.no_grad():
        between[2].weight.copy_(expected)
        between[2].bias.copy_(model[2].bias)
    _, linear = summands(between, x)
    second = greedy(linear, 2)
    torch.testing.assert_close(small[2].weight.detach(), expected[second], rtol=1e-5, atol=1e-7)
    assert torch.equal(small[2].bias, model[2].bias[second])
    scales = np.linalg.lstsq(linear[second].T.numpy(), linear.sum(0).numpy(), rcond=None)[0]
    columns = [4 * j + place for j in second for place in range(4)]
    factors = torch.from_numpy(scales).repeat_interleave(4)
    torch.testing.assert_close(
        small[5].weight.detach(), model[5].weight.detach()[:, columns] * factors, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reconstruction_gives_the_weights_of_a_regression_on_what_was_returned_before(seed):
    model, x = network(seed), inputs(40)
    small, _ = pruned(channel_reconstruction, model, x, sparsity=0.5)
    first = [next(i for i in range(6) if torch.equal(model[0].weight[i], w)) for w in small[0].weight]
    with torch.no_grad():
        hidden, target = model[1](model[0](x)), model[2](model[1](model[0](x))) - model[2].bias[:, None, None]
        rows, wanted = [], []
        for n, i, k in itertools.product(range(40), range(2), range(2)):
            rows.append(hidden[n, first, i : i + 3, k : k + 3].flatten().numpy())
            wanted.append(target[n, :, i, k].numpy())
    weights = np.linalg.lstsq(np.stack(rows), np.stack(wanted), rcond=None)[0].T.reshape(4, 3, 3, 3)
    second = [
        next(j for j in range(4) if np.allclose(weights[j], w, rtol=1e-3, atol=1e-5)) for w in small[2].weight.detach()
    ]
    assert len(set(second)) == 2
    with torch.no_grad():
        flat = small[4](small[3](small[2](small[1](small[0](x)))))
        wanted = model(x) - model[5].bias
    weights = np.linalg.lstsq(flat.numpy(), wanted.numpy(), rcond=None)[0].T
    torch.testing.assert_close(small[5].weight.detach(), torch.from_numpy(weights), rtol=1e-4, atol=1e-5)


def test_channels_that_are_multiples_of_others_are_made_up_for():
    """Half of each layer's channels are a positive multiple of others before a ReLU: nothing is lost without them."""
    model, x = network(), inputs(60)
    with torch.no_grad():
        for layer, half in ((model[0], 3), (model[2], 2)):
            layer.weight[half:] = 2 * layer.weight[:half]
            layer.bias[half:] = 2 * layer.bias[:half]
        model[2].weight[:, 3:] = model[2].weight[:, :3]
        model[5].weight[:, 8:] = model[5].weight[:, :8]
    small, change = pruned(channel_reconstruction, model, x, sparsity=0.5)
    assert {n: len(t) for n, t in change.params.items() if n.endswith("bias")} == {
        "0.bias": 3,
        "2.bias": 2,
        "5.bias": 5,
    }
    other = inputs(7, seed=9)
    torch.testing.assert_close(small(other), model(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS.values())
def test_the_model_is_left_as_it_was_and_only_readers_weights_are_new(method):
    model, x = network(), inputs()
    before = {n: t.clone() for n, t in p.of(model)[0].items()}
    _, change = pruned(method, model, x, sparsity=0.3)
    assert p.same_bits(p.of(model)[0], before)
    assert change.restarted and torch.equal(change.params["5.bias"], before["5.bias"])
    assert change.params["0.weight"].shape == (5, 1, 3, 3) and change.params["5.weight"].shape == (5, 12)
    kept = {tuple(row.flatten().tolist()) for row in before["0.weight"]}
    assert all(tuple(row.flatten().tolist()) in kept for row in change.params["0.weight"])


class TwoReaders(nn.Module):
    """The first layer's channels are read twice; the second's once."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(36, 6), nn.Linear(6, 4), nn.Linear(6, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        h = torch.relu(self.first(x.flatten(1)))
        return self.head(torch.relu(self.left(h))) + 0 * self.right(h).sum(1, keepdim=True)


@pytest.mark.parametrize("method", METHODS.values())
def test_layers_that_several_read_stay_whole(method):
    with rng.torch_seeded(1):
        model = TwoReaders().double()
    _, change = pruned(method, model, inputs(), sparsity=0.5)
    assert change.params["first.weight"].shape == (6, 36) and change.params["left.weight"].shape == (2, 6)


@pytest.mark.parametrize("method", METHODS.values())
def test_a_reader_that_is_not_trained_is_not_changed(method):
    model = network()
    model[5].weight.requires_grad_(False)
    _, change = pruned(method, model, inputs(), sparsity=0.5)
    assert {**change.params, **change.buffers}["5.weight"].shape == (5, 16) and change.params["0.weight"].shape[0] == 3


CONFIG = {
    "data": {"dataset": "digits", "clients": 6, "split": "iid"},
    "model": {"name": "cnn", "channels": [4, 6], "kernel": 3, "hidden": 8, "norm": "group"},
    "train": {"rounds": 3, "batch_size": 32, "clients_per_round": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_server_sees_examples_of_the_cohort_alone_as_many_of_each(name):
    made, _ = build.federation(load.load({**CONFIG, "pruning": {"name": name, "at": 1, "examples": 30}}))
    seen, before = [], made.pruning.before

    def watched(one):
        return before(replace(one, examples=lambda n: seen.append(one.examples(n)) or seen[-1]))

    watched_one = replace(made, pruning=replace(made.pruning, before=watched))
    final = run(watched_one, start(made), reference(), lambda _: None)
    (examples,) = seen
    chosen = cohort(made, 2).tolist()
    owners = [
        [k for k in chosen if bool((made.data.client(k).inputs == x).flatten(1).all(1).any())] for x in examples.inputs
    ]
    assert len(examples) == 30 and all(sum(k in own for own in owners) >= 10 for k in chosen) and all(owners)
    assert final.params["conv1.weight"].shape[0] == 2 and final.params["conv2.weight"].shape[0] == 3
    again = run(made, start(made), local(mode="sequential", workers=1), lambda _: None)
    assert p.same_bits(again.params, final.params)


@pytest.mark.parametrize("name", METHODS)
def test_it_is_refused_on_separate_machines(name):
    checked = load.load({**CONFIG, "pruning": {"name": name, "at": 1}})
    with pytest.raises(ConfigError, match=rf"pruning: {name} looks at training examples of clients, .* simulate it"):
        check_apart(checked)
    with pytest.raises(ConfigError, match="looks at training examples"):
        server._check(None, checked)
    check_apart(load.load({**CONFIG, "pruning": {"name": "l1-filter", "at": 1}}))


def test_models_without_such_layers_are_refused():
    with rng.torch_seeded(1):
        model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Conv1d(4, 2, 3))
    with pytest.raises(ValueError, match="needs a layer that one other reads"):
        thinet(at=1).check(model, (1, 9))
