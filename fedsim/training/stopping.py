"""Early stopping of one client's training: hold examples out, look after each epoch, go back to the best one."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


def held_out(validation: float, n: int) -> int:
    """How many of a client's n examples are held out: ``validation * n``, rounded down; never all."""
    return int(validation * n)


def places(validation: float, n: int, client: int) -> tuple[Tensor, Tensor]:
    """Where among a client's n >= 1 examples those lie that it trains on, and those it is judged by: ascending int64.

    Held out are the first of an order that is drawn from n and the client's id alone. So they are the same in every
    round and run, whatever order the client's examples lie in. A client that holds none out is judged by all that it
    trains on, and trains on everything.

    Args:
        validation: share to hold out, in [0, 1).
        n: of the client's examples. client: its id.
    """
    held = held_out(validation, n)
    if not held:
        return torch.arange(n), torch.arange(n)
    order = rng.permutation(rng.fold(client, "held out"), n)
    return torch.sort(order[held:]).values, torch.sort(order[:held]).values


def parted(validation: float, data: Examples, client: int) -> Parted:
    """A client's examples parted as in :func:`places`; copies, if anything is held out."""
    if not held_out(validation, len(data)):
        return Parted(data, data)
    trained, judged = (where.to(data.labels.device) for where in places(validation, len(data), client))
    return Parted(data.take(trained), data.take(judged))


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
