"""Which examples each of several clients sees in which step, as one index array."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim import rng

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Timetable:
    """The steps of clients that train side by side, those with most examples first.

    positions: int64 (clients, steps, batch): index into the client's own examples; -1 where it has none.
    counts: (clients, steps), examples of each client in each step.
    active: clients still training in each step: the first so many. Never growing, >= 1.
    width: longest batch of each step, over the active clients.
    full: whether every active client has as many examples as the longest batch of the step.
    """

    positions: Tensor
    counts: Counts
    active: tuple[int, ...]
    width: tuple[int, ...]
    full: tuple[bool, ...]

    def lanes(self, start: int, end: int) -> "Timetable":
        """The steps of some of the clients, [start, end)."""
        steps = int(np.count_nonzero(self.counts[start]))
        return _described(self.positions[start:end, :steps], self.counts[start:end, :steps])


def timetable(sizes: Sequence[int], batch_size: int | None, local_epochs: int, keys: Tensor) -> Timetable:
    """The batches of :func:`fedsim.training.client.batches`, for several clients at once.

    Args:
        sizes: examples of each client, >= 1, descending.
        batch_size: >= 1, or None for one batch of all.
        local_epochs: >= 1.
        keys: of each client in this round, int64 (clients,).
    """
    longest = sizes[0]
    batch = min(batch_size or longest, longest)
    own = [1 if batch_size is None else -(-size // batch_size) for size in sizes]  # steps of an epoch
    padded = torch.full((len(sizes), local_epochs, own[0] * batch), -1, dtype=torch.int64, device=keys.device)
    counts = torch.tensor(sizes, device=keys.device)
    epoch_keys = rng.fold_tensor(keys, "epoch")
    absent = torch.arange(longest, device=keys.device) >= counts[:, None] if sizes[-1] < longest else None
    for epoch in range(local_epochs):
        order = rng.permutations(rng.fold_tensor(epoch_keys, epoch), counts)
        padded[:, epoch, :longest] = order if absent is None else order.masked_fill(absent, -1)
    positions = padded.view(len(sizes), local_epochs * own[0], batch)
    if own[-1] < own[0] and local_epochs > 1:  # a client's next epoch follows its own last step
        positions = _closed_up(padded, own, batch)
    return _described(positions, (positions >= 0).sum(2).cpu().numpy())


def _described(positions: Tensor, counts: Counts) -> Timetable:
    active, width = np.count_nonzero(counts, axis=0), counts.max(0)
    full = counts.sum(0) == active * width
    return Timetable(positions, counts, tuple(active.tolist()), tuple(width.tolist()), tuple(full.tolist()))


def _closed_up(padded: Tensor, own: Sequence[int], batch: int) -> Tensor:
    clients, epochs, _ = padded.shape
    closed = torch.full_like(padded, -1).view(clients, -1, batch)
    for lane, steps in enumerate(own):
        closed[lane, : epochs * steps] = padded[lane, :, : steps * batch].reshape(-1, batch)
    return closed
