"""Personal lottery tickets: each client prunes its own copy of the model by its own data, and keeps its own masks."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from fedsim.pruning import criteria, masks
from fedsim.pruning.pruning import Change, Moment, Pruning
from fedsim.records import Broadcast, Examples, Params
from fedsim.training import kept, masking
from fedsim.training.evaluate import score
from fedsim.training.masking import Opening, Tickets

PAIRS = 20  # of tickets that are compared in a round, at most


def personal_tickets(
    *,
    rate: Annotated[float, Gt(0), Lt(1)] = 0.2,
    target: Annotated[float, Gt(0), Lt(1)] = 0.5,
    threshold: Annotated[float, Ge(0), Le(1)] = 0.5,
    validation: Annotated[float, Ge(0), Le(0.5)] = 0.1,
) -> Pruning:
    """Personal tickets (LotteryFL): each client prunes a model of its own, once that does well on its own data.

    A client's turn begins with ``m_k * w``, the model as sent under its masks. If that reaches ``threshold`` on the
    client's validation part, the client removes, of what remains in each layer, the ``rate`` of lowest magnitude, until
    ``target`` of the layer is gone, and trains from ``m_k * w_0``; else from ``m_k * w``. The server moves each entry
    by the mean over those who hold it, ``sum_k n_k m_k (w_k - w) / sum_k n_k m_k``; one that nobody holds stays.

    Clients get the whole model, and send their masks, one bit an entry, with what remains: every time, for the server
    remembers nobody's. Each client is tested with its own model on its own held-out examples; one that never took part
    has the whole model, which is none to use by itself later on: no client has trained it.

    Args:
        rate: in (0, 1), of what remains in a layer, each time.
        target: in (0, 1), share of each layer's weights at which a client stops pruning; never passed. A layer so small
            that ``rate`` of what remains rounds to no entry keeps it.
        threshold: accuracy in [0, 1] that the model as sent must reach.
        validation: share of a client's training examples, in [0, 0.5], that it does not train on, but is judged by. A
            client with too few for one is judged by all of them, and trains on them.

    Source: Li et al. 2021, "LotteryFL: Empower Edge Intelligence with Personalized and Communication-Efficient
        Federated Learning", arXiv:2008.03371, algorithm 1 (read of, not read: details unverified). Differs: layers are
        pruned one by one; biases and norms are never pruned, but rewound; buffers and what stays with a client are not
        rewound; a client without a validation part is judged by its training part.
    """
    opened = partial(_opened, rate=rate, target=target, threshold=threshold)
    return Pruning(_nothing, tickets=Tickets(validation, opened))


def _nothing(moment: Moment) -> Change | None:
    """What the server prunes."""
    return None


def _opened(
    model: nn.Module,
    names: Sequence[str],
    broadcast: Broadcast,
    judged: Examples,
    state: Params,
    *,
    rate: float,
    target: float,
    threshold: float,
) -> Opening:
    """See :class:`fedsim.training.masking.Tickets`."""
    had = masking.ticket(state) or masks.ones(broadcast.params, masks.prunable(broadcast.params))
    state = {**state, **masking.as_state(had)}
    left = criteria.to_sparsity(had, target)
    steps = criteria.layerwise(had, dict.fromkeys(had, rate))
    remove = {name: min(steps[name], left[name]) for name in had}
    if not any(remove.values()):
        return Opening(state, broadcast.params)
    own = kept.whole(model, names, kept.Own(broadcast.params, broadcast.buffers), state)
    _, accuracy = score(model, own.params, own.buffers, judged).mean()
    if not accuracy >= threshold:  # NaN, too, where no label counts
        return Opening(state, broadcast.params)
    pruned = criteria.lowest(criteria.magnitude(own.params, had), had, remove)
    first = dict(model.named_parameters())
    return Opening({**state, **masking.as_state(pruned)}, {name: first[name].detach() for name in broadcast.params})


class Drawn(NamedTuple):
    """What a round's tickets come to, means over its clients. overlap: of pairs; None of a single client."""

    sparsity: float
    by_layer: dict[str, float]
    overlap: float | None


def drawn(tickets: Mapping[int, Params]) -> Drawn | None:
    """What the tickets of a round's clients come to; None if there are none.

    ``overlap`` is the mean Jaccard index of neighbours in ascending order of ids, 20 pairs at most.
    """
    own = [tickets[client] for client in sorted(tickets) if tickets[client]]
    if not own:
        return None
    shares = [masks.by_layer(one) for one in own]
    overlaps = [masks.overlap(a, b) for a, b in itertools.islice(itertools.pairwise(own), PAIRS)]
    return Drawn(
        sparsity=1.0 - _mean([masks.remaining(one) for one in own]),
        by_layer={name: _mean([share[name] for share in shares]) for name in own[0]},
        overlap=_mean(overlaps) if overlaps else None,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
