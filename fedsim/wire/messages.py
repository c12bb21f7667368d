"""What crosses the wire, as bytes: whole messages.

A message is one safetensors blob: tensors under ``group/name``, numbers among them, so that all messages of one
structure have one length. Every engine sends or counts these bytes; an engine that wraps them in an envelope of its own
(Flower's: about 130 bytes) counts that too.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedsim.params import separate
from fedsim.records import Broadcast, ClientUpdate, Masks, Params
from fedsim.wire import masked

_NUMBERS = "numbers"  # the group of what is no parameter: int64 tensors, and float64 metrics
Known = Callable[[int], Masks | None]
Reading = Callable[[bytes, Params], Params]  # (an update as coded, the client's own masks) -> update
_Structure = tuple[tuple[str, torch.Size, torch.dtype], ...]


def nothing_known(round: int) -> Masks | None:
    """Of a client that has no masks."""
    return None


def encode_broadcast(broadcast: Broadcast, *, with_masks: bool = True) -> bytes:
    """Server to client: parameters, buffers, what the server rule adds, the round, and masks if there are any.

    with_masks: False for a client that knows this version of the masks; its number is sent anyway. Of pruned
        parameters only the values that remain are sent.
    """
    masks, numbers = broadcast.masks, {"round": torch.tensor(broadcast.round)}
    kept = {} if masks is None else masks.kept
    groups = {
        "params": masked.remaining(broadcast.params, kept),
        "buffers": broadcast.buffers,
        "extra": broadcast.extra,
    }
    if broadcast.probe:
        numbers["probe"] = torch.tensor(1)
    if masks is None:
        return _pack({**groups, _NUMBERS: numbers}, ())
    numbers["mask_version"] = torch.tensor(masks.version)
    if not with_masks:
        return _pack({**groups, _NUMBERS: numbers}, ())
    return _pack({**groups, "masks": masked.bits(kept), _NUMBERS: numbers}, (), _shapes(kept))


def decode_broadcast(data: bytes, known: Known = nothing_known) -> Broadcast:
    """The inverse of :func:`encode_broadcast`.

    known: round -> masks that the client had when it began, for a message that does not repeat them.

    Raises:
        ValueError: not such a message, or one for clients that know other masks.
    """
    with _refusing("broadcast"):
        groups, _, shapes = _unpack(data, ("params", "buffers", "extra", "masks", _NUMBERS))
        numbers = groups[_NUMBERS]
        masks, round = None, _whole(numbers["round"])
        if "mask_version" in numbers:
            version = _whole(numbers["mask_version"])
            masks = Masks(masked.from_bits(groups["masks"], shapes), version) if shapes else known(round)
            if masks is None or masks.version != version:
                has = "none" if masks is None else f"version {masks.version}"
                raise ValueError(f"needs masks of version {version}, this client has {has}")
        kept = {} if masks is None else masks.kept
        params = masked.restored(groups["params"], kept)
        return Broadcast(params, groups["buffers"], groups["extra"], round, masks, probe="probe" in numbers)


def encode_update(update: ClientUpdate, masks: Masks | None = None) -> bytes:
    """Client to server: the update, the client's buffers, its number of examples and its metrics.

    The client's state is not in it: it stays with the client. Of an update that was coded only those bytes are sent.

    masks: of the server, which the update keeps to; a probe's answer does not. A client's own masks are sent with it.
    """
    numbers = {
        "client": torch.tensor(update.client),
        "num_examples": torch.tensor(update.num_examples),
        "metrics": torch.tensor(list(update.metrics.values()), dtype=torch.float64),
    }
    if update.mask_version:
        numbers["mask_version"] = torch.tensor(update.mask_version)
    kept = update.kept or ({} if masks is None else masks.kept)
    groups = {"update": {} if update.coded else masked.remaining(update.update, kept), "buffers": update.buffers}
    if update.coded:
        groups["coded"] = {"update": torch.frombuffer(bytearray(update.coded), dtype=torch.uint8)}
    if update.kept:
        groups["kept"] = masked.bits(update.kept)
    return _pack({**groups, _NUMBERS: numbers}, tuple(update.metrics), _shapes(update.kept))


def decode_update(
    data: bytes, masks: Masks | None = None, reading: Reading | None = None, like: Params | None = None
) -> ClientUpdate:
    """The inverse of :func:`encode_update`, with an empty state.

    masks: of the server.
    reading: how coded updates are read; None: they must not be coded. It raises a ValueError for what it cannot read.
    like: what the client was sent; masks of its own must have these shapes, so that bits of a stranger, each of which
        becomes a whole number, never become more than that. None: any shapes.

    Raises:
        ValueError: not such a message, one of a client that trained with another version of the masks, or masks of
            other shapes.
    """
    with _refusing("update"):
        groups, names, shapes = _unpack(data, ("update", "coded", "buffers", "kept", _NUMBERS))
        numbers = groups[_NUMBERS]
        values = numbers["metrics"]
        if values.dtype != torch.float64 or values.ndim != 1:
            raise TypeError(f"metrics must be a float64 vector, got {values.dtype} of shape {tuple(values.shape)}")
        metrics = dict(zip(names, values.tolist(), strict=True))
        client, num_examples = _whole(numbers["client"]), _whole(numbers["num_examples"])
        version = _whole(numbers["mask_version"]) if "mask_version" in numbers else 0
        if version != (0 if masks is None else masks.version):
            raise ValueError(
                f"trained with version {version} of the masks, the server's is {0 if masks is None else masks.version}"
            )
        if like is not None:
            _check_shapes(shapes, like)
        own = masked.from_bits(groups["kept"], shapes)
        kept = own or ({} if masks is None else masks.kept)
        moved = masked.restored(groups["update"], kept) if reading is None else reading(_coded(groups), own)
        if reading is None and groups["coded"]:
            raise ValueError("the update is coded, which was not agreed on")
    return ClientUpdate(client, moved, groups["buffers"], num_examples, metrics, {}, version, own)


def _check_shapes(shapes: Mapping[str, Sequence[int]], like: Params) -> None:
    for name, shape in shapes.items():
        expected = list(like[name].shape) if name in like else None
        if shape != expected:
            raise ValueError(f"{name}: its mask must have the shape {expected}, got {shape!r:.100}")


def _coded(groups: Mapping[str, Params]) -> bytes:
    found = groups["coded"].get("update")
    if found is None or groups["update"] or found.dtype != torch.uint8 or found.ndim != 1:
        raise ValueError("the update must be coded: one vector of bytes, and nothing else")
    return found.numpy().tobytes()


def update_bytes(
    update: Params, buffers: Params, metrics: Sequence[str], *, masks: Masks | None = None, kept: Params | None = None
) -> int:
    """Length of :func:`encode_update` for any client whose result has this structure, without encoding it.

    Args:
        update, buffers: tensors of one client; only names, shapes and dtypes count.
        metrics: their names.
        masks: of the server. kept: the client's own, which take their place.
    """
    sent = _remaining_structure(update, kept or ({} if masks is None else masks.kept))
    groups = [("update", sent), ("buffers", _structure(buffers))]
    if kept:
        groups.append(("kept", _bits_structure(kept)))
    facts = _Facts(tuple(metrics), masks is not None, False, _frozen(_shapes(kept or {})))
    return _length(tuple(groups), facts)


def sent_up(update: ClientUpdate, broadcast: Broadcast) -> int:
    """Bytes of a client's answer to this broadcast."""
    if broadcast.probe:  # whose answer is dense
        return len(encode_update(update))
    if update.coded:  # of a length that the structure does not tell
        return len(encode_update(update, broadcast.masks))
    return update_bytes(update.update, update.buffers, tuple(update.metrics), masks=broadcast.masks, kept=update.kept)


def broadcast_bytes(broadcast: Broadcast, *, with_masks: bool = True) -> int:
    """Length of :func:`encode_broadcast`, without encoding it."""
    kept = {} if broadcast.masks is None else broadcast.masks.kept
    groups = [
        ("params", _remaining_structure(broadcast.params, kept)),
        ("buffers", _structure(broadcast.buffers)),
        ("extra", _structure(broadcast.extra)),
    ]
    shapes = _frozen(_shapes(kept)) if with_masks else ()
    if shapes:
        groups.append(("masks", _bits_structure(kept)))
    return _length(tuple(groups), _Facts(None, broadcast.masks is not None, broadcast.probe, shapes))


def sent_down(broadcast: Broadcast, clients: Sequence[int]) -> int:
    """Bytes that these clients are sent; masks go only to those that do not know them."""
    told = len(set(broadcast.unaware) & set(clients))
    silent = len(clients) - told
    return told * broadcast_bytes(broadcast) + silent * broadcast_bytes(broadcast, with_masks=False)


def _structure(tensors: Params) -> _Structure:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


def _remaining_structure(tensors: Params, kept: Mapping[str, Tensor]) -> _Structure:
    return tuple(
        (name, torch.Size([int(kept[name].sum())]) if name in kept else tensor.shape, tensor.dtype)
        for name, tensor in tensors.items()
    )


def _bits_structure(kept: Mapping[str, Tensor]) -> _Structure:
    return tuple((name, torch.Size([-(-mask.numel() // 8)]), torch.uint8) for name, mask in kept.items())


class _Facts(NamedTuple):
    """What the length of a message depends on beside its tensors; ``metrics`` None: a broadcast."""

    metrics: tuple[str, ...] | None
    versioned: bool
    probe: bool
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


@lru_cache(maxsize=64)
def _length(structures: tuple[tuple[str, _Structure], ...], facts: _Facts) -> int:
    """Packs such a message once, of zeros."""
    groups = {g: {n: torch.zeros(shape, dtype=dtype) for n, shape, dtype in own} for g, own in structures}
    names = ("round", "probe") if facts.probe else ("round",)
    if facts.metrics is not None:
        names = ("client", "num_examples")
        groups[_NUMBERS] = {"metrics": torch.zeros(len(facts.metrics), dtype=torch.float64)}
    numbers = groups.setdefault(_NUMBERS, {})
    numbers.update({name: torch.tensor(0) for name in (*names, *(("mask_version",) if facts.versioned else ()))})
    return len(_pack(groups, facts.metrics or (), {name: list(shape) for name, shape in facts.shapes}))


def _shapes(kept: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(mask.shape) for name, mask in kept.items()}


def _frozen(shapes: Mapping[str, Sequence[int]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(shape)) for name, shape in shapes.items())


def _pack(
    groups: Mapping[str, Params], metrics: tuple[str, ...], shapes: Mapping[str, Sequence[int]] | None = None
) -> bytes:
    tensors = {f"{group}/{name}": separate(t) for group, own in groups.items() for name, t in own.items()}
    # safetensors sorts, but the order of parameters must survive the trip: aggregators and optimizers keep it
    names = {"order": json.dumps(list(tensors)), "metrics": json.dumps(metrics)}
    return safetensors.torch.save(tensors, metadata=names | ({"shapes": json.dumps(shapes)} if shapes else {}))


def _unpack(data: bytes, groups: tuple[str, ...]) -> tuple[dict[str, Params], tuple[str, ...], dict[str, list[int]]]:
    """Tensors by group, the names of the metrics, and the shapes of masks."""
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # checked by the load above
    order, metrics = (json.loads(header["__metadata__"][part]) for part in ("order", "metrics"))
    shapes = json.loads(header["__metadata__"].get("shapes", "{}"))
    by_group: dict[str, Params] = {group: {} for group in groups}
    for full in order:
        group, _, name = full.partition("/")
        by_group[group][name] = tensors.pop(full)
    if tensors:
        raise KeyError(next(iter(tensors)))
    if not isinstance(metrics, list) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(f"names of metrics must be a list of texts, got {metrics!r:.100}")
    if len(set(metrics)) < len(metrics):
        raise ValueError(f"a metric is named twice: {metrics!r:.100}")
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise TypeError(f"shapes of masks must be lists by name, got {shapes!r:.100}")
    return by_group, tuple(metrics), shapes


def _whole(number: torch.Tensor) -> int:
    if number.dtype != torch.int64 or number.shape != ():
        raise TypeError(f"must be one int64, got {number.dtype} of shape {tuple(number.shape)}")
    return int(number)


@contextlib.contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """Whatever bytes from outside trip over while they are read becomes one kind of error.

    RuntimeError is a shape whose strides overflow, or text nested too deep.
    """
    try:
        yield
    except (safetensors.SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"not a fedsim message ({kind}): {error}") from error
