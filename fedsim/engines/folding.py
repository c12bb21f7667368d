"""How results of single clients become a cohort's: in blocks, so that every engine adds up in the same order.

A cohort is cut into blocks by :func:`blocks`, which looks at the clients alone. Each block is folded into a
:class:`Part`, wherever and whenever, and the parts are joined in order. Hence a sum does not depend on how many
processes computed its parts, nor on which came first.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedsim import params as p
from fedsim.engines.engine import REMEDY, Job
from fedsim.errors import DivergedError, RunError
from fedsim.records import Broadcast, ClientUpdate, CohortUpdate, Indices, Params, StackedUpdate
from fedsim.strategies.aggregators import Aggregator
from fedsim.strategies.strategy import weight

BLOCKS = 16  # a small cohort is cut into about so many: enough to share out evenly over the cores of one machine
LONGEST = 64  # clients; bounds what a block holds in memory, whatever the cohort
_HOLDERS = "holders/"  # beside an update in a fold: 1 where its client's masks hold an entry


@dataclass(frozen=True)
class Part:
    """What one block of a cohort comes to.

    updates, buffers: accumulators of the aggregator.
    done: clients that contributed, and their numbers of examples.
    metrics: sums of metric times examples.
    """

    updates: Any
    buffers: Any
    done: tuple[tuple[int, int], ...]
    skipped: tuple[int, ...]
    metrics: dict[str, float]
    states: dict[int, Params]
    bytes_up: int


def blocks(offsets: Indices, clients: Sequence[int]) -> list[tuple[int, ...]]:
    """The cohort in the order in which it is added up, in blocks.

    Clients with most examples come first, so that those of one block take about as many steps, and the long blocks
    start early. A block has ``m / 16`` of m clients, rounded up, and at most 64.

    Args:
        offsets: of the partition, int64 (clients + 1,).
        clients: of the cohort, in any order.
    """
    order = sorted(clients, key=lambda client: (offsets[client] - offsets[client + 1], client))
    length = min(max(math.ceil(len(order) / BLOCKS), 1), LONGEST)
    return [tuple(order[start : start + length]) for start in range(0, len(order), length)]


def alone(update: ClientUpdate, bytes_up: int) -> StackedUpdate:
    """A client's result as a stack of one."""
    return StackedUpdate(
        clients=(update.client,),
        update=p.as_stack(update.update),
        buffers=p.as_stack(update.buffers),
        num_examples=(update.num_examples,),
        metrics={name: (value,) for name, value in update.metrics.items()},
        states=p.as_stack(update.state),
        bytes_up=(bytes_up,),
        kept=p.as_stack(update.kept),
    )


def fold(job: Job, broadcast: Broadcast, results: Iterable[StackedUpdate]) -> Part:
    """Fold the results of a block, as they arrive.

    Args:
        job: strategy, and rule for updates that are not finite.
        broadcast: what the clients started from.
        results: in the order of the block.

    Raises:
        DivergedError: an update, a buffer, a state or a metric is not finite and the job says ``fail``.
    """
    aggregate = job.strategy.aggregator
    part = Part(aggregate.start(), aggregate.start(), (), (), {}, {}, 0)
    for result in results:
        moved = _spread(job, _moved(result.buffers, broadcast.buffers))
        wrong = _not_finite(result, moved)
        if wrong and job.on_nan == "fail":
            lane, what = min(wrong.items())
            raise DivergedError(broadcast.round, result.clients[lane], f"training diverged: {what} ({REMEDY})")
        part = _added(job, part, result, moved, [i for i in range(len(result.clients)) if i not in wrong])
    return part


def join(job: Job, broadcast: Broadcast, parts: Iterable[Part], *, bytes_down: int) -> CohortUpdate:
    """Join the parts of a cohort, in the order of its blocks.

    Returns:
        The cohort's update. Metrics are means weighted by examples. Floating-point buffers move by the mean of the
        clients' moves; integer buffers (batch-norm counters) keep the broadcast's value, since the mean of a count
        means nothing. Of ``job.pooled`` variances come out as of all clients' examples together:
        ``sum_k p_k (var_k + mu_k^2) - mu^2`` with the clients' shares p_k and the mean mu of their means. Where
        clients have masks m_k of their own, an entry moves by ``sum_k p_k m_k u_k / sum_k p_k m_k``, the mean over
        those that hold it, and not at all if nobody does.
    """
    aggregate = job.strategy.aggregator
    whole = Part(aggregate.start(), aggregate.start(), (), (), {}, {}, 0)
    for part in parts:
        whole = Part(
            updates=aggregate.merge(whole.updates, part.updates),
            buffers=aggregate.merge(whole.buffers, part.buffers),
            done=whole.done + part.done,
            skipped=whole.skipped + part.skipped,
            metrics=_plus(whole.metrics, part.metrics),
            states={**whole.states, **part.states},
            bytes_up=whole.bytes_up + part.bytes_up,
        )
    done = sorted(whole.done)
    examples = sum(count for _, count in done)
    return CohortUpdate(
        update=_of_holders(aggregate, whole.updates),
        buffers=_advanced(broadcast.buffers, _pooled(job, broadcast, aggregate.finish(whole.buffers))),
        clients=tuple(client for client, _ in done),
        num_examples=tuple(count for _, count in done),
        skipped=tuple(sorted(whole.skipped)),
        metrics={name: total / examples for name, total in whole.metrics.items()},
        states=dict(sorted(whole.states.items())),
        bytes_up=whole.bytes_up,
        bytes_down=bytes_down,
    )


def _added(job: Job, part: Part, result: StackedUpdate, moved: Params, lanes: list[int]) -> Part:
    """The part with these lanes of a result; all others are skipped."""
    everybody = len(lanes) == len(result.clients)
    counts = [result.num_examples[i] for i in lanes]
    shares = [weight(job.strategy.weighting, count) for count in counts]
    update, buffers = (own if everybody else p.lanes(own, lanes) for own in (_with_holders(result), moved))
    metrics = part.metrics
    for i in lanes:  # one after another, so that stacking changes no bit of a sum
        metrics = _plus(metrics, {name: values[i] * result.num_examples[i] for name, values in result.metrics.items()})
    # copies: a view would keep the whole stack, and be pickled with all of it
    kept = {result.clients[i]: {n: t[i].clone() for n, t in result.states.items()} for i in lanes if result.states}
    return replace(
        part,
        updates=job.strategy.aggregator.add(part.updates, update, shares) if lanes else part.updates,
        buffers=job.strategy.aggregator.add(part.buffers, buffers, shares) if lanes else part.buffers,
        done=part.done + tuple((result.clients[i], result.num_examples[i]) for i in lanes),
        skipped=part.skipped + tuple(client for i, client in enumerate(result.clients) if i not in lanes),
        metrics=metrics,
        states={**part.states, **kept},
        bytes_up=part.bytes_up + sum(result.bytes_up),
    )


def _with_holders(result: StackedUpdate) -> Params:
    """The updates, with who holds what beside them as numbers, so that one fold takes both means."""
    held = {_HOLDERS + name: mask.to(result.update[name].dtype) for name, mask in result.kept.items()}
    return {**result.update, **held} if held else result.update


def _of_holders(aggregate: Aggregator, folded: Any) -> Params | None:
    """Means over all clients turned into means over the holders of each entry."""
    mean = aggregate.finish(folded)
    if mean is None or not aggregate.linear or not any(name.startswith(_HOLDERS) for name in mean):
        return mean
    moves = {name: tensor for name, tensor in mean.items() if not name.startswith(_HOLDERS)}
    shares = {name: mean[_HOLDERS + name] for name in moves if _HOLDERS + name in mean}
    return {n: torch.where(shares[n] > 0, m / shares[n], 0.0) if n in shares else m for n, m in moves.items()}


def _plus(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    if a and b and a.keys() != b.keys():
        raise RunError(f"clients of one round must report the same metrics, got {sorted(a)} and {sorted(b)}")
    return {name: a.get(name, 0.0) + value for name, value in b.items()} if b else dict(a)


def _not_finite(result: StackedUpdate, moved: Params) -> dict[int, str]:
    """By lane, the first thing that is NaN or infinite in a result, in words; {} if nothing is."""
    wrong: dict[int, str] = {}
    for name, values in result.metrics.items():
        for lane, value in enumerate(values):
            if not math.isfinite(value):
                wrong.setdefault(lane, f"{name} is {value}")
    for what, tensors in (("update", result.update), ("buffer", moved), ("state", result.states)):
        for name, lane in _suspects(tensors):
            if lane not in wrong and not bool(torch.isfinite(tensors[name][lane]).all()):
                wrong[lane] = f"the {what} {name} is not finite"
    return wrong


def _suspects(tensors: Params) -> Iterator[tuple[str, int]]:
    """Tensors and lanes whose sum is not finite: those that hold NaN or infinity, and a few with large numbers.

    One pass that writes nothing: much cheaper than asking of every number whether it is finite.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return
    sums = torch.stack([t.flatten(1).sum(1).double() if t.ndim > 1 else t.double() for t in floating.values()])
    finite = torch.isfinite(sums)
    if not bool(finite.all()):
        names = list(floating)
        for row, lane in torch.nonzero(~finite).tolist():
            yield names[row], lane


def _moved(buffers: Params, before: Params) -> Params:
    """How far each floating-point buffer has moved; exactly 0 for one that has not, even if it holds an infinity."""
    floating = {name: b for name, b in buffers.items() if b.is_floating_point()}
    return {name: _difference(b, before[name]) for name, b in floating.items()}


def _spread(job: Job, moved: Params) -> Params:
    """The moves of pooled variances with the squared moves of their means added, so that their mean can be pooled."""
    return {**moved, **{var: moved[var] + moved[mean].square() for mean, var in job.pooled}}


def _pooled(job: Job, broadcast: Broadcast, moved: Params | None) -> Params | None:
    """Mean moves, with those of pooled variances corrected.

    What was averaged is ``var_k + (mu_k - c)^2``, of which ``(mu - c)^2`` is taken off: the same for any c, but with
    the broadcast's mean for c no large squares cancel. Rounding may not make a variance negative.
    """
    if moved is None:
        return None
    variances = {var: moved[var] - moved[mean].square() for mean, var in job.pooled}
    return {**moved, **{var: torch.maximum(move, -broadcast.buffers[var]) for var, move in variances.items()}}


def _difference(after: Tensor, before: Tensor) -> Tensor:
    return torch.where(after == before, 0.0, after - before)


def _advanced(buffers: Params, moved: Params | None) -> Params | None:
    """Buffers after the mean move. What nobody moved, a frozen parameter say, stays bit for bit."""
    if moved is None:
        return None
    return {n: b + moved[n] if n in moved and bool(moved[n].any()) else b for n, b in buffers.items()}
