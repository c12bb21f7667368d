"""Training with masks: that of torch's own pruned modules and optimizers, and 0 where it is pruned after every step."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from federations import federation
from torch import nn
from torch.nn.utils import prune

from fedsim import params as p
from fedsim import rng
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.federation import job, start
from fedsim.records import Broadcast, Examples, Masks
from fedsim.strategies.local_rules import plain
from fedsim.training import masking
from fedsim.training import regularizers as r
from fedsim.training.client import LocalWork, batches, probed, train_client
from fedsim.training.local_rule import LocalRule
from fedsim.training.optimizers import adam, adamw, sgd
from fedsim.training.stacked import group_of, train_stacked
from fedsim.training.steps import Step, step_of

DATA = Examples(rng.normal(1, 22, 4, dtype=torch.float64) * 2, (rng.uniform(2, 22) * 3).long())
KEY, EPOCHS, BATCH, LIMIT, MU = 7, 3, 4, 0.9, 0.4
OPTIMIZERS = {
    "sgd": (sgd(lr=0.3), torch.optim.SGD, {"lr": 0.3}),
    "momentum": (
        sgd(lr=0.1, momentum=0.9, weight_decay=0.05),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    ),
    "nesterov": (
        sgd(lr=0.1, momentum=0.8, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    ),
    "adam": (adam(lr=0.02), torch.optim.Adam, {"lr": 0.02}),
    "adamw": (adamw(lr=0.02, weight_decay=0.3), torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.3}),
}


def network():
    with rng.torch_seeded(3):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def a_mask(key, *shape):
    return rng.uniform(key, *shape) < 0.5


KEPT = {"0.weight": a_mask(11, 6, 4), "2.weight": a_mask(12, 3, 6)}
OTHER = {"0.weight": a_mask(13, 6, 4), "2.weight": a_mask(14, 3, 6)}
DRIFT = {name: 0.2 * rng.normal(rng.fold(15, name), *t.shape, dtype=t.dtype) for name, t in p.of(network())[0].items()}


def drifted(grads, local, broadcast, state):
    return p.add(grads, DRIFT)


RULE = LocalRule(lambda params: {}, drifted, lambda local, broadcast, state, steps: state)
MORE = {
    "plain": {},
    "clipped": {"max_grad_norm": LIMIT},
    "corrected": {"rule": RULE},
    "both": {"rule": RULE, "max_grad_norm": LIMIT},
    "penalised": {},
}


def work_of(optimizer, more):
    work = LocalWork(network(), (), OPTIMIZERS[optimizer][0], plain(), EPOCHS, BATCH)
    if more == "penalised":
        work = replace(work, objective=r.bind(work.model, [r.proximal(mu=MU)]))
    return replace(work, **MORE[more])


def sent(kept=KEPT, version=3):
    params = p.of(network())[0]
    return Broadcast(params if kept is None else p.masked(params, kept), {}, {}, 1, kept and Masks(kept, version))


def by_torch(optimizer, more, kept, data):
    """The weights that torch's hooks multiply by masks, and its own optimizers."""
    model, first = network(), p.masked(p.of(network())[0], kept)
    for name, mask in kept.items():
        prune.custom_from_mask(model[int(name[0])], "weight", mask)
    _, kind, options = OPTIMIZERS[optimizer]
    trained, losses = kind(model.parameters(), **options), []
    for indices in batches(len(data), BATCH, EPOCHS, KEY):
        batch = data.take(indices)
        trained.zero_grad()
        loss = F.cross_entropy(model(batch.inputs), batch.labels)
        losses += [float(loss.detach())] * len(indices)
        if more == "penalised":
            now = {f"{i}.{part}": getattr(model[i], part) for i in (0, 2) for part in ("weight", "bias")}
            loss = loss + MU / 2 * sum((now[name] - first[name]).square().sum() for name in now)
        loss.backward()
        if more in ("corrected", "both"):
            for called, tensor in model.named_parameters():
                name = called.removesuffix("_orig")
                tensor.grad += DRIFT[name] * kept[name] if name in kept else DRIFT[name]
        if more in ("clipped", "both"):
            nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        trained.step()
    for name in kept:
        prune.remove(model[int(name[0])], "weight")
    return p.of(model)[0], sum(losses) / len(losses)


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_the_training_of_a_model_that_torch_has_pruned(optimizer, more):
    found = train_client(work_of(optimizer, more), sent(), 4, DATA, state={}, key=KEY)
    expected, loss = by_torch(optimizer, more, KEPT, DATA)
    after = p.add(sent().params, found.update)
    assert all(torch.allclose(after[n], t, rtol=1e-9, atol=1e-12) for n, t in expected.items())
    assert found.metrics["train_loss"] == pytest.approx(loss, rel=1e-10)
    assert found.mask_version == 3 and found.kept == {}
    assert all(zero(found.update[name], mask) for name, mask in KEPT.items())


def test_a_ticket_takes_the_place_of_the_servers_masks():
    state = masking.as_state(OTHER)
    found = train_client(work_of("momentum", "plain"), sent(), 4, DATA, state=state, key=KEY)
    both = {name: mask & OTHER[name] for name, mask in KEPT.items()}
    alone = train_client(work_of("momentum", "plain"), replace(sent(both), masks=None), 4, DATA, state=state, key=KEY)
    assert p.same_bits(found.update, alone.update) and p.same_bits(found.kept, OTHER)
    grown = {name: OTHER[name] & ~mask for name, mask in KEPT.items()}
    assert all(bool(found.update[name][mask].any()) for name, mask in grown.items())  # the server's mask says nothing


def test_a_ticket_on_a_whole_model_is_trained_like_masks():
    found = train_client(work_of("adam", "plain"), sent(None), 4, DATA, state=masking.as_state(OTHER), key=KEY)
    expected, _ = by_torch("adam", "plain", OTHER, DATA)
    first = p.masked(sent(None).params, OTHER)
    assert all(torch.allclose(first[n] + found.update[n], t, rtol=1e-9, atol=1e-12) for n, t in expected.items())
    assert p.same_bits(found.kept, OTHER) and p.same_bits(masking.ticket(found.state), OTHER)
    assert all(zero(found.update[name], mask) for name, mask in OTHER.items())  # and not - the weight that was sent


def zero(tensor, mask):
    """Exactly +0.0 wherever the mask, of one client or of each lane, is false."""
    gone = tensor[~mask.expand(tensor.shape)]
    return len(gone) > 0 and not bool(gone.any()) and not bool(torch.signbit(gone).any())


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_pruned_is_0_before_every_step_and_so_is_what_the_optimizer_is_given(optimizer, more):
    work, seen = work_of(optimizer, more), []

    def step(params, grads, state, t, factor):
        moments = [part[name] for part in state.values() for name in KEPT]
        masks = [KEPT[name] for _ in state.values() for name in KEPT]
        seen.append(all(zero(params[n], m) and zero(grads[n], m) for n, m in KEPT.items()))
        seen.append(not any(bool(moment[~mask].any()) for moment, mask in zip(moments, masks, strict=True)))
        return work.optimizer.step(params, grads, state, t, factor)

    watching = replace(work, optimizer=work.optimizer._replace(step=step))
    train_client(watching, sent(), 4, DATA, state={}, key=KEY)
    assert len(seen) == 2 * EPOCHS * 6 and all(seen)


PATHS = [*((path, more) for path in ("sequential", "vectorised", "fused") for more in MORE)]


@pytest.mark.parametrize(("path", "more"), [pair for pair in PATHS if pair != ("fused", "penalised")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("own", [False, True])
def test_stacked_clients_do_what_each_does_alone_and_stay_pruned_after_every_step(optimizer, path, more, own):
    """Clients of 9, 7 and 6 examples; with tickets, each its own."""
    sizes = (9, 7, 6) if path != "sequential" else (9,)
    work, places = work_of(optimizer, more), torch.arange(22)
    if path == "fused":
        work = replace(work, model=nn.Sequential(work.model[0], nn.ReLU(), work.model[2]))
    lanes = [KEPT, OTHER, {name: ~mask for name, mask in KEPT.items()}][: len(sizes)] if own else [KEPT] * len(sizes)
    states = tuple(masking.as_state(kept) if own else {} for kept in lanes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = torch.stack([F.pad(places[s : s + n], (0, 9 - n)) for s, n in zip(starts, sizes, strict=True)])
    keys, broadcast, made = torch.tensor([21, 22, 23][: len(sizes)]), sent(None if own else KEPT), step_of(work, path)
    stayed = []

    def take(active, now):
        losses = made.take(active, now)
        n = len(losses)
        masks = p.stack(lanes[:n])
        stayed.append(all(zero(active.local[name], mask) for name, mask in masks.items()))
        return losses

    group = group_of(work, rows, sizes, keys, states)
    found = train_stacked(work, Step(made.copies, take), broadcast, DATA, group)
    assert len(stayed) == 3 * EPOCHS and all(stayed)
    for lane, (begin, n) in enumerate(zip(starts, sizes, strict=True)):
        data = DATA.take(places[begin : begin + n])
        alone = train_client(work, broadcast, lane, data, state=states[lane], key=int(keys[lane]))
        assert all(torch.allclose(found.update[k][lane], t, rtol=1e-9, atol=1e-12) for k, t in alone.update.items())
        assert all(zero(found.update[k][lane], mask) for k, mask in lanes[lane].items())
        assert p.same_bits(p.lanes(found.kept, lane), alone.kept) and bool(alone.kept) == own


ENGINES = {
    "plain loop": local(mode="sequential", workers=1),
    "vectorised": local(mode="vectorised", workers=1),
    "fused": local(mode="fused", workers=1),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("own", [False, True])
def test_a_cohort_with_masks_comes_to_the_same_on_every_engine(engine, own):
    made = federation("momentum", torch.float64)
    first, clients = start(made), [3, 9, 17]
    shapes = {name: t.shape for name, t in first.params.items() if t.dim() > 1}
    kept = {name: a_mask(rng.fold(3, name), *shape) for name, shape in shapes.items()}
    tickets = {k: {n: a_mask(rng.fold(4, n, k), *shape) for n, shape in shapes.items()} for k in clients}
    states = {k: masking.as_state(tickets[k]) for k in clients} if own else {}
    params = first.params if own else p.masked(first.params, kept)
    broadcast = Broadcast(params, {}, {}, 1, None if own else Masks(kept, 2), () if own else tuple(clients))
    found = []
    for one in (ENGINES[engine], reference()):
        one.drive(job(made), lambda cohorts: found.append(cohorts.run_cohort(broadcast, clients, states, 9)))
    ours, theirs = found
    assert all(torch.allclose(ours.update[n], t, rtol=1e-10, atol=1e-13) for n, t in theirs.update.items())
    assert (ours.bytes_up, ours.bytes_down) == (theirs.bytes_up, theirs.bytes_down)
    nobody = {name: ~torch.stack([tickets[k][name] for k in clients]).any(0) for name in kept}
    gone = nobody if own else {name: ~mask for name, mask in kept.items()}
    assert any(bool(mask.any()) for mask in gone.values())
    assert not any(bool(theirs.update[name][mask].any()) for name, mask in gone.items())
    assert all(p.same_bits(masking.ticket(state), tickets[k]) for k, state in ours.states.items())
    assert len(ours.states) == (len(clients) if own else 0)


def test_the_mean_of_clients_with_tickets_is_over_those_who_hold_an_entry():
    """By hand, of the updates that each client makes by itself."""
    made = federation("adam", torch.float64)
    first, clients = start(made), [2, 5, 7]
    names = [name for name, t in first.params.items() if t.dim() > 1]
    tickets = {k: {n: a_mask(rng.fold(8, n, k), *first.params[n].shape) for n in names} for k in clients}
    states = {k: masking.as_state(own) for k, own in tickets.items()}
    broadcast, found = Broadcast(first.params, {}, {}, 1), []
    reference().drive(job(made), lambda cohorts: found.append(cohorts.run_cohort(broadcast, clients, states, 9)))
    updates = {
        k: train_client(
            made.work, broadcast, k, made.data.client(k), state=states[k], key=rng.fold(9, "client", k)
        ).update
        for k in clients
    }
    for name, moved in found[0].update.items():
        held = {k: tickets[k].get(name, torch.ones_like(moved)).double() * len(made.data.client(k)) for k in clients}
        weight = sum(held.values())
        mean = sum(held[k] * updates[k][name] for k in clients) / weight.clamp(min=1)
        assert torch.allclose(moved, mean, rtol=1e-10, atol=1e-13)


def test_a_probe_is_the_gradient_of_the_mean_loss_of_all_examples_and_trains_nothing():
    work, broadcast = work_of("adam", "clipped"), replace(sent(), probe=True)
    found = train_client(work, broadcast, 4, DATA, state={"own": torch.ones(2)}, key=KEY)
    model = network()
    model.load_state_dict(broadcast.params)
    F.cross_entropy(model(DATA.inputs), DATA.labels).backward()
    for name, tensor in model.named_parameters():
        assert torch.allclose(found.update[name], -tensor.grad, rtol=1e-10, atol=1e-13)
    assert all(bool(found.update[name][~mask].any()) for name, mask in KEPT.items())  # dense
    assert found.state.keys() == {"own"} and found.num_examples == 22
    again = probed(work, broadcast, 4, DATA, state={}, key=KEY)
    assert p.same_bits(again.update, found.update)


def test_what_a_client_knows_of_the_servers_masks_survives_beside_its_own_state():
    own, masks = {"c": torch.ones(2), **masking.as_state(OTHER)}, Masks(KEPT, 5)
    held = {**own, **masking.remembered(masks)}
    assert masking.known(held).version == 5 and p.same_bits(masking.known(held).kept, KEPT)
    assert p.same_bits(masking.without_known(held), own) and masking.known(own) is None
    assert masking.remembered(None) == {} and masking.known({**own, **masking.remembered(Masks({}, 1))}).kept == {}
