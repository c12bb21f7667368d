"""Removing channels in a federation: two federations by hand, glued; what each method chooses, by loops; refusals."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import control, result, tensors
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.config import build, load
from fedsim.data.federated import FederatedData
from fedsim.engines.flower import flower
from fedsim.engines.local import local
from fedsim.engines.reference import reference
from fedsim.errors import ConfigError
from fedsim.federation import Federation, job, run, start
from fedsim.models.zoo import MODELS
from fedsim.pruning.channels import groups
from fedsim.pruning.structured import l1_filter, network_slimming, share, soft_filter
from fedsim.records import Examples, Partition, ServerState
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import sgd
from fedsim.training.regularizers import REGULARIZERS, bind

SIZES, CLASSES = np.array([4, 8, 6, 10, 6, 2]), 3  # no batch of one example, for batch norm
CLIENTS, SHAPE = len(SIZES), (1, 6, 6)


def network(first=6, second=4):
    with rng.torch_seeded(1):
        front = [nn.Conv2d(1, first, 3), nn.BatchNorm2d(first), nn.ReLU(), nn.Conv2d(first, second, 3, bias=False)]
        return nn.Sequential(*front, nn.ReLU(), nn.Flatten(), nn.Linear(4 * second, CLASSES)).double()


def made(pruning, *, rounds=5, model=None, strategy=None, **changes):
    n, strategy = int(SIZES.sum()), strategy or fedavg(server_lr=0.9)
    train = Examples(2 * rng.normal(2, n, *SHAPE, dtype=torch.float64), (rng.uniform(3, n) * CLASSES).long())
    test = Examples(rng.normal(4, 9, *SHAPE, dtype=torch.float64), (rng.uniform(5, 9) * CLASSES).long())
    owners = Partition(np.array([0, *np.cumsum(SIZES)]), rng.permutation(7, n).numpy())
    nobody = Partition(np.zeros(CLIENTS + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    data = FederatedData(train, test, owners, nobody, test, CLASSES, ())
    model = model or network()
    objective = bind(model, [])
    if pruning is not None:
        objective = pruning.bind(model, objective)
    work = LocalWork(model, (), sgd(lr=0.1, momentum=0.9), strategy.local, 2, 4, objective=objective)
    return replace(Federation(5, data, work, strategy, rounds, 4, "fixed", 1, "fail", pruning=pruning), **changes)


def strongest(scores, count):
    """The ``count`` largest by a loop: of equal ones the first."""
    kept = []
    for _ in range(count):
        best = None
        for i, score in enumerate(scores):
            if i not in kept and (best is None or score > scores[best]):
                best = i
        kept.append(best)
    return sorted(kept)


def cut_by_hand(state, first, second):
    """What is left of the network's tensors, copied one number at a time."""
    old, new = {**state.params, **state.buffers}, {}
    for name, tensor in old.items():
        array = tensor.numpy()
        if name.startswith(("0.", "1.")) and array.ndim:
            new[name] = np.stack([array[i] for i in first])
        elif name == "3.weight":
            new[name] = np.array([[array[i, j] for j in first] for i in second])
        elif name == "6.weight":
            new[name] = np.array([[row[4 * j + place] for j in second for place in range(4)] for row in array])
        else:
            new[name] = array
    return {name: torch.from_numpy(np.array(array)) for name, array in new.items()}


def glued(federation, at, first, second, *, strategy=None):
    """Dense rounds, tensors cut by hand, and a small model built by hand for the other rounds."""
    dense, _, _ = result(replace(federation, pruning=None, rounds=at), reference())
    kept = first(dense), second(dense)
    left = cut_by_hand(dense, *kept)
    small = network(len(kept[0]), len(kept[1]))
    params = {name: left[name] for name in dense.params}
    state = ServerState(
        at, params, {n: left[n] for n in dense.buffers}, federation.strategy.server.init(params), {}, {}
    )
    going = replace(federation, pruning=None, work=replace(federation.work, model=small))
    return dense, result(going, reference(), state)


@pytest.mark.parametrize("strategy", [fedavg(server_lr=0.9), control()])
@pytest.mark.parametrize(("at", "sparsity", "counts"), [(2, 0.5, (3, 2)), (1, 0.7, (2, 2)), (4, 0.2, (5, 4))])
def test_removing_filters_is_two_federations_glued(at, sparsity, counts, strategy):
    federation = made(l1_filter(sparsity=sparsity, at=at), strategy=strategy)
    final, records, states = result(federation, reference())

    def by(name, count):
        return lambda dense: strongest([np.abs(w).sum() for w in dense.params[name].numpy()], count)

    dense, (expected, later, _) = glued(federation, at, by("0.weight", counts[0]), by("3.weight", counts[1]))
    assert p.same_bits(states[at].params, dense.params)
    assert p.same_bits(final.params, expected.params) and p.same_bits(final.buffers, expected.buffers)
    assert p.same_bits(final.server, expected.server) and final.clients.keys() == expected.clients.keys()
    assert all(p.same_bits(final.clients[k], expected.clients[k]) for k in final.clients)
    for ours, theirs in zip(records[at + 1 :], later, strict=True):
        fields = ("loss", "accuracy", "train_loss", "cohort", "bytes_up", "bytes_down")
        assert [getattr(ours, f) for f in fields] == [getattr(theirs, f) for f in fields]
    left = {"0.weight": counts[0] / 6, "3.weight": counts[0] * counts[1] / 24, "6.weight": counts[1] / 4}
    assert records[-1].remaining == pytest.approx(left) and records[at].sparsity is None
    staying = sum(left[name] * size for name, size in (("0.weight", 54), ("3.weight", 216), ("6.weight", 48)))
    assert records[-1].sparsity == pytest.approx(1 - staying / 318)


def test_slimming_removes_by_one_threshold_for_all_averaged_scales_and_its_penalty_acts_before_and_after():
    """An affine norm behind both layers; some scales move far, so that layers lose different numbers."""
    model = network()
    model.insert(4, nn.BatchNorm2d(4).double())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, -0.9, 1.2, 0.3, -0.2, 0.8]))
        model[4].weight.copy_(torch.tensor([1.4, -1.1, 0.15, 0.9]))
    federation = made(network_slimming(sparsity=0.4, strength=0.05, at=2), model=model)
    _, _, states = result(federation, reference())
    plain = made(None, model=copy.deepcopy(model))
    plain = replace(
        plain, work=replace(plain.work, objective=bind(model, [REGULARIZERS["bn-slimming"](strength=0.05)]))
    )
    assert p.same_bits(states[2].params, result(replace(plain, rounds=2), reference())[0].params)
    scales = {name: states[2].params[f"{name}.weight"].abs().tolist() for name in ("1", "4")}
    threshold = sorted(scales["1"] + scales["4"])[4]  # floor(0.4 * 10) from 0, which goes itself
    first, second = ([i for i, s in enumerate(scales[name]) if s > threshold] for name in ("1", "4"))
    assert len(first) + len(second) == 5 and 0 < len(first) < 6 and 0 < len(second) < 4
    assert states[3].params["0.weight"].shape[0] == len(first) and states[3].params["3.weight"].shape[0] == len(second)
    unmoved = replace(federation, work=replace(federation.work, optimizer=sgd(lr=1e-12)))
    unmoved_state = result(unmoved, reference())[2]
    before, after = unmoved_state[2].params, unmoved_state[3].params
    threshold = sorted([*before["1.weight"].abs().tolist(), *before["4.weight"].abs().tolist()])[4]
    rows = [i for i, s in enumerate(before["1.weight"].abs().tolist()) if s > threshold]
    assert torch.allclose(after["1.weight"], before["1.weight"][rows], atol=1e-9)
    later = result(made(network_slimming(sparsity=0.4, strength=0.0, at=2), model=copy.deepcopy(model)), reference())[2]
    assert not p.same_bits(later[1].params, states[1].params)


def test_soft_filters_are_zeroed_after_each_round_and_those_that_are_zeroed_in_the_end_are_removed():
    federation = made(soft_filter(sparsity=0.5, at=3), rounds=4)
    frozen = replace(federation, work=replace(federation.work, optimizer=sgd(lr=1e-14)))
    _, _, states = result(frozen, reference())
    first = {name: states[0].params[name].numpy() for name in ("0.weight", "3.weight")}
    for name, count in (("0.weight", 3), ("3.weight", 2)):
        kept = strongest([np.sqrt((w**2).sum()) for w in first[name]], count)
        for state in states[2:4]:
            gone = [i for i in range(len(first[name])) if i not in kept]
            assert np.allclose(state.params[name].numpy()[gone], 0, atol=1e-9)
            assert np.allclose(state.params[name].numpy()[kept], first[name][kept], atol=1e-9)
        assert states[4].params[name].shape[0] == count
    assert np.allclose(states[1].params["0.weight"].numpy(), first["0.weight"], atol=1e-9)  # nothing before round 2
    assert result(frozen, reference())[1][3].sparsity is None


def test_soft_filters_train_on_and_may_come_back():
    federation = made(soft_filter(sparsity=0.5, at=4), rounds=4)
    zeroed = []
    before = federation.pruning.before

    def watched(moment):
        change = before(moment)
        if change is not None:
            zeroed.append([i for i, w in enumerate(change.params["0.weight"]) if not bool(w.any())])
        return change

    federation = replace(federation, pruning=replace(federation.pruning, before=watched))
    _, _, states = result(federation, reference())
    assert [len(gone) for gone in zeroed] == [3, 3, 3]
    for round, gone in zip((2, 3, 4), zeroed, strict=True):  # trained: those that a ReLU lets through
        came_back = [i for i in gone if bool(states[round].params["0.weight"][i].any())]
        assert came_back == [
            i for i in gone if bool(states[round].params["1.bias"][i] != states[round - 1].params["1.bias"][i])
        ]
        assert came_back


def test_what_is_masked_and_what_is_removed_at_the_end_compute_the_same():
    """After ``at`` rounds the weakest filters go; the small model returns what the large one does without them."""
    federation = made(soft_filter(sparsity=0.5, at=2), rounds=3)
    frozen = replace(federation, work=replace(federation.work, optimizer=sgd(lr=1e-14)))
    _, _, states = result(frozen, reference())
    large, small = network(), network(3, 2)
    dense = {**states[2].params, **states[2].buffers}
    kept = [strongest([float(w.norm()) for w in dense[n]], c) for n, c in (("0.weight", 3), ("3.weight", 2))]
    dense["6.weight"] = dense["6.weight"].clone()
    dense["3.weight"] = dense["3.weight"].clone()
    dense["6.weight"][:, [4 * j + k for j in range(4) if j not in kept[1] for k in range(4)]] = 0
    dense["3.weight"][:, [j for j in range(6) if j not in kept[0]]] = 0
    large.load_state_dict(dense, strict=False)
    small.load_state_dict(
        {
            **states[3].params,
            **states[3].buffers,
            "1.running_mean": dense["1.running_mean"][kept[0]],
            "1.running_var": dense["1.running_var"][kept[0]],
        },
        strict=False,
    )
    x = rng.normal(8, 7, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(small.eval()(x), large.eval()(x), rtol=0, atol=1e-8)


def test_random_filters_are_as_many_and_others():
    found = [result(made(l1_filter(at=2, random=r), rounds=3), reference())[0].params for r in (False, True)]
    by_size, at_random = ({name: tensor.shape for name, tensor in one.items()} for one in found)
    assert by_size == at_random
    assert not p.same_bits(*found)


def test_scratch_forgets_what_was_learnt_and_is_drawn_anew():
    federation = made(l1_filter(at=2, then="scratch"), rounds=3)
    frozen = replace(federation, work=replace(federation.work, optimizer=sgd(lr=1e-14)))
    _, _, states = result(frozen, reference())
    weight = states[3].params["3.weight"]
    assert weight.shape == (2, 3, 3, 3)
    bound = 1 / np.sqrt(27)  # torch's first weights of a convolution with 27 inputs, not 54
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    rows = {tuple(row) for row in states[2].params["3.weight"].flatten(2).flatten(0, 1).tolist()}
    assert not rows & {tuple(row) for row in weight.flatten(2).flatten(0, 1).tolist()}
    assert torch.allclose(states[3].params["1.weight"], torch.ones(3, dtype=torch.float64))


def test_only_the_layers_named_lose_filters():
    final = result(made(l1_filter(at=1, layers=["3"]), rounds=2), reference())[0]
    assert final.params["0.weight"].shape == (6, 1, 3, 3) and final.params["3.weight"].shape == (2, 6, 3, 3)


@pytest.mark.parametrize(("multiple", "sparsity", "staying"), [(1, 0.5, 4), (4, 0.4, 8), (4, 0.5, 4), (4, 0.9, 4)])
def test_behind_group_norm_a_multiple_of_the_groups_stays(multiple, sparsity, staying):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(multiple, 8), nn.Flatten(), nn.Linear(128, 2))
    (group,) = groups(model, SHAPE)
    assert round(8 * (1 - share(group, sparsity))) == staying


# ---------------------------------------------------------------- engines, resumes


@pytest.mark.parametrize(
    ("engine", "at"),
    [
        *((engine, at) for engine in ("sequential", "vectorised", "flower") for at in (1, 2)),
        pytest.param("workers", 2, marks=pytest.mark.slow),
    ],
)
def test_every_engine_goes_on_with_the_smaller_model(engine, at, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    federation = made(l1_filter(at=at), rounds=3)
    engines = {
        "sequential": lambda: local(mode="sequential", workers=1),
        "vectorised": lambda: local(mode="vectorised", workers=1),
        "flower": flower,
        "workers": lambda: local(mode="sequential", workers=2),
    }
    made_engine = engines[engine]()
    if engine == "vectorised":
        made_engine = made_engine.prepared(job(federation), {"path": "vectorised", "chunk": 3})
    found, expected = result(federation, made_engine)[0], result(federation, reference())[0]
    for name, tensor in tensors(expected).items():
        tolerance = 1e-12 if engine == "vectorised" else 0
        torch.testing.assert_close(tensors(found)[name], tensor, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_run_stopped_before_at_and_after_the_removal_ends_with_the_same_bits(stopped):
    federation = made(l1_filter(at=2), rounds=4, strategy=control())
    whole, records, _ = result(federation, reference())
    reached = []

    def stop(one):
        reached.append(one.state)
        if one.state.round == stopped:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(federation, start(federation), reference(), stop)
    again, later, _ = result(federation, reference(), reached[-1])
    assert p.same_bits(tensors(again), tensors(whole)) and later == records[stopped + 1 :]


# ---------------------------------------------------------------- refusals


CONFIG = {
    "data": {"dataset": "digits", "clients": 3, "split": "iid"},
    "model": {"name": "cnn", "channels": [2, 3], "kernel": 3, "hidden": 4, "norm": "batch"},
    "train": {"rounds": 3, "batch_size": 32},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pruning": "l1-filter"}, "pruning.at: must be below train.rounds (3), got 10"),
        ({"pruning": {"name": "soft-filter", "at": 3}}, "pruning.at: must be below train.rounds (3), got 3"),
        ({"pruning.at": 1, "train.batch_norm": "local"}, "pruning: l1-filter goes with no train.batch_norm: local"),
        ({"pruning": {"name": "l1-filter", "at": 1, "layers": ["convs.9"]}}, "layers"),
        ({"pruning": {"name": "network-slimming", "at": 1}, "model.norm": "none"}, "needs batch norm"),
        (
            {"pruning": {"name": "network-slimming", "at": 1}, "train.batch_norm": "freeze"},
            "needs batch norm",
        ),
        ({"pruning.at": 1, "model": "linear"}, "no channels of this model can be removed"),
        (
            {
                "pruning": {"name": "l1-filter", "at": 1, "then": "scratch"},
                "model": {"name": "resnet-8", "init": "fixup"},
            },
            "cannot train from scratch with model.init: fixup",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(changes, says):
    config = {**CONFIG, "pruning": {"name": "l1-filter"}}
    with pytest.raises(ConfigError) as refused:
        build.federation(load.load(config, changes))
    assert says in str(refused.value) and str(refused.value).startswith("pruning")


def test_models_of_the_zoo_lose_channels_as_the_config_says():
    with rng.torch_seeded(1):
        model = MODELS["resnet-8"](input_shape=(1, 8, 8), num_classes=3)
    assert all(round(group.out * share(group, 0.5)) == group.out // 2 for group in groups(model, (1, 8, 8)))
