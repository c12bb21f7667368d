"""What crosses the wire, as bytes: the dense codec.

A message is one safetensors blob: tensors under ``group/name``, numbers among them, so that all messages of one
structure have one length. Every engine sends or counts these bytes; an engine that wraps them in an envelope of its own
(Flower's: about 130 bytes) counts that too.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import safetensors
import safetensors.torch
import torch

from fedsim.params import separate
from fedsim.records import Broadcast, ClientUpdate, Params

_NUMBERS = "numbers"  # the group of what is no parameter: int64 tensors, and float64 metrics
_Structure = tuple[tuple[str, torch.Size, torch.dtype], ...]


def encode_broadcast(broadcast: Broadcast) -> bytes:
    """Server to client: parameters, buffers, what the server rule adds, and the round."""
    groups = {"params": broadcast.params, "buffers": broadcast.buffers, "extra": broadcast.extra}
    return _pack({**groups, _NUMBERS: {"round": torch.tensor(broadcast.round)}}, ())


def decode_broadcast(data: bytes) -> Broadcast:
    """The inverse of :func:`encode_broadcast`.

    Raises:
        ValueError: not such a message.
    """
    with _refusing("broadcast"):
        groups, _ = _unpack(data, ("params", "buffers", "extra", _NUMBERS))
        return Broadcast(groups["params"], groups["buffers"], groups["extra"], _whole(groups[_NUMBERS]["round"]))


def encode_update(update: ClientUpdate) -> bytes:
    """Client to server: the update, the client's buffers, its number of examples and its metrics.

    The client's state is not in it: it stays with the client.
    """
    numbers = {
        "client": torch.tensor(update.client),
        "num_examples": torch.tensor(update.num_examples),
        "metrics": torch.tensor(list(update.metrics.values()), dtype=torch.float64),
    }
    return _pack({"update": update.update, "buffers": update.buffers, _NUMBERS: numbers}, tuple(update.metrics))


def decode_update(data: bytes) -> ClientUpdate:
    """The inverse of :func:`encode_update`, with an empty state.

    Raises:
        ValueError: not such a message.
    """
    with _refusing("update"):
        groups, names = _unpack(data, ("update", "buffers", _NUMBERS))
        numbers = groups[_NUMBERS]
        values = numbers["metrics"]
        if values.dtype != torch.float64 or values.ndim != 1:
            raise TypeError(f"metrics must be a float64 vector, got {values.dtype} of shape {tuple(values.shape)}")
        metrics = dict(zip(names, values.tolist(), strict=True))
        client, num_examples = _whole(numbers["client"]), _whole(numbers["num_examples"])
    return ClientUpdate(client, groups["update"], groups["buffers"], num_examples, metrics, {})


def update_bytes(update: Params, buffers: Params, metrics: Sequence[str]) -> int:
    """Length of :func:`encode_update` for any client whose result has this structure, without encoding it.

    Args:
        update, buffers: tensors of one client; only names, shapes and dtypes count.
        metrics: their names.
    """
    return _length((("update", _structure(update)), ("buffers", _structure(buffers))), tuple(metrics))


def broadcast_bytes(broadcast: Broadcast) -> int:
    """Length of :func:`encode_broadcast`, without encoding it."""
    groups = (("params", broadcast.params), ("buffers", broadcast.buffers), ("extra", broadcast.extra))
    return _length(tuple((group, _structure(own)) for group, own in groups), None)


def _structure(tensors: Params) -> _Structure:
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())


@lru_cache(maxsize=64)
def _length(structures: tuple[tuple[str, _Structure], ...], metrics: tuple[str, ...] | None) -> int:
    """Encodes such a message once; ``metrics`` None: a broadcast."""
    groups = {g: {n: torch.zeros(shape, dtype=dtype) for n, shape, dtype in own} for g, own in structures}
    if metrics is None:
        return len(encode_broadcast(Broadcast(**groups, round=0)))
    return len(encode_update(ClientUpdate(0, **groups, num_examples=0, metrics=dict.fromkeys(metrics, 0.0), state={})))


def _pack(groups: Mapping[str, Params], metrics: tuple[str, ...]) -> bytes:
    tensors = {f"{group}/{name}": separate(t) for group, own in groups.items() for name, t in own.items()}
    # safetensors sorts, but the order of parameters must survive the trip: aggregators and optimizers keep it
    names = {"order": json.dumps(list(tensors)), "metrics": json.dumps(metrics)}
    return safetensors.torch.save(tensors, metadata=names)


def _unpack(data: bytes, groups: tuple[str, ...]) -> tuple[dict[str, Params], tuple[str, ...]]:
    """Tensors by group, and the names of the metrics."""
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # checked by the load above
    order, metrics = (json.loads(header["__metadata__"][part]) for part in ("order", "metrics"))
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
    return by_group, tuple(metrics)


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
