"""What becomes of batch norm in a federation: kept by each client (FedBN), pooled, frozen, and its counters."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import control, result, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsim import params as p
from fedsim import rng, runs
from fedsim.baselines import train_centralised
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import client_key
from fedsim.engines.flower import flower
from fedsim.engines.folding import fold, join
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import Federation, broadcast, cohort, job, round_key, run, start
from fedsim.models import batch_norm
from fedsim.records import Broadcast, Examples, Partition, StackedUpdate
from fedsim.strategies.strategy import fedavg
from fedsim.training import regularizers as r
from fedsim.training.client import LocalWork, batches, train_client
from fedsim.training.optimizers import sgd

SIZES, HELD = (9, 4, 14), (5, 0, 7)  # of the clients; the second has nothing to be tested on
ROUNDS, EPOCHS, BATCH = 4, 2, 5


def federation(strategy=None, *, kept=True, cohort=2, **changes):
    """Three clients whose inputs differ in scale and place, two examples in a batch at least."""
    strategy = strategy or fedavg(server_lr=0.8)
    with rng.torch_seeded(1):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    n, m = sum(SIZES), sum(HELD) + 3  # three test examples are nobody's
    owner = torch.repeat_interleave(torch.tensor(SIZES))[:, None]
    examples = Examples(
        rng.normal(2, n, 4, dtype=torch.float64) * (1 + owner) - 2 * owner, (rng.uniform(3, n) * 3).long()
    )
    test = Examples(3 * rng.normal(4, m, 4, dtype=torch.float64), (rng.uniform(5, m) * 3).long())
    owners = Partition(np.array([0, *np.cumsum(SIZES)]), np.arange(n))
    tested = Partition(np.array([0, *np.cumsum(HELD)]), rng.permutation(6, m).numpy()[: sum(HELD)])
    data = FederatedData(examples, test, owners, tested, test, 3, ())
    work = LocalWork(model, (), sgd(lr=0.2, momentum=0.5), strategy.local, EPOCHS, BATCH)
    if kept:
        work = replace(work, kept=batch_norm.tensors(model))
    return replace(Federation(7, data, work, strategy, ROUNDS, cohort, "fixed", 1, "fail"), **changes)


def rounds_of(made, engine=None, state=None):
    found = []
    run(made, state or start(made), engine or reference(), found.append)
    return found


# ---------------------------------------------------------------- local: FedBN


def fresh_module(made):
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    module.load_state_dict(made.work.model.state_dict())
    return module


def by_hand(made):
    """FedBN as a loop over modules that live at the clients: what is sent is named by hand, torch trains and scores.

    After every round: global weights, modules of the clients, and (loss, accuracy) of each with held-out examples.
    """
    sent = ["0.weight", "0.bias", "3.weight", "3.bias"]
    clients = [fresh_module(made) for _ in SIZES]
    weights = {name: clients[0].state_dict()[name].clone() for name in sent}
    for round in range(ROUNDS + 1):
        chosen = cohort(made, round).tolist() if round else []
        moves = []
        for k in chosen:
            module, data = clients[k], made.data.client(k)
            module.load_state_dict({**module.state_dict(), **weights})
            optimizer = torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)
            for indices in batches(len(data), BATCH, EPOCHS, client_key(round_key(made, round), k)):
                optimizer.zero_grad()
                F.cross_entropy(module.train()(data.inputs[indices]), data.labels[indices]).backward()
                optimizer.step()
            moves.append({name: module.state_dict()[name] - weights[name] for name in sent})
        shares = np.array([SIZES[k] for k in chosen]) / sum(SIZES[k] for k in chosen)
        for name in sent if chosen else []:
            weights[name] = weights[name] + 0.8 * sum(s * move[name] for s, move in zip(shares, moves, strict=True))
        scores = {}
        for k, module in enumerate(clients):
            rows = made.data.test_partition.client(k)
            module.load_state_dict({**module.state_dict(), **weights})
            if len(rows):
                logits, labels = module.eval()(made.data.test.inputs[rows]).detach(), made.data.test.labels[rows]
                right = (logits.argmax(1) == labels).double().mean()
                scores[k] = float(F.cross_entropy(logits, labels)), float(right)
        yield weights, [{n: t.clone() for n, t in module.state_dict().items()} for module in clients], scores


def test_it_is_the_loop_over_modules_that_live_at_the_clients():
    made, counts = federation(), {0: 5, 2: 7}
    took_part: set[int] = set()
    for found, (weights, clients, scores) in zip(rounds_of(made), by_hand(made), strict=True):
        state, record = found.state, found.record
        took_part |= set(record.cohort)
        for name, tensor in weights.items():
            torch.testing.assert_close(state.params[name], tensor, rtol=1e-11, atol=1e-12)
        assert state.clients.keys() == took_part
        for k, own in state.clients.items():
            expected = {f"kept/{name}": clients[k][name] for name in batch_norm.tensors(made.work.model)}
            assert own.keys() == expected.keys()
            for name, tensor in own.items():
                torch.testing.assert_close(tensor, expected[name], rtol=1e-11, atol=1e-12)
        for line, (k, (loss, accuracy)) in zip(found.evaluations, scores.items(), strict=True):
            assert (line.client, line.num_examples, line.accuracy) == (k, counts[k], pytest.approx(accuracy))
            assert line.loss == pytest.approx(loss, rel=1e-9)
        assert len({tuple(clients[k]["1.running_mean"].tolist()) for k in took_part}) == len(took_part)
        losses, accuracies = np.array(list(scores.values())).T
        assert record.loss == pytest.approx(np.average(losses, weights=[5, 7]), rel=1e-9)
        assert record.accuracy == pytest.approx(np.average(accuracies, weights=[5, 7]))
        assert record.client_accuracy_mean == pytest.approx(accuracies.mean())
    assert took_part == {0, 1, 2}


def test_the_servers_batch_norm_stays_as_it_began_and_is_not_sent():
    made, everything = federation(), federation(kept=False)
    final, records, _ = result(made, reference())
    began = made.work.model.state_dict()
    server = {**final.params, **final.buffers}
    assert server.keys() == began.keys()
    for name in began:
        assert torch.equal(server[name], began[name]) == (name in made.work.kept), name
    whole = result(everything, reference())[1]
    numbers = 4 * 6 * 8 + 8  # scale, shift, mean and variance of six units in float64, and a counter
    for ours, theirs in zip(records[1:], whole[1:], strict=True):
        assert theirs.bytes_up - ours.bytes_up > 2 * numbers < theirs.bytes_down - ours.bytes_down


@pytest.mark.parametrize("engine", [local(mode="sequential", workers=1), flower()])
@pytest.mark.parametrize("strategy", [fedavg(), control()])
def test_other_engines_give_the_bits_of_reference(engine, strategy):
    made = federation(strategy)
    (ours, records, _), (theirs, expected, _) = (result(made, e) for e in (engine, reference()))
    assert p.same_bits(tensors(ours), tensors(theirs))
    assert [replace(o, bytes_up=0, bytes_down=0) for o in records] == [
        replace(t, bytes_up=0, bytes_down=0) for t in expected
    ]


def test_vectorised_gives_the_numbers_of_reference():
    """Of clients of one size, which stand side by side, each with its own batch norm."""
    made = federation(control(), cohort=3)
    equal = Partition(np.array([0, 9, 18, 27]), made.data.partition.indices)
    made = replace(made, data=replace(made.data, partition=equal))
    engine = local(mode="vectorised", workers=1).prepared(job(made), {"path": "vectorised", "chunk": 3})
    ours, theirs = result(made, engine)[0], result(made, reference())[0]
    assert tensors(ours).keys() == tensors(theirs).keys()
    for name, tensor in tensors(theirs).items():
        torch.testing.assert_close(tensors(ours)[name], tensor, rtol=1e-11, atol=1e-12)


def test_fused_steps_refuse_it():
    made = federation()
    with pytest.raises(ValueError, match="fused steps start all clients from the same parameters"):
        local(mode="fused", workers=1).prepared(job(made), {})


@pytest.mark.parametrize("strategy", [fedavg(), control()])
def test_a_run_that_is_resumed_from_its_checkpoint_ends_with_the_same_bits(strategy, tmp_path):
    made = federation(strategy)
    whole = rounds_of(made)
    runs.save_checkpoint(tmp_path, whole[2].state)
    resumed = rounds_of(made, state=runs.load_checkpoint(tmp_path))
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert p.same_bits(tensors(ours.state), tensors(theirs.state))
        assert ours.evaluations == theirs.evaluations
        assert replace(ours.record, seconds=0.0) == replace(theirs.record, seconds=0.0)


def test_a_strategy_with_states_sees_only_what_is_sent():
    """Control variates as in SCAFFOLD exist for the weights alone, and correct no gradient of batch norm."""
    made = federation(control())
    sent = {"0.weight", "0.bias", "3.weight", "3.bias"}
    final = result(made, reference())[0]
    assert final.server.keys() == sent and final.clients
    for own in final.clients.values():
        assert own.keys() == sent | {f"kept/{name}" for name in made.work.kept}
        assert own["0.weight"].any() and own["3.bias"].any()


def test_where_no_weight_is_corrected_the_states_change_nothing():
    """A rule with states whose corrections are zero: the same weights and batch norms as without it."""
    plain = federation()
    zero = plain.strategy.local._replace(init=p.zeros_like)
    stateful = federation(replace(plain.strategy, local=zero))
    ours, theirs = result(stateful, reference())[0], result(plain, reference())[0]
    assert p.same_bits(ours.params, theirs.params)
    for k, own in theirs.clients.items():
        assert p.same_bits({name: ours.clients[k][name] for name in own}, own)
        assert len(ours.clients[k]) == len(own) + 4


def test_the_proximal_term_leaves_what_stays_with_the_client_alone():
    """With mu so large that weights hardly move, scales and shifts move on."""
    made = federation()
    objective = r.bind(made.work.model, [r.proximal(mu=4.9)])  # lr * mu just below one
    held = replace(made, work=replace(made.work, objective=objective), rounds=1)
    (ours, *_), (theirs, *_) = result(held, reference()), result(replace(made, rounds=1), reference())
    began = start(made).params
    for name in ("0.weight", "3.weight"):
        assert (ours.params[name] - began[name]).norm() < 0.7 * (theirs.params[name] - began[name]).norm()
    for own, other in zip(ours.clients.values(), theirs.clients.values(), strict=True):
        gamma, free = own["kept/1.weight"] - 1, other["kept/1.weight"] - 1
        assert gamma.norm() > 0.5 * free.norm() > 0


def test_a_client_that_diverges_and_is_skipped_keeps_the_batch_norm_it_had():
    made = federation(on_nan="skip", cohort=3, rounds=2)
    inputs = made.data.train.inputs.clone()
    inputs[0] = float("nan")  # of client 0
    made = replace(made, data=replace(made.data, train=Examples(inputs, made.data.train.labels)))
    final, records, _ = result(made, reference())
    assert records[-1].skipped == (0,) and final.clients.keys() == {1, 2}
    assert np.isfinite(records[-1].loss)


def test_the_baselines_keep_nothing_apart():
    """Of one client's model nothing needs to stay: all of it is the global one."""
    ours, theirs = (train_centralised(federation(kept=kept), reference(), lambda _: None) for kept in (True, False))
    assert p.same_bits(tensors(ours[1]), tensors(theirs[1]))
    assert [replace(line, seconds=0) for line, _ in ours[0]] == [replace(line, seconds=0) for line, _ in theirs[0]]


# ---------------------------------------------------------------- average, pooled, freeze


@pytest.mark.parametrize("engine", [reference(), flower(), local(mode="vectorised", workers=1)])
@pytest.mark.parametrize("pooled", [False, True])
def test_counters_are_never_averaged(engine, pooled):
    """The server's counter keeps its value, whatever clients of unequal numbers of steps have counted."""
    made = federation(kept=False, cohort=3)
    made.work.model[1].num_batches_tracked += 7
    if pooled:
        made = replace(made, pooled=batch_norm.statistics(made.work.model))
    for found in rounds_of(made, engine):
        counter = found.state.buffers["1.num_batches_tracked"]
        assert counter.dtype == torch.int64 and counter.item() == 7


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_pooled_variances_are_the_closed_form(weighting):
    """From clients trained one by one: sum p_k (var_k + mu_k^2) - mu^2; all else is as when averaged."""
    strategy = fedavg(weighting=weighting)
    made = federation(strategy, kept=False, cohort=3, rounds=1)
    pooled = replace(made, pooled=batch_norm.statistics(made.work.model))
    sent, key = broadcast(made, start(made), 1), round_key(made, 1)
    own = [train_client(made.work, sent, k, made.data.client(k), state={}, key=client_key(key, k)) for k in range(3)]
    share = np.array(SIZES if weighting == "examples" else (1, 1, 1)) / (sum(SIZES) if weighting == "examples" else 3)
    mu_k, var_k = (np.array([u.buffers[f"1.{name}"].numpy() for u in own]) for name in ("running_mean", "running_var"))
    mu = share @ mu_k
    expected = share @ (var_k + mu_k**2) - mu**2
    (ours, *_), (plain, *_) = result(pooled, reference()), result(made, reference())
    np.testing.assert_allclose(ours.buffers["1.running_var"].numpy(), expected, rtol=1e-11)
    np.testing.assert_allclose(plain.buffers["1.running_var"].numpy(), share @ var_k, rtol=1e-11)
    assert (expected > share @ var_k).all()
    rest = [{n: t for n, t in tensors(state).items() if n != "b.1.running_var"} for state in (ours, plain)]
    assert p.same_bits(*rest)


def test_pooled_variances_are_those_of_the_examples_of_all():
    """Clients that forget at once (momentum 1) send their batch's statistics: those of all examples come out, but for
    Bessel's correction of each."""
    made = federation(kept=False, cohort=3, rounds=1)
    made.work.model[1].momentum = 1.0
    work = replace(made.work, batch_size=None, local_epochs=1)
    pooled = replace(made, work=work, pooled=batch_norm.statistics(made.work.model))
    hidden = made.work.model[0](made.data.train.inputs).detach()
    parts = torch.split(hidden, SIZES)
    within = sum(len(part) * part.var(0) for part in parts) / len(hidden)
    between = hidden.var(0, unbiased=False) - sum(len(q) * q.var(0, unbiased=False) for q in parts) / len(hidden)
    found = result(pooled, reference())[0].buffers
    torch.testing.assert_close(found["1.running_mean"], hidden.mean(0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found["1.running_var"], within + between, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**64 - 1), st.integers(1, 6))
def test_a_pooled_variance_is_never_negative(seed, clients):
    """Of clients that all saw the same constants: in float32 the two squares differ by rounding only."""
    mean = 100 * rng.normal(seed, 50).expand(clients, 50)
    buffers = {"mean": mean, "var": torch.zeros(clients, 50)}
    counts = (1 + 9 * rng.uniform(seed + 1, clients)).long().tolist()
    stack = StackedUpdate(
        tuple(range(clients)), {"w": torch.zeros(clients, 1)}, buffers, tuple(counts), {}, {}, (0,) * clients
    )
    sent = Broadcast({"w": torch.zeros(1)}, {"mean": torch.ones(50), "var": torch.zeros(50)}, {}, 1)
    pooling = replace(job(federation(kept=False)), pooled=(("mean", "var"),))
    found = join(pooling, sent, [fold(pooling, sent, [stack])], bytes_down=0)
    assert found.buffers["var"].min() >= 0
    assert found.buffers["var"].max() < 1e-5 * mean.square().max()


def test_pooled_is_the_same_on_other_engines():
    made = federation(kept=False, cohort=3)
    made = replace(made, pooled=batch_norm.statistics(made.work.model))
    final = result(made, reference())[0]
    for engine in (flower(), local(mode="sequential", workers=1)):
        assert p.same_bits(tensors(result(made, engine)[0]), tensors(final))


@pytest.mark.parametrize("engine", [reference(), flower(), local(mode="vectorised", workers=1)])
def test_frozen_batch_norm_keeps_every_bit_and_the_rest_is_trained(engine):
    made = federation(kept=False)
    began = {name: tensor.clone() for name, tensor in made.work.model.state_dict().items()}
    batch_norm.freeze(made.work.model)
    final = result(made, engine)[0]
    for name, tensor in {**final.params, **final.buffers}.items():
        assert torch.equal(tensor, began[name]) == name.startswith("1."), name
