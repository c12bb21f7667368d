"""FedAvg against arithmetic that shares no code with it: closed forms, numpy loops, torch.optim. All in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedsim import rng
from fedsim.engines.engine import client_key
from fedsim.engines.reference import reference
from fedsim.federation import run, start
from fedsim.models.residual import resnet_8
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import batches
from fedsim.training.optimizers import sgd

TOLERANCE = 1e-12


def final(federation, engine=None):
    return run(federation, start(federation), engine or reference(), lambda result: None)


def as_numpy(federation):
    """Inputs, labels and index arrays of the clients."""
    data = federation.data
    clients = [data.partition.client(k) for k in range(data.num_clients)]
    return data.train.inputs.numpy(), data.train.labels.numpy(), clients


def softmax_gradient(w, b, x, y):
    """Gradient of the mean cross-entropy of softmax(x w' + b): (p - onehot)' x / n, and its mean over rows."""
    scores = x @ w.T + b
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(len(b))[y]) / len(y)
    return error.T @ x, error.sum(0)


def distance(params, w, b):
    return max(np.abs(params["weight"].numpy() - w).max(), np.abs(params["bias"].numpy() - b).max())


def test_one_full_batch_step_of_all_clients_is_one_central_gradient_step(build):
    """The gradient of the pooled data by closed form and by autograd; client sizes 7, 2, 11."""
    federation = build(fedavg(), sgd(lr=0.8))
    state, x, y = start(federation), *as_numpy(federation)[:2]
    w, b = state.params["weight"].numpy(), state.params["bias"].numpy()
    dw, db = softmax_gradient(w, b, x, y)

    leaves = [tensor.clone().requires_grad_() for tensor in state.params.values()]
    pooled = federation.data.train
    F.cross_entropy(F.linear(pooled.inputs, *leaves), pooled.labels).backward()
    assert np.abs(leaves[0].grad.numpy() - dw).max() < TOLERANCE

    trained = final(federation).params
    assert distance(trained, w - 0.8 * dw, b - 0.8 * db) < TOLERANCE
    assert distance(trained, w, b) > 0.01  # it moved at all


def test_uniform_weighting_is_the_plain_mean_of_client_gradients_and_another_step(build):
    federation = build(fedavg(weighting="uniform"), sgd(lr=0.8))
    x, y, clients = as_numpy(federation)
    params = start(federation).params
    w, b = params["weight"].numpy(), params["bias"].numpy()
    steps = [softmax_gradient(w, b, x[own], y[own]) for own in clients]
    dw, db = np.mean([step[0] for step in steps], axis=0), np.mean([step[1] for step in steps], axis=0)
    trained = final(federation).params
    assert distance(trained, w - 0.8 * dw, b - 0.8 * db) < TOLERANCE
    by_examples = final(build(fedavg(), sgd(lr=0.8))).params
    assert distance(trained, by_examples["weight"].numpy(), by_examples["bias"].numpy()) > 0.01


@pytest.mark.parametrize(("server_lr", "weighting"), [(0.5, "examples"), (1.0, "examples"), (1.7, "uniform")])
def test_two_rounds_are_those_of_a_hand_written_loop(build, server_lr, weighting):
    """Two epochs of full batches, unequal clients, a server step of its own; the second round starts from the first."""
    federation = build(fedavg(server_lr=server_lr, weighting=weighting), sgd(lr=0.3), epochs=2, rounds=2)
    x, y, clients = as_numpy(federation)
    w, b = (start(federation).params[name].numpy().copy() for name in ("weight", "bias"))
    shares = np.array([len(own) for own in clients] if weighting == "examples" else [1, 1, 1], dtype=float)
    for _ in range(2):
        mean_w, mean_b = np.zeros_like(w), np.zeros_like(b)
        for own, share in zip(clients, shares / shares.sum(), strict=True):
            local_w, local_b = w, b
            for _ in range(2):
                dw, db = softmax_gradient(local_w, local_b, x[own], y[own])
                local_w, local_b = local_w - 0.3 * dw, local_b - 0.3 * db
            mean_w, mean_b = mean_w + share * local_w, mean_b + share * local_b
        w, b = (1 - server_lr) * w + server_lr * mean_w, (1 - server_lr) * b + server_lr * mean_b
    assert distance(final(federation).params, w, b) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.3},
        {"lr": 0.3, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.8, "nesterov": True},
        {"lr": 0.2, "weight_decay": 0.05},
        {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_one_client_is_torch_sgd_on_the_same_batches(build, options):
    """Seven examples in batches of 3, two epochs: 3, 3, 1, 3, 3, 1. Two rounds: momentum starts anew in each."""
    with rng.torch_seeded(1):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    federation = build(fedavg(), sgd(**options), sizes=(7,), epochs=2, batch_size=3, rounds=2, model=model)
    trained = final(federation).params

    own = federation.data.client(0)
    sizes = []
    for round in (1, 2):
        optimizer = torch.optim.SGD(model.parameters(), **options)
        key = client_key(rng.fold(federation.seed, "round", round), 0)
        for indices in batches(7, 3, 2, key):
            optimizer.zero_grad()
            F.cross_entropy(model(own.inputs[indices]), own.labels[indices]).backward()
            optimizer.step()
            sizes.append(len(indices))
    assert sizes == [3, 3, 1] * 4
    for name, parameter in model.named_parameters():
        assert float((trained[name] - parameter.detach()).abs().max()) < TOLERANCE


def test_momentum_changes_something_the_tests_above_would_see(build):
    plain, heavy = (
        final(build(fedavg(), sgd(lr=0.1, **more), epochs=2, batch_size=3)).params for more in ({}, {"momentum": 0.9})
    )
    assert float((plain["weight"] - heavy["weight"]).abs().max()) > 1e-3


def test_batch_norm_buffers_are_averaged_by_examples_and_its_counters_kept(build):
    """Floating buffers: sum n_k b_k / n; the integer counter keeps the server's value."""
    with rng.torch_seeded(2):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    model[1].running_mean.copy_(torch.linspace(-1, 1, 5))
    model[1].num_batches_tracked.fill_(41)
    federation = build(fedavg(), sgd(lr=0.1), model=model)
    before = start(federation)
    after = final(federation)

    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mean, var = np.zeros(5), np.zeros(5)
    for k in range(3):
        hidden = F.linear(federation.data.client(k).inputs, params["0.weight"], params["0.bias"]).numpy()
        share = len(hidden) / 20
        mean += share * (0.9 * before.buffers["1.running_mean"].numpy() + 0.1 * hidden.mean(0))
        var += share * (0.9 * before.buffers["1.running_var"].numpy() + 0.1 * hidden.var(0, ddof=1))
    assert np.abs(after.buffers["1.running_mean"].numpy() - mean).max() < TOLERANCE
    assert np.abs(after.buffers["1.running_var"].numpy() - var).max() < TOLERANCE
    assert after.buffers["1.num_batches_tracked"].item() == 41
    assert list(after.buffers) == list(before.buffers)
    assert before.buffers["1.running_var"].eq(1).all()  # nobody wrote into the broadcast


def test_a_residual_network_with_batch_norm_keeps_counters_and_moves_statistics(build):
    with rng.torch_seeded(3):
        model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), resnet_8((1, 2, 2), 3, norm="batch")).double()
    federation = build(fedavg(), sgd(lr=0.05), model=model)
    before, after = start(federation), final(federation)
    counters = [name for name, b in before.buffers.items() if not b.is_floating_point()]
    assert len(counters) >= 7
    for name, buffer in after.buffers.items():
        assert torch.equal(buffer, before.buffers[name]) == (name in counters), name
        assert buffer.dtype == before.buffers[name].dtype
