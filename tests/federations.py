"""Small federations that every engine can run, and what comes out of them, for the tests of several engines."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.federation import Federation, run, start
from fedsim.models import batch_norm
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names
from fedsim.pruning.lottery import lottery_ticket
from fedsim.pruning.magnitude import magnitude
from fedsim.pruning.rigl import rigl
from fedsim.pruning.saliency import grasp, snip
from fedsim.pruning.structured import l1_filter
from fedsim.pruning.tickets import personal_tickets
from fedsim.records import Examples, Partition
from fedsim.strategies.server_rules import ServerRule
from fedsim.strategies.strategy import fedavg
from fedsim.training import regularizers as r
from fedsim.training.client import LocalWork
from fedsim.training.local_rule import LocalRule
from fedsim.training.optimizers import adam, sgd
from fedsim.training.stopping import Stopping
from fedsim.transforms.compression import qsgd, quantise, random_k, top_k
from fedsim.transforms.transform import compose

CLIENTS, ROUNDS, FEATURES, CLASSES = 24, 3, 5, 3


def correct(grads, local_params, broadcast, state):
    return {name: g - state[name] + broadcast.extra[name] for name, g in grads.items()}


def finish(local_params, broadcast, state, steps):
    moved = p.sub(broadcast.params, local_params)
    return {n: state[n] - broadcast.extra[n] + moved[n] / (0.1 * steps) for n in state}


def step(params, update, state):
    return p.add(params, update), {n: 0.5 * state[n] - update[n] for n in state}


def control():
    """A state at each client, one at the server, and an extra that every client is sent, as in SCAFFOLD."""
    rule, server = LocalRule(p.zeros_like, correct, finish), ServerRule(p.zeros_like, step, dict)
    return replace(fedavg(), local=rule, server=server)


def penalised(model):
    """Every penalty that needs nothing of a model, and another loss."""
    strengths = {"l1": 0.01, "l2": 0.02, "group-lasso": 0.003, "orthogonal": 0.01, "spectral": 0.02}
    made = [r.REGULARIZERS[name](strength=strength) for name, strength in strengths.items()]
    return r.bind(model, [*made, r.proximal(mu=0.3), r.label_smoothing(epsilon=0.2)])


def federation(case, dtype=torch.float32):
    """Clients of 1 to 13 examples in a random order of ids, or of 8 each."""
    sizes = (
        np.full(CLIENTS, 8)
        if case in ("batch norm", "own batch norm")
        else 1 + rng.permutation(9, CLIENTS).numpy() % 13
    )
    if case == "unequal batch norm":
        sizes = 2 * sizes
    middle = {"dropout": [Dropout(0.3)], "stopping": [Dropout(0.3)]} | {
        c: [nn.BatchNorm1d(6)] for c in CASES if "batch norm" in c
    }
    with rng.torch_seeded(1):
        layers = [nn.Linear(FEATURES, 6), *middle.get(case, []), nn.ReLU(), nn.Linear(6, CLASSES)]
        model = nn.Sequential(*layers).to(dtype)
    n = int(sizes.sum())
    train = Examples(2 * rng.normal(2, n, FEATURES, dtype=dtype), (rng.uniform(3, n) * CLASSES).long())
    test = Examples(rng.normal(4, 30, FEATURES, dtype=dtype), (rng.uniform(5, 30) * CLASSES).long())
    owners = Partition(np.array([0, *np.cumsum(sizes)]), rng.permutation(7, n).numpy())
    nobody = Partition(np.zeros(CLIENTS + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    tested = Partition(np.arange(CLIENTS + 1), rng.permutation(9, 30).numpy()[:CLIENTS]) if "own" in case else nobody
    data = FederatedData(train, test, owners, tested, test, CLASSES, ())
    strategy = control() if case in STATEFUL else fedavg(server_lr=0.9)
    momentum = sgd(lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizers = {"momentum": momentum, "pruned": momentum, "adam": adam(lr=0.01), "tickets": adam(lr=0.01)}
    optimizer = optimizers.get(case, sgd(lr=0.1))
    batch = 4 if case != "unequal batch norm" else 26  # one batch of all: batch norm cannot take one example
    work = LocalWork(model, key_names(model), optimizer, strategy.local, 2, batch)
    if case == "penalties":
        work = replace(work, objective=penalised(model))
    if case == "own batch norm":
        work = replace(work, kept=batch_norm.tensors(model))
    if case == "clipped":
        work = replace(work, max_grad_norm=1.2)  # about the median of the norms
    if case in PLAINLY:
        work = replace(work, local_epochs=6, stopping=Stopping(patience=2, min_delta=0.01, validation=0.3))
    pruning = {
        "tickets": lottery_ticket(rate=0.3, every=1),
        "tickets states": lottery_ticket(rate=0.3, every=1),
        "pruned": magnitude(sparsity=0.6, end=2, scope="global"),
        "pruned states": magnitude(sparsity=0.6, end=2),
        "filters": l1_filter(sparsity=0.5, at=1),
        "filters states": l1_filter(sparsity=0.3, at=2),
        "snip": snip(sparsity=0.5),
        "grasp": grasp(sparsity=0.5),
        "rigl": rigl(sparsity=0.5, every=1, share=0.5, until=1.0),
        "own tickets": personal_tickets(rate=0.3, target=0.5, threshold=0.4, validation=0.25),
        "own coded tickets": personal_tickets(rate=0.3, target=0.5, threshold=0.4, validation=0.25),
    }.get(case)
    work = replace(work, tickets=pruning and pruning.tickets)
    sent = compose(TRANSFORMED.get(case, []))
    return Federation(5, data, work, strategy, ROUNDS, 17, "fixed", 2, "fail", pruning=pruning, compression=sent)


CASES = ["plain", "dropout", "batch norm", "unequal batch norm", "own batch norm", "momentum", "adam", "states"]
CASES += ["penalties", "clipped", "tickets", "pruned", "pruned states", "own tickets", "snip", "grasp", "rigl"]
CASES += ["filters", "filters states", "tickets states"]
TRANSFORMED = {
    "top-k": [top_k(fraction=0.2)],
    "quantised": [random_k(fraction=0.5), qsgd()],
    "coded stopping": [top_k(fraction=0.3)],
    "own coded tickets": [top_k(fraction=0.3), quantise()],
}
CASES += [case for case in TRANSFORMED if "stopping" not in case]
STATEFUL = ("states", "own batch norm", "stopping", "pruned states", "tickets states", "filters states", "top-k")
PLAINLY = ["stopping", "coded stopping"]  # trained by the plain loop, by every engine that can
CHAINS = [case for case in CASES if "norm" not in case and case != "penalties"]


def result(made, engine, state=None):
    rounds = []
    final = run(made, state or start(made), engine, lambda one: rounds.append((one.state, one.record)))
    return final, [replace(record, seconds=0.0) for _, record in rounds], [state for state, _ in rounds]


def tensors(state):
    clients = {f"{k}.{n}": t for k, own in state.clients.items() for n, t in own.items()}
    pruning = {f"p.{n}": t for n, t in state.pruning.items()}
    return {**state.params, **{f"b.{n}": t for n, t in state.buffers.items()}, **state.server, **clients, **pruning}
