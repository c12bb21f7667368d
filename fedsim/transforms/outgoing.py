"""A client's update as it is sent, and as the server reads it: the same functions on every engine.

Who knows the masks needs no positions of pruned entries: an update is reduced to its remaining values first, and only
those are selected and coded. A probe's answer, buffers and broadcasts are never transformed.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedsim import params as p
from fedsim import rng
from fedsim.records import Broadcast, ClientUpdate, Params
from fedsim.training.kept import RESIDUAL
from fedsim.transforms.transform import Compression
from fedsim.wire import Reading, masked, selection, sparse
from fedsim.wire.quantised import CODINGS

_CPU = torch.device("cpu")


def outgoing(
    compression: Compression | None, broadcast: Broadcast, result: ClientUpdate, state: Params, key: int
) -> ClientUpdate:
    """What a client sends of what it has trained.

    With error feedback ``e <- u + e - decode(encode(u + e))``; the memory e starts at 0, and does so again when the
    model has other shapes than before; it is 0 where the client's masks have nothing.

    Args:
        compression: None: the update goes as it is.
        broadcast: that the client trained from.
        result: of training.
        state: of the client before it trained.
        key: of this client in this round.

    Returns:
        ``result`` with ``coded``: the update as bytes; ``update``: what those bytes are read as; and in its state the
        memory.

    Source: Karimireddy et al. 2019, "Error feedback fixes SignSGD and other gradient compression schemes", ICML,
        algorithm 2 (EF-SGD). Differs: what is compressed is the move of a whole round; its step size is
        already in it.
    """
    if compression is None or broadcast.probe:
        return result
    kept, whole = _kept(broadcast, result.kept), result.update
    if compression.error_feedback:
        whole = p.add(whole, p.masked(_memory(whole, state), kept))
    entries = masked.remaining(p.to(whole, _CPU), p.to(kept, _CPU))
    support = _support(compression, entries, key)
    coded = _encode(compression, entries, support, key)
    read = masked.restored(_decode(compression, coded, entries, support), p.to(kept, _CPU))
    read = {name: tensor.to(whole[name].device) for name, tensor in read.items()}
    lost = {RESIDUAL + name: whole[name] - read[name] for name in read} if compression.error_feedback else {}
    return replace(result, update=read, coded=coded, state=result.state | lost)


def reading(compression: Compression | None, broadcast: Broadcast, key: int) -> Reading | None:
    """How the server reads what :func:`outgoing` has coded; None if it has not.

    Args:
        compression, broadcast: as there.
        key: of the client in this round.
    """
    return None if compression is None or broadcast.probe else partial(_read, compression, broadcast, key)


def _read(compression: Compression, broadcast: Broadcast, key: int, coded: bytes, own: Params) -> Params:
    kept = _kept(broadcast, own)
    like = masked.remaining(broadcast.params, kept)
    support = _support(compression, like, key) if compression.drawn else None
    return masked.restored(_decode(compression, coded, like, support), kept)


def _support(compression: Compression, entries: Params, key: int) -> Params | None:
    """Which entries are sent, bool; None: all. What is drawn looks at nothing but shapes."""
    chosen = compression.selection
    return None if chosen is None else chosen.pick(entries, rng.fold(key, "transform", "select"))


def _encode(compression: Compression, entries: Params, support: Params | None, key: int) -> bytes:
    if support is not None:
        entries = selection.keep(entries, support, unbiased=compression.unbiased)
    known, coding = support if compression.drawn else None, CODINGS[compression.coding]
    return sparse.encode(entries, known=known, coding=coding, key=rng.fold(key, "transform", "code"))


def _decode(compression: Compression, coded: bytes, like: Params, support: Params | None) -> Params:
    known = support if compression.drawn else None
    return sparse.decode(coded, like, known=known, coding=CODINGS[compression.coding])


def _kept(broadcast: Broadcast, own: Params) -> Params:
    """Masks of an update: the client's own, or else the server's."""
    return own or ({} if broadcast.masks is None else broadcast.masks.kept)


def _memory(update: Params, state: Mapping[str, Tensor]) -> Params:
    """What earlier rounds have left: nothing of a client that never took part, or that had a larger model then."""
    had = {name: state[RESIDUAL + name] for name in update if RESIDUAL + name in state}
    if had.keys() != update.keys() or any(had[name].shape != tensor.shape for name, tensor in update.items()):
        return p.zeros_like(update)
    return {name: had[name].to(tensor) for name, tensor in update.items()}
