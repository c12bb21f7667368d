"""Early stopping of one client's training: hold examples out, look after each epoch, go back to the best one."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from fedsim import rng
from fedsim.records import Examples, Params
from fedsim.training.evaluate import score


@dataclass(frozen=True)
class Stopping:
    """When a client stops.

    patience: epochs in a row without improvement, >= 1, after which it stops.
    min_delta: the loss must fall by more than this to count as improved, >= 0, in nats.
    validation: share of a client's examples that is held out, in [0, 1).
    """

    patience: int
    min_delta: float = 0.0
    validation: float = 0.0

    def held_out(self, n: int) -> int:
        """How many of a client's n examples are held out: ``validation * n``, rounded down; never all."""
        return int(self.validation * n)


class Reached(NamedTuple):
    """Where a client's training is after so many epochs and steps. Buffers change in place while it goes on."""

    params: Params
    buffers: Params
    epochs: int
    steps: int


class Best(NamedTuple):
    """The last epoch that improved, its loss, and the number of epochs since."""

    loss: float
    reached: Reached
    since: int


class Parted(NamedTuple):
    """What a client trains on, and what it is judged by."""

    trained: Examples
    judged: Examples


def parted(stopping: Stopping | None, data: Examples, client: int) -> Parted:
    """Hold examples out: the first of an order that is drawn from n and the client's id alone.

    So they are the same in every round and run, whatever order the client's examples lie in. A client that holds none
    out is judged by all that it trains on, and trains on everything.

    Args:
        stopping: None: nothing is held out, or judged.
        data: of the client, n >= 1 examples.
        client: id.
    """
    held = stopping.held_out(len(data)) if stopping else 0
    if not held:
        return Parted(data, data)
    order = rng.permutation(rng.fold(client, "held out"), len(data))
    return Parted(data.take(torch.sort(order[held:]).values), data.take(torch.sort(order[:held]).values))


def after_epoch(stopping: Stopping, best: Best | None, model: nn.Module, reached: Reached, judged: Examples) -> Best:
    """The best so far, after one more epoch. The first one counts as improved, and a loss that is NaN never does.

    The loss is the plain cross-entropy in evaluation mode, whatever is minimised. Leaves the model in training mode.

    Source: Prechelt 1998, "Early Stopping - But When?", with Keras's meaning of patience and min_delta (unverified).
        Differs: the model that a client was sent is no candidate, so that a client always trains for an epoch.
    """
    loss, _ = score(model, reached.params, reached.buffers, judged).mean()
    model.train()
    if best is not None and not loss < best.loss - stopping.min_delta:
        return best._replace(since=best.since + 1)
    return Best(loss, reached._replace(buffers={name: b.clone() for name, b in reached.buffers.items()}), 0)
