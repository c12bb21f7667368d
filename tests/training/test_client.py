"""One client's training: which batches it sees, which keys its layers get, what it returns."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names, step_keys
from fedsim.models.layers.lstm import plain_cells
from fedsim.models.zoo import char_lstm
from fedsim.records import Broadcast, Examples
from fedsim.strategies.local_rules import plain
from fedsim.training.client import LocalWork, batches, directed, gradient, product, train_client
from fedsim.training.local_rule import LocalRule
from fedsim.training.objective import Objective
from fedsim.training.optimizers import adam, sgd

DATA = Examples(rng.normal(1, 11, 4, dtype=torch.float64) * 2, (rng.uniform(2, 11) * 3).long())


def work(*layers, epochs=2, batch_size=4, rule=None, **options):
    with rng.torch_seeded(3):
        model = nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3)).double()
    return LocalWork(model, key_names(model), sgd(**{"lr": 0.5, **options}), rule or plain(), epochs, batch_size)


def broadcast_of(job, extra=None):
    return Broadcast(*p.of(job.model), extra or {}, 1)


@given(st.integers(1, 30), st.integers(1, 12) | st.none(), st.integers(1, 3), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=60)
def test_every_epoch_holds_every_example_once(n, batch_size, epochs, key):
    size = batch_size or n
    seen = [indices.tolist() for indices in batches(n, batch_size, epochs, key)]
    per_epoch = -(-n // size)
    assert len(seen) == epochs * per_epoch
    for epoch in range(epochs):
        own = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for batch in own for i in batch) == list(range(n))
        assert [len(batch) for batch in own] == [size] * (n // size) + ([n % size] if n % size else [])


def test_epochs_and_keys_have_orders_of_their_own():
    first, second = (torch.cat(list(batches(50, 7, 2, key))).tolist() for key in (1, 2))
    assert len({tuple(order) for order in (first[:50], first[50:], second[:50], second[50:])}) == 4


def test_the_gradient_is_that_of_central_differences():
    job = work(nn.Tanh())
    local, batch, h = p.of(job.model)[0], DATA.take(torch.arange(5)), 1e-6
    grads, loss = gradient(job, local, {}, batch, {})

    def value(params):
        return float(F.cross_entropy(functional_call(job.model, params, (batch.inputs,)), batch.labels).detach())

    assert float(loss) == pytest.approx(value(local), abs=1e-14)
    for name, tensor in local.items():
        for i in range(tensor.numel()):
            nudge = torch.zeros_like(tensor).reshape(-1)
            nudge[i] = h
            up, down = ({**local, name: tensor + sign * nudge.view_as(tensor)} for sign in (1, -1))
            assert float(grads[name].reshape(-1)[i]) == pytest.approx((value(up) - value(down)) / (2 * h), abs=1e-8)


def test_a_parameter_that_is_not_used_has_gradient_zero():
    job = work(nn.Tanh())
    job.model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    grads, _ = gradient(job, p.of(job.model)[0], {}, DATA, {})
    assert grads["spare"].tolist() == [0.0, 0.0]


def test_dropout_gets_the_key_of_its_client_step_and_path():
    """Steps by hand: key of step s is fold(key, "step", s), that of a layer fold of it and the layer's path."""
    job, key = work(nn.Tanh(), Dropout(0.5)), rng.fold(8, "client", 3)
    broadcast = broadcast_of(job)
    result = train_client(job, broadcast, 3, DATA, state={}, key=key)
    local, losses = broadcast.params, []
    for step, indices in enumerate(batches(11, 4, 2, key)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in local.items()}
        keys = step_keys(["2.key"], rng.fold(key, "step", step))
        loss = F.cross_entropy(
            functional_call(job.model, {**leaves, **keys}, (DATA.inputs[indices],)), DATA.labels[indices]
        )
        loss.backward()
        losses.append((len(indices), float(loss.detach())))
        local = {name: leaf.detach() - 0.5 * leaf.grad for name, leaf in leaves.items()}
    for name, update in result.update.items():
        assert torch.allclose(update, local[name] - broadcast.params[name], rtol=0, atol=1e-12)
    sizes, values = zip(*losses, strict=True)
    assert result.metrics == {"train_loss": pytest.approx(np.average(values, weights=sizes), abs=1e-12)}
    other = train_client(job, broadcast, 3, DATA, state={}, key=key + 1)
    assert not p.same_bits(other.update, result.update)


def test_the_same_call_gives_the_same_bits_whatever_came_before():
    job = work(nn.BatchNorm1d(6), Dropout(0.3), momentum=0.9)
    broadcast = broadcast_of(job)
    first = train_client(job, broadcast, 0, DATA, state={}, key=5)
    torch.rand(3)
    train_client(job, broadcast, 1, DATA, state={}, key=6)
    job.model.eval()
    again = train_client(job, broadcast, 0, DATA, state={}, key=5)
    assert p.same_bits(first.update, again.update) and p.same_bits(first.buffers, again.buffers)
    assert first.metrics == again.metrics


def test_the_result_is_local_minus_global_and_the_broadcast_stays_as_it_was():
    finished = []
    job = work(nn.BatchNorm1d(6), epochs=3, batch_size=3)  # batches of 3, 3, 3, 2
    rule = job.rule._replace(finish=lambda local, b, state, steps: finished.append((local, steps)) or state)
    broadcast = broadcast_of(job)
    before = [{name: t.clone() for name, t in group.items()} for group in (broadcast.params, broadcast.buffers)]
    result = train_client(replace(job, rule=rule), broadcast, 7, DATA, state={}, key=9)
    (local, steps), *more = finished
    assert not more and steps == 3 * 4
    assert (result.client, result.num_examples, result.state) == (7, 11, {})
    assert all(torch.equal(result.update[n], local[n] - before[0][n]) for n in local)
    assert p.same_bits(broadcast.params, before[0]) and p.same_bits(broadcast.buffers, before[1])
    assert p.same_bits(p.of(job.model)[0], before[0])
    assert result.buffers["1.num_batches_tracked"].item() == 12
    assert not any(tensor.requires_grad for tensor in [*result.update.values(), *result.buffers.values()])


def test_a_rule_corrects_every_gradient_and_finishes_once():
    """A rule that adds extra - state to each gradient: the update is the plain one's plus a constant times steps."""

    def correct(grads, local, broadcast, state):
        return {name: torch.full_like(g, 0.25) + broadcast.extra["e"] - state["s"] for name, g in grads.items()}

    rule = LocalRule(lambda params: {}, correct, lambda local, b, state, steps: {"s": state["s"] * steps})
    job = work(nn.Tanh(), rule=rule, lr=0.1)
    extra, state = {"e": torch.tensor(2.0)}, {"s": torch.tensor(3.0)}
    result = train_client(job, broadcast_of(job, extra), 0, DATA, state=state, key=1)
    steps = 2 * 3
    for update in result.update.values():
        assert torch.allclose(update, torch.full_like(update, -0.1 * steps * (0.25 + 2 - 3)), atol=1e-12)
    assert result.state["s"].item() == 18.0 and state["s"].item() == 3.0


@pytest.mark.parametrize("round", [1, 2, 5])
def test_adam_starts_afresh_in_every_round_with_the_step_size_of_the_round(round):
    """By hand: torch's Adam from nothing, with its lr as the schedule says for the round."""
    job = replace(work(nn.Tanh()), optimizer=adam(lr=0.02), schedule=lambda round: 1 / round)
    broadcast = replace(broadcast_of(job), round=round)
    result = train_client(job, broadcast, 0, DATA, state={}, key=4)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in broadcast.params.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=0.02 / round)
    for indices in batches(11, 4, 2, 4):
        optimizer.zero_grad()
        logits = functional_call(job.model, leaves, (DATA.inputs[indices],))
        F.cross_entropy(logits, DATA.labels[indices]).backward()
        optimizer.step()
    for name, update in result.update.items():
        assert torch.allclose(update, leaves[name].detach() - broadcast.params[name], rtol=0, atol=1e-11)


def test_without_a_schedule_every_round_is_the_same():
    job = work(nn.Tanh())
    first, later = (
        train_client(job, replace(broadcast_of(job), round=round), 0, DATA, state={}, key=4) for round in (1, 50)
    )
    assert p.same_bits(first.update, later.update)


class Functional(nn.Module):
    """Draws as its user wrote it: from torch's global generator."""

    def forward(self, x):
        return F.dropout(x, 0.4, self.training)


def test_what_a_seeded_model_draws_is_one_stream_from_the_clients_key():
    """By hand: masks of all steps, one after another, from a generator that starts at the key; torch's own SGD."""
    job, key = replace(work(nn.Tanh(), Functional()), seeded=True), rng.fold(8, "client", 3)
    broadcast, own = broadcast_of(job), torch.Generator().manual_seed(key & 0xFFFFFFFF)
    result = train_client(job, broadcast, 3, DATA, state={}, key=key)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in broadcast.params.items()}
    optimizer = torch.optim.SGD(leaves.values(), lr=0.5)
    for indices in batches(11, 4, 2, key):
        kept = torch.empty(len(indices), 6, dtype=torch.float64).bernoulli_(0.6, generator=own)
        hidden = F.linear(DATA.inputs[indices], leaves["0.weight"], leaves["0.bias"]).tanh() * kept / 0.6
        optimizer.zero_grad()
        F.cross_entropy(F.linear(hidden, leaves["3.weight"], leaves["3.bias"]), DATA.labels[indices]).backward()
        optimizer.step()
    for name, update in result.update.items():
        assert torch.allclose(update, leaves[name].detach() - broadcast.params[name], rtol=0, atol=1e-12)


def test_a_seeded_client_depends_on_its_key_alone_and_leaves_the_generator_as_it_was():
    job = replace(work(nn.BatchNorm1d(6), Functional(), Dropout(0.3), momentum=0.9), seeded=True)
    broadcast = broadcast_of(job)
    before = torch.get_rng_state()
    first = train_client(job, broadcast, 0, DATA, state={}, key=5)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.rand(3)
        other = train_client(job, broadcast, 1, DATA, state={}, key=6)
        again = train_client(job, broadcast, 0, DATA, state={}, key=5)
    assert p.same_bits(first.update, again.update) and p.same_bits(first.buffers, again.buffers)
    assert first.metrics == again.metrics and not p.same_bits(first.update, other.update)


def test_seeding_changes_nothing_in_a_model_that_does_not_draw():
    job = work(nn.Tanh(), Dropout(0.3))
    one, other = (
        train_client(w, broadcast_of(job), 0, DATA, state={}, key=5) for w in (job, replace(job, seeded=True))
    )
    assert p.same_bits(one.update, other.update) and one.metrics == other.metrics


def test_the_product_is_that_of_central_differences_of_gradients():
    job = work(nn.Tanh())
    local, batch, h = p.of(job.model)[0], DATA.take(torch.arange(5)), 1e-5
    direction = {n: rng.normal(rng.fold(9, n), *t.shape, dtype=torch.float64) for n, t in list(local.items())[:3]}
    found, loss = product(job, local, {}, batch, {}, direction=direction)
    whole = {**p.zeros_like(local), **direction}  # what is not named does not move
    ahead, behind = (gradient(job, p.add_scaled(local, whole, sign * h), {}, batch, {})[0] for sign in (1, -1))
    expected = p.scale(p.sub(ahead, behind), 1 / (2 * h))
    assert found.keys() == local.keys() and all(torch.allclose(found[n], t, atol=1e-8) for n, t in expected.items())
    assert float(loss) == float(gradient(job, local, {}, batch, {})[1])


def test_gradients_that_are_the_same_everywhere_have_a_product_of_zeros():
    job = replace(work(), objective=Objective(loss=lambda logits, labels: logits.sum() * 0 + 1.0))
    local = {"0.bias": p.of(job.model)[0]["0.bias"]}
    rest = {n: t for n, t in p.of(job.model)[0].items() if n not in local}
    found, _ = product(job, local, rest, DATA, {}, direction=local)
    assert p.same_bits(found, {"0.bias": torch.zeros(6, dtype=torch.float64)})
    assert p.same_bits(product(job, local, rest, DATA, {}, direction={})[0], found)


def test_the_product_of_an_lstm_is_that_of_its_plain_cells():
    with rng.torch_seeded(3):
        model = char_lstm(input_shape=(7,), num_classes=12)
    tokens = (rng.uniform(5, 6, 8) * 12).long()
    batch = Examples(tokens[:, :-1], tokens[:, 1:])
    local, buffers = p.of(model)
    direction, found = p.scale(gradient(lstm_work(model), local, buffers, batch, {})[0], 1.0), []
    for _ in range(2):
        found.append(product(lstm_work(model), local, buffers, batch, {}, direction=direction)[0])
        plain_cells(next(module for module in model.modules() if type(module) is nn.LSTM)) if len(found) == 1 else None
    assert float(p.l2_norm(p.sub(*found)) / p.l2_norm(found[1])) < 1e-4


def lstm_work(model):
    return LocalWork(model, (), sgd(lr=0.1), plain(), 1, 4)


class Once(torch.autograd.Function):
    """An operation whose derivative has none."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.relu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


def attended(inputs):
    rows = inputs[None, None]
    return nn.functional.scaled_dot_product_attention(rows, rows, rows)[0, 0]


@pytest.mark.parametrize("function", [Once.apply, attended])
def test_a_model_without_second_derivatives_is_refused(function):
    layer = nn.Identity()
    layer.forward = function
    job = work(layer)
    probe = replace(broadcast_of(job, directed(p.of(job.model)[0])), probe=True)
    with pytest.raises(ValueError, match=r"^the model has no second derivatives: "):
        train_client(job, probe, 0, DATA, state={}, key=1)
    assert train_client(job, replace(probe, extra={}), 0, DATA, state={}, key=1).num_examples == 11


def test_a_probe_with_a_direction_is_the_product_over_all_examples_and_trains_nothing():
    job = work(nn.Tanh(), batch_size=4)
    local = p.of(job.model)[0]
    direction = {n: rng.normal(rng.fold(9, n), *t.shape, dtype=torch.float64) for n, t in local.items()}
    probe = replace(broadcast_of(job, directed(direction)), probe=True)
    found = train_client(job, probe, 3, DATA, state={"own": torch.ones(2)}, key=8)
    expected, loss = product(job, local, {}, DATA, {}, direction=direction)
    assert all(torch.allclose(found.update[n], -t, rtol=1e-10, atol=1e-13) for n, t in expected.items())
    assert found.state.keys() == {"own"} and found.metrics["train_loss"] == pytest.approx(float(loss))
