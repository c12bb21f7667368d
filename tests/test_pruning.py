"""Pruning in a federation: what the server does between rounds, against loops written out in NumPy, and who is told."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import control, result, tensors
from torch import nn

from fedsim import params as p
from fedsim import rng, wire
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import client_key
from fedsim.engines.flower import flower
from fedsim.engines.flower import messages as m
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import Federation, broadcast, cohort, round_key, start, step
from fedsim.models.zoo import MODELS
from fedsim.pruning.lottery import lottery_ticket
from fedsim.pruning.magnitude import magnitude
from fedsim.pruning.pruning import masks_of
from fedsim.records import CohortUpdate, Examples, Partition
from fedsim.strategies.server_rules import ServerRule
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork, batches
from fedsim.training.optimizers import sgd

CLIENTS, CLASSES, LR, BATCH = 6, 3, 0.3, 4
SIZES = np.array([3, 9, 5, 1, 12, 6])
WEIGHTS = ("0.weight", "2.weight")


def network(key, dtype=torch.float64):
    with rng.torch_seeded(key):
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).to(dtype)


def made(pruning, *, rounds=7, strategy=None, model=None, **changes):
    n, model, strategy = int(SIZES.sum()), model or network(1), strategy or fedavg()
    train = Examples(2 * rng.normal(2, n, 5, dtype=torch.float64), (rng.uniform(3, n) * CLASSES).long())
    test = Examples(rng.normal(4, 9, 5, dtype=torch.float64), (rng.uniform(5, 9) * CLASSES).long())
    owners = Partition(np.array([0, *np.cumsum(SIZES)]), rng.permutation(7, n).numpy())
    nobody = Partition(np.zeros(CLIENTS + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data = FederatedData(train, test, owners, nobody, test, CLASSES, ())
    work = LocalWork(model, (), sgd(lr=LR), strategy.local, 2, BATCH)
    federation = Federation(5, data, work, strategy, rounds, 4, "fixed", 1, "fail", pruning=pruning)
    return replace(federation, fresh=lambda key: p.of(network(key)), **changes)


def masks(state):
    return masks_of(state.pruning).kept


def zeros(state):
    return {name: int((state.params[name] == 0).sum()) for name in WEIGHTS}


# ---------------------------------------------------------------- lottery tickets, written out


def by_hand(federation, every, rate, rewind=0):
    """After each round, the weights as NumPy arrays: federated averaging with autograd, ranking with argsort."""
    module = federation.work.model
    now = {name: t.detach().numpy().copy() for name, t in module.named_parameters()}
    kept = {name: np.ones_like(now[name]) for name in WEIGHTS}
    first, after = {name: w.copy() for name, w in now.items()}, []
    for round in range(1, federation.rounds + 1):
        if round > 1 and (round - 1) % every == 0:
            for name, share in zip(WEIGHTS, (rate, rate / 2), strict=True):
                there = np.flatnonzero(kept[name])
                order = np.argsort(np.abs(now[name].ravel()[there]), kind="stable")
                kept[name].ravel()[there[order[: nearest(share * len(there))]]] = 0
            now = {name: w * kept.get(name, 1) for name, w in first.items()}
        clients = cohort(federation, round).tolist()
        total = sum(SIZES[k] for k in clients)
        moved = {name: np.zeros_like(w) for name, w in now.items()}
        for k in clients:
            for name, w in _trained(federation, now, kept, k, client_key(round_key(federation, round), k)).items():
                moved[name] += SIZES[k] / total * (w - now[name])
        now = {name: w + moved[name] for name, w in now.items()}
        if round == rewind:
            first = {name: w.copy() for name, w in now.items()}
        after.append(now)
    return after


def nearest(x):
    """Halves to the even one."""
    return int(np.rint(x))


def _trained(federation, weights, kept, client, key):
    own, local = (
        federation.data.client(client),
        {name: torch.tensor(w, requires_grad=True) for name, w in weights.items()},
    )
    for indices in batches(len(own), BATCH, 2, key):
        hidden = torch.tanh(own.inputs[indices] @ local["0.weight"].T + local["0.bias"])
        logits = hidden @ local["2.weight"].T + local["2.bias"]
        grads = torch.autograd.grad(F.cross_entropy(logits, own.labels[indices]), list(local.values()))
        with torch.no_grad():
            for (name, w), grad in zip(local.items(), grads, strict=True):
                w.sub_(LR * grad * torch.from_numpy(kept[name]) if name in kept else LR * grad)
    return {name: w.detach().numpy() for name, w in local.items()}


@pytest.mark.parametrize(("every", "rate", "rewind"), [(2, 0.3, 0), (3, 0.5, 0), (3, 0.2, 1), (4, 0.6, 3)])
def test_a_lottery_ticket_is_found_as_by_a_loop_written_out(every, rate, rewind):
    federation = made(lottery_ticket(rate=rate, every=every, rewind=rewind), rounds=8)
    _, records, states = result(federation, reference())
    expected = by_hand(federation, every, rate, rewind)
    assert len(states) == 9
    for state, weights in zip(states[1:], expected, strict=True):
        for name, w in weights.items():
            assert np.allclose(state.params[name].numpy(), w, rtol=1e-9, atol=1e-12)
            assert np.array_equal(state.params[name].numpy() == 0, w == 0)
    assert [r.sparsity is None for r in records] == [i <= every for i in range(9)]


def test_what_a_record_says_is_counted_in_the_weights():
    _, records, states = result(made(lottery_ticket(rate=0.4, every=2)), reference())
    sizes = {"0.weight": 40, "2.weight": 24}
    for record, state in zip(records[3:], states[3:], strict=True):
        gone = zeros(state)
        assert record.sparsity == pytest.approx(sum(gone.values()) / 64, abs=1e-15)
        assert record.remaining == pytest.approx({n: 1 - gone[n] / size for n, size in sizes.items()}, abs=1e-15)


def test_survivors_start_each_level_from_the_initial_weights_and_nobody_else_does():
    """A round in which nobody takes part shows what it would have started from."""
    federation = made(lottery_ticket(rate=0.4, every=2), rounds=3, clients_per_round=1, sampling="poisson")
    federation = replace(federation, seed=next(s for s in range(999) if _empty(federation, s) == [False, False, True]))
    _, _, states = result(federation, reference())
    first, last = states[0], states[3]
    assert not p.same_bits(states[2].params, first.params)
    assert p.same_bits(last.params, p.masked(first.params, masks(last)))
    assert last.round == 3 and all(0 < n < first.params[name].numel() for name, n in zeros(last).items())


def _empty(federation, seed):
    return [not len(cohort(replace(federation, seed=seed), round)) for round in (1, 2, 3)]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_controls_remove_as_many_of_each_layer_and_other_weights(scope):
    """Of the first level: later ones prune other averages, which matters where all layers are ranked together."""
    options = {"rate": 0.4, "every": 2, "scope": scope}
    ways = {c: made(lottery_ticket(**options, control=c), rounds=4) for c in ("none", "reinit", "random-mask")}
    found = {c: masks(result(federation, reference())[0]) for c, federation in ways.items()}
    counts = {c: {name: int(mask.sum()) for name, mask in kept.items()} for c, kept in found.items()}
    assert counts["none"] == counts["reinit"] and p.same_bits(found["none"], found["reinit"])
    assert (
        sum(counts["random-mask"].values())
        == sum(counts["none"].values())
        == 64 - round(16 + 0.2 * 24 if scope == "layer" else 0.4 * 64)
    )
    if scope == "layer":
        assert counts["random-mask"] == counts["none"]
    assert not p.same_bits(found["none"], found["random-mask"])


def test_reinit_starts_from_weights_that_are_neither_the_first_nor_twice_the_same():
    federation = made(lottery_ticket(rate=0.4, every=1, control="reinit"), rounds=3)
    drawn = []

    def fresh(key):
        drawn.append(key)
        return p.of(network(key))

    federation = replace(federation, fresh=fresh, work=replace(federation.work, optimizer=sgd(lr=1e-12)))
    _, _, states = result(federation, reference())
    assert len(set(drawn)) == len(drawn) == 2
    for key, state in zip(drawn, states[2:], strict=True):
        expected = p.masked(p.of(network(key))[0], masks(state))
        assert all(torch.allclose(state.params[n], t, atol=1e-9) for n, t in expected.items())


def test_what_remains_of_lenet_is_what_the_paper_labels_its_curves_with():
    """Frankle, Carbin 2019, figure 3: 100, 51.3 and 21.1 % of 300-100; counted in a run that prunes every round."""
    with rng.torch_seeded(1):
        model = MODELS["mlp"](input_shape=(1, 28, 28), num_classes=10, hidden=[300, 100])
    train = Examples(rng.normal(2, 4, 1, 28, 28), torch.tensor([1, 0, 9, 4]))
    owners = Partition(np.array([0, 1, 4]), np.arange(4))
    nobody = Partition(np.zeros(3, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data, strategy = FederatedData(train, train, owners, nobody, train, 10, ()), fedavg()
    work = LocalWork(model, (), sgd(lr=0.01), strategy.local, 1, 4)
    pruning = lottery_ticket(rate=0.2, every=1)
    federation = Federation(1, data, work, strategy, 8, 2, "fixed", 8, "fail", pruning=pruning)
    _, records, states = result(federation, reference())
    weights = [name for name, t in states[0].params.items() if t.dim() > 1]
    assert sum(states[0].params[name].numel() for name in weights) == 266_200
    left = [sum(int(masks(s)[name].sum()) for name in weights) / 266_200 for s in states[2:]]
    assert [round(100 * left[r - 1], 1) for r in (3, 7)] == [51.3, 21.1]
    assert [1 - r.sparsity for r in records[2:]] == pytest.approx(left, abs=1e-12)
    for state in states[2:]:
        assert all(not bool(state.params[name][~mask].any()) for name, mask in masks(state).items())


# ---------------------------------------------------------------- when


def test_versions_grow_by_one_and_masks_only_shrink():
    _, _, states = result(made(lottery_ticket(rate=0.3, every=2), rounds=7), reference())
    assert [masks_of(s.pruning) and masks_of(s.pruning).version for s in states] == [None, None, None, 1, 1, 2, 2, 3]
    for one, other in itertools.pairwise(states[3:]):
        assert all(not bool((masks(other)[n] & ~mask).any()) for n, mask in masks(one).items())


@pytest.mark.parametrize(("rounds", "levels"), [(6, 2), (7, 3)])
def test_nothing_is_pruned_after_the_last_round(rounds, levels):
    final, _, _ = result(made(lottery_ticket(rate=0.3, every=2), rounds=rounds), reference())
    assert masks_of(final.pruning).version == levels


def test_levels_bound_how_often_it_is_pruned():
    final, _, _ = result(made(lottery_ticket(rate=0.3, every=1, levels=2), rounds=6), reference())
    assert masks_of(final.pruning).version == 2


@pytest.mark.parametrize("scope", ["layer", "global", "filter"])
@pytest.mark.parametrize(("every", "begin", "end"), [(1, 1, 4), (2, 1, 4), (3, 2, 6), (5, 3, 3)])
def test_magnitude_reaches_the_sparsity_at_its_end_and_not_before(scope, every, begin, end):
    pruning = magnitude(sparsity=0.7, every=every, start=begin, end=end, scope=scope)
    _, records, _ = result(made(pruning, rounds=8), reference())
    reached = [0.0 if r.sparsity is None else r.sparsity for r in records]
    assert not any(reached[: begin + 1])
    entries = 12 if scope == "filter" else 3
    assert all(s == pytest.approx(0.7, abs=entries / 64) for s in reached[end + 1 :])
    assert reached == sorted(reached)
    if scope != "filter":
        done = [max(d for d in [*range(begin, end, every), end] if d < r) for r in range(begin + 1, 9)]
        curve = [0.7 * (1 - (1 - (d - begin) / (end - begin)) ** 3) if end > begin else 0.7 for d in done]
        assert reached[begin + 1 :] == pytest.approx(curve, abs=1.5 / 64)


def test_magnitude_ends_after_three_quarters_of_the_rounds_and_keeps_the_output_if_told():
    final, records, _ = result(made(magnitude(sparsity=0.5, every=5, output=False), rounds=8), reference())
    assert [r.sparsity for r in records] == [None] * 7 + [0.5] * 2
    assert records[8].remaining == {"0.weight": 0.5} and zeros(final) == {"0.weight": 20, "2.weight": 0}


def test_magnitude_trains_on_with_what_it_had():
    """The model of round 3 begins with that of round 2, pruned, and not with the first one."""
    federation = made(magnitude(sparsity=0.5, start=2, end=2), rounds=3)
    states = result(federation, reference())[2]
    again = made(None, rounds=2)
    assert p.same_bits(states[2].params, result(again, reference())[0].params)
    gone = {name: torch.zeros_like(states[2].params[name], dtype=torch.bool) for name in WEIGHTS}
    for name, mask in gone.items():
        order = np.argsort(np.abs(states[2].params[name].numpy().ravel()), kind="stable")
        mask.view(-1)[torch.from_numpy(order[: mask.numel() // 2])] = True
    assert all(torch.equal(~gone[name], mask) for name, mask in masks(states[3]).items())


# ---------------------------------------------------------------- the rest of the server's state


def test_a_restart_forgets_what_strategies_kept():
    """From the pruned first weights, with states of the first round: a federation that had never trained."""
    federation = made(lottery_ticket(rate=0.4, every=3), rounds=4, strategy=control())
    _, _, states = result(federation, reference())
    assert states[3].clients and any(bool(t.any()) for t in states[3].server.values())
    fresh = replace(states[3], params=p.masked(states[0].params, masks(states[4])), server=states[0].server, clients={})
    fresh = replace(fresh, pruning=states[4].pruning)
    later = replace(federation, pruning=lottery_ticket(rate=0.4, every=99))
    again, _, _ = result(later, reference(), fresh)
    assert p.same_bits(again.params, states[4].params) and p.same_bits(again.server, states[4].server)
    assert again.clients.keys() == states[4].clients.keys() == set(cohort(federation, 4).tolist())
    assert all(p.same_bits(own, states[4].clients[k]) for k, own in again.clients.items())


def test_magnitude_forgets_nothing():
    federation = made(magnitude(sparsity=0.5, start=2, end=2), rounds=3, strategy=control())
    _, _, states = result(federation, reference())
    assert set(states[2].clients) <= set(states[3].clients) and len(states[3].clients) > 4


def remembering():
    """A server rule that goes on in the direction in which it went."""
    return ServerRule(
        p.zeros_like,
        lambda params, update, state: (
            {n: w + 0.9 * state[n] + update[n] + 0.01 for n, w in params.items()},
            {n: 0.9 * v + update[n] for n, v in state.items()},
        ),
        lambda state: {},
    )


@pytest.mark.parametrize("pruning", [magnitude(sparsity=0.6, end=3), lottery_ticket(rate=0.4, every=2)])
def test_no_server_rule_revives_what_is_pruned(pruning):
    federation = made(pruning, rounds=6, strategy=replace(fedavg(), server=remembering()))
    _, _, states = result(federation, reference())
    for state in states[4:]:
        for name, mask in masks(state).items():
            gone = state.params[name][~mask]
            assert len(gone) and not bool(gone.any()) and not bool(torch.signbit(gone).any())
            assert bool(state.params[name][mask].all())


@pytest.mark.parametrize("engine", [reference(), local(mode="vectorised", workers=1)])
@pytest.mark.parametrize("pruning", [magnitude(sparsity=0.6, end=5), lottery_ticket(rate=0.4, every=3)])
def test_rounds_in_which_nobody_takes_part_are_pruned_all_the_same(pruning, engine):
    federation = made(pruning, rounds=8, clients_per_round=1, sampling="poisson")
    _, records, states = result(federation, engine)
    empty = [round for round in range(1, 9) if not len(cohort(federation, round))]
    assert empty and len(empty) < 8 and any(records[r].sparsity != records[r - 1].sparsity for r in empty)
    for round in empty:
        assert records[round].cohort == () and records[round].bytes_down == 0
    for state in states[4:]:
        assert all(not bool(state.params[n][~mask].any()) for n, mask in masks(state).items())


@pytest.mark.parametrize("engine", [reference(), local(mode="sequential", workers=1), local(mode="fused", workers=1)])
@pytest.mark.parametrize("done", range(1, 6))
def test_going_on_from_the_middle_equals_a_run_that_was_never_stopped(engine, done):
    """Levels of two rounds, rewound to the first: within a level, and between two."""
    federation = made(lottery_ticket(rate=0.3, every=2, rewind=1), rounds=6, strategy=control())
    final, records, states = result(federation, engine)
    again, later, _ = result(federation, engine, states[done])
    assert p.same_bits(tensors(again), tensors(final)) and later == records[done + 1 :]


# ---------------------------------------------------------------- who is told


def paid(federation, states, size):
    """Bytes down of every round: masks once for each client and version, with ``size(sent, with masks)``."""
    knows, found = {}, []
    for round in range(1, federation.rounds + 1):
        clients, after = cohort(federation, round).tolist(), states[round]
        has = masks_of(after.pruning)
        version = has.version if has else 0
        sent = replace(broadcast(federation, after, round), masks=has)
        found.append(sum(size(sent, k, version > 0 and knows.get(k, 0) != version) for k in clients))
        knows.update(dict.fromkeys(clients, version))
    return found


def on_the_wire(sent, client, told):
    return len(wire.encode_broadcast(sent, with_masks=told))


def in_flower(sent, client, told):
    return m.content_bytes(m.train_content(m.pack_broadcast(sent, with_masks=told), client, 2**63 + client))


PRUNINGS = {"lottery": lottery_ticket(rate=0.4, every=3), "magnitude": magnitude(sparsity=0.8, every=2, end=7)}


@pytest.mark.parametrize("engine", ["reference", "local", "flower"])
@pytest.mark.parametrize("pruning", PRUNINGS)
def test_each_client_pays_for_the_masks_of_a_version_once(pruning, engine):
    federation = made(PRUNINGS[pruning], rounds=9)
    engines = {"reference": reference(), "local": local(mode="vectorised", workers=1), "flower": flower()}
    _, records, states = result(federation, engines[engine])
    expected = paid(federation, states, in_flower if engine == "flower" else on_the_wire)
    down = [r.bytes_down for r in records[1:]]
    if engine == "flower":  # keys of a client are packed in as many bytes as they need
        assert all(abs(a - b) <= 4 * 10 for a, b in zip(down, expected, strict=True))
    else:
        assert down == expected
    everybody = paid(federation, states, lambda sent, k, told: on_the_wire(sent, k, sent.masks is not None))
    assert sum(down[4:]) < sum(everybody[4:]) or engine == "flower"
    first = {r: set(cohort(federation, r).tolist()) for r in range(1, 10)}
    assert any(first[r] & first[r + 1] and first[r + 1] - first[r] for r in range(4, 9))  # some are told, some know


def test_bytes_up_are_those_of_what_remains():
    federation = made(lottery_ticket(rate=0.4, every=3), rounds=5)
    _, records, states = result(federation, reference())
    for record, state in zip(records[4:], states[4:], strict=True):
        left = sum(int(mask.sum()) for mask in masks(state).values()) + 8 + CLASSES
        saved = 4 * 8 * (64 + 8 + CLASSES - left)
        assert records[1].bytes_up - record.bytes_up == pytest.approx(saved, abs=4 * 130)  # their version is sent, too
        assert record.bytes_up == sum(
            wire.update_bytes(state.params, {}, ["train_loss"], masks=masks_of(state.pruning)) for _ in range(4)
        )


def test_who_did_not_answer_is_told_again_and_who_did_is_not():
    federation = made(magnitude(sparsity=0.5, start=1, end=1), rounds=9)
    state = result(replace(federation, rounds=3), reference())[0]
    chosen = cohort(federation, 4).tolist()
    knew = [k for k in chosen if int(state.pruning["informed"][k]) == 1]
    assert set(broadcast(federation, state, 4, chosen).unaware) == set(chosen) - set(knew)
    lost, answered = knew[0], tuple(chosen[1:]) if chosen[0] == knew[0] else tuple(k for k in chosen if k != knew[0])
    moved = CohortUpdate(p.zeros_like(state.params), {}, answered, (1,) * len(answered), (), {}, {}, 0, 0)
    after = step(federation, state, moved, 4)
    assert set(broadcast(federation, after, 5, chosen).unaware) == {lost}
    silence = CohortUpdate(None, None, (), (), (), {}, {}, 0, 0)
    assert set(broadcast(federation, step(federation, state, silence, 4), 5, chosen).unaware) == set(chosen)
    others = [k for k in range(CLIENTS) if k not in chosen]
    assert broadcast(federation, after, 5, others).unaware == broadcast(federation, state, 5, others).unaware


def test_without_pruning_there_is_nothing_to_remember_or_tell():
    federation = made(None, rounds=2)
    final, records, _ = result(federation, reference())
    assert final.pruning == {} and {(r.sparsity, len(r.remaining)) for r in records} == {(None, 0)}
    sent = broadcast(federation, start(federation), 1, [0, 1])
    assert sent.masks is None and sent.unaware == () and not sent.probe
    assert math.isfinite(records[-1].loss)
