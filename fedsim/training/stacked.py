"""Local training of several clients at once: the arithmetic of the plain loop, on tensors with a client axis."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.records import IGNORED, Broadcast, Examples, Params
from fedsim.training import kept, masking
from fedsim.training.client import LocalWork
from fedsim.training.local_rule import no_state, same_state
from fedsim.training.steps import Lanes, Now, Step, copies
from fedsim.training.timetable import Timetable, timetable


@dataclass(frozen=True)
class Group:
    """Clients that train side by side, those with most examples first.

    table: their steps, with positions in the pool in the place of positions among their own examples.
    step_keys: int64 (clients,): parents of the keys of single steps.
    sizes: examples of each, >= 1, descending.
    states: one dict a client: of the strategy's local rule, and the client's own tensors.
    starts: the parameters that each starts from, one dict a client; (): those of the broadcast.
    """

    table: Timetable
    step_keys: Tensor
    sizes: tuple[int, ...]
    states: tuple[Params, ...]
    starts: tuple[Params, ...] = ()

    def lanes(self, start: int, end: int) -> "Group":
        """Some of the clients, [start, end)."""
        own = slice(start, end)
        table, keys = self.table.lanes(start, end), self.step_keys[own]
        return Group(table, keys, self.sizes[own], self.states[own], self.starts[own])


def group_of(
    work: LocalWork,
    rows: Tensor,
    sizes: tuple[int, ...],
    keys: Tensor,
    states: tuple[Params, ...],
    *,
    starts: tuple[Params, ...] = (),
) -> Group:
    """Draw the batches of clients.

    Args:
        work: batch size and local epochs.
        rows: int64 (clients, longest): where each one's examples lie in the pool; padded with any index.
        sizes: examples of each, >= 1, descending.
        keys: of each client in this round, int64 (clients,).
        states, starts: of each, as in a group.
    """
    table = timetable(sizes, work.batch_size, work.local_epochs, keys)
    absent = table.positions < 0
    places = rows.gather(1, table.positions.masked_fill(absent, 0).flatten(1)).view(table.positions.shape)
    table = replace(table, positions=places.masked_fill_(absent, -1))
    return Group(table, rng.fold_tensor(keys, "step"), sizes, states, starts)


@dataclass(frozen=True)
class Trained:
    """Lanes of a group after training: updates and buffers (clients, *shape), mean training loss, states, tickets."""

    update: Params
    buffers: Params
    train_loss: tuple[float, ...]
    states: Params
    kept: Params


def train_stacked(work: LocalWork, step: Step, broadcast: Broadcast, pool: Examples, group: Group) -> Trained:
    """Train a group of clients from the global parameters; what :func:`fedsim.training.client.train_client` does.

    Clients with fewer examples are padded to the batch of the longest, by rows whose labels count nothing, and leave
    when their steps are done. A model that mixes the examples of a batch needs groups of one size.

    Args:
        work: what to do, the same for all clients.
        step: one step of all lanes, from :func:`fedsim.training.steps.step_of`.
        broadcast: from the server. Not changed.
        pool: examples of all clients.
        group: who trains, and on what.

    Returns:
        ``update`` = local - global, buffers, losses and states, lane by lane.
    """
    if not work.model.training:
        work.model.train()
    clients = len(group.sizes)
    own = [kept.own(work.model, work.kept, state) for state in group.states]
    local = _started(step.copies(broadcast.params, clients), broadcast, group) | p.stack([one.params for one in own])
    buffers = copies(broadcast.buffers, clients) | p.stack([one.buffers for one in own])
    states = p.stack([kept.rule_state(state) for state in group.states])
    tickets = p.stack([masking.ticket(state) for state in group.states])
    remains = masking.stacked(broadcast, group.states)
    masking.zero_(local, remains)
    lanes = Lanes(local, buffers, work.optimizer.init(local), states, remains)
    table, active, means = group.table, lanes, list[Tensor]()
    sizes = torch.tensor(group.sizes, device=group.step_keys.device)
    for t, n in enumerate(table.active):
        if n < (table.active[t - 1] if t else n):
            active = lanes.first(n)
        keys = rng.fold_tensor(group.step_keys[:n], t) if work.key_names else group.step_keys[:n]
        means.append(step.take(active, Now(_batch(pool, table, t), keys, t + 1, broadcast, sizes[:n])))
    states = _finished(work, lanes, broadcast, group)
    states |= kept.as_state(local | buffers, work.kept) | masking.as_state(tickets)
    update = {name: local[name].sub_(sent) for name, sent in broadcast.params.items()}
    masking.zero_(update, remains)
    return Trained(update, kept.shared(buffers, work.kept), _mean_losses(work, means, group), states, tickets)


def _started(local: Params, broadcast: Broadcast, group: Group) -> Params:
    """Copies of the broadcast's parameters, with the lanes of those clients that start elsewhere changed in place."""
    for lane, start in enumerate(group.starts):
        if start is not broadcast.params:
            for name, tensor in start.items():
                local[name][lane].copy_(tensor)
    return local


def _batch(pool: Examples, table: Timetable, t: int) -> Examples:
    """Examples (clients, width, ...) of a step."""
    clients, width = table.active[t], table.width[t]
    places = table.positions[:clients, t, :width]
    index = places.flatten() if table.full[t] else places.flatten().clamp(min=0)
    inputs = pool.inputs.index_select(0, index).view(clients, width, *pool.inputs.shape[1:])
    labels = pool.labels.index_select(0, index).view(clients, width, *pool.labels.shape[1:])
    if not table.full[t]:
        labels[places < 0] = IGNORED
    return Examples(inputs, labels)


def _mean_losses(work: LocalWork, means: Sequence[Tensor], group: Group) -> tuple[float, ...]:
    """Mean over all examples of all steps, for each client; added up in the order of steps, as the plain loop does."""
    steps = torch.split(torch.cat(list(means)).double().cpu(), list(group.table.active))
    sums = [0.0] * len(group.sizes)
    for t, step in enumerate(steps):
        for lane, mean in enumerate(step.tolist()):
            sums[lane] += mean * int(group.table.counts[lane, t])
    return tuple(total / (size * work.local_epochs) for total, size in zip(sums, group.sizes, strict=True))


def _finished(work: LocalWork, lanes: Lanes, broadcast: Broadcast, group: Group) -> Params:
    """States of the rule after training, stacked; {} where clients keep none."""
    if work.rule.init is no_state and work.rule.finish is same_state:
        return {}
    finished = []
    held = kept.shared(lanes.local, work.kept)
    for lane, size in enumerate(group.sizes):
        local, state = p.lanes(held, lane), p.lanes(lanes.states, lane)
        finished.append(work.rule.finish(local, broadcast, state, _num_steps(work, size)))
    return p.stack(finished) if finished[0] else {}


def _num_steps(work: LocalWork, size: int) -> int:
    return work.local_epochs * (1 if work.batch_size is None else -(-size // work.batch_size))
