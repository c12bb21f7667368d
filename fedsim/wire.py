"""What crosses the wire, as bytes: the dense codec.

A message is one safetensors blob: tensors under ``group/name`` and a few exact numbers as metadata. Every engine sends
or counts these bytes; an engine that wraps them in an envelope of its own (Flower's: about 130 bytes) counts that too.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch

from fedsim.params import separate
from fedsim.records import Broadcast, ClientUpdate, Params


def encode_broadcast(broadcast: Broadcast) -> bytes:
    """Server to client: parameters, buffers, what the server rule adds, and the round."""
    groups = {"params": broadcast.params, "buffers": broadcast.buffers, "extra": broadcast.extra}
    return _pack(groups, {"round": broadcast.round})


def decode_broadcast(data: bytes) -> Broadcast:
    """The inverse of :func:`encode_broadcast`.

    Raises:
        ValueError: not such a message.
    """
    with _refusing("broadcast"):
        groups, facts = _unpack(data, ("params", "buffers", "extra"))
        return Broadcast(groups["params"], groups["buffers"], groups["extra"], int(facts["round"]))


def encode_update(update: ClientUpdate) -> bytes:
    """Client to server: the update, the client's buffers, its number of examples and its metrics.

    The client's state is not in it: it stays with the client.
    """
    groups = {"update": update.update, "buffers": update.buffers}
    return _pack(
        groups, {"client": update.client, "num_examples": update.num_examples, "metrics": dict(update.metrics)}
    )


def decode_update(data: bytes) -> ClientUpdate:
    """The inverse of :func:`encode_update`, with an empty state.

    Raises:
        ValueError: not such a message.
    """
    with _refusing("update"):
        groups, facts = _unpack(data, ("update", "buffers"))
        metrics = {str(name): float(value) for name, value in facts["metrics"].items()}
        client, num_examples = int(facts["client"]), int(facts["num_examples"])
    return ClientUpdate(client, groups["update"], groups["buffers"], num_examples, metrics, {})


def _pack(groups: Mapping[str, Params], facts: Mapping[str, Any]) -> bytes:
    tensors = {f"{group}/{name}": separate(t) for group, own in groups.items() for name, t in own.items()}
    # safetensors sorts, but the order of parameters must survive the trip: aggregators and optimizers keep it
    return safetensors.torch.save(tensors, metadata={"facts": json.dumps(facts), "order": json.dumps(list(tensors))})


def _unpack(data: bytes, groups: tuple[str, ...]) -> tuple[dict[str, Params], dict[str, Any]]:
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # checked by the load above
    facts, order = (json.loads(header["__metadata__"][part]) for part in ("facts", "order"))
    by_group: dict[str, Params] = {group: {} for group in groups}
    for full in order:
        group, _, name = full.partition("/")
        by_group[group][name] = tensors.pop(full)
    if tensors:
        raise KeyError(next(iter(tensors)))
    return by_group, facts


@contextlib.contextmanager
def _refusing(kind: str) -> Iterator[None]:
    """Whatever bytes from outside trip over while they are read becomes one kind of error.

    ArithmeticError is a round of 1e999, RuntimeError a shape whose strides overflow or text nested too deep.
    """
    try:
        yield
    except (
        safetensors.SafetensorError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise ValueError(f"not a fedsim message ({kind}): {error}") from error
