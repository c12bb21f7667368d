"""The codec between fedsim's records and the content of Flower messages.

Tensors travel as one ``Array`` of bytes, fedsim's own wire format, instead of an ``Array`` per tensor: Flower spends a
fixed time on each. Its ``stype`` is not NumPy's, so code that would average the bytes as numbers fails instead.
What stays on a client, its state, is a record of ordinary arrays in ``context.state``.
"""

import functools
import math
from collections.abc import Iterable

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import array_to_proto, recorddict_to_proto

from fedsim import params as p
from fedsim import wire
from fedsim.engines.flower.arrays import encoded_length
from fedsim.pruning.masks import prunable
from fedsim.records import Broadcast, ClientUpdate, Masks, Params

STYPE = "fedsim.safetensors"
STATE = "fedsim.state"  # name of the record in a client's context.state
_TENSORS, _ORDER = "fedsim.tensors", "fedsim.order"  # names of records
_BLOB = "blob"


def pack_broadcast(broadcast: Broadcast, *, with_masks: bool = True) -> ArrayRecord:
    """What all clients of a round get, encoded once; it may go into any number of contents.

    with_masks: False for clients that know this version of the masks.
    """
    return _pack(wire.encode_broadcast(broadcast, with_masks=with_masks))


def packed_for(broadcast: Broadcast, clients: Iterable[int]) -> dict[int, ArrayRecord]:
    """What each client gets: with the masks if it does not know them, without otherwise."""
    unaware = set(broadcast.unaware)
    make = functools.cache(lambda told: pack_broadcast(broadcast, with_masks=told))
    return {client: make(client in unaware) for client in clients}


def train_content(packed: ArrayRecord, client: int, key: int) -> RecordDict:
    """Content of the message that lets a client train.

    Args:
        packed: from :func:`pack_broadcast`.
        client: its id.
        key: of the client in this round, in [0, 2^64); Flower sends it as uint64 where it needs the 64th bit.
    """
    return RecordDict({_TENSORS: packed, _ORDER: ConfigRecord({"client": client, "key": key})})


def read_train(content: RecordDict, known: wire.Known = wire.nothing_known) -> tuple[Broadcast, int, int]:
    """Broadcast, client and key of :func:`train_content`.

    known: round -> masks that the client had from earlier messages when it began.

    Raises:
        ValueError: not such a content, or it needs masks that the client does not have.
    """
    order = content.get(_ORDER)
    if not isinstance(order, ConfigRecord):
        raise ValueError(f"the message has no config record {_ORDER}")
    client, key = order.get("client"), order.get("key")
    if not isinstance(client, int) or not isinstance(key, int):
        raise ValueError(f"the message's client and key must be integers, got {client!r} and {key!r}")
    return wire.decode_broadcast(_unpack(content), known), client, key


def update_content(update: ClientUpdate, masks: Masks | None = None) -> RecordDict:
    """Content of a client's reply. ``masks``: of the server, which the update keeps to."""
    return RecordDict({_TENSORS: _pack(wire.encode_update(update, masks))})


def read_update(
    content: RecordDict,
    broadcast: Broadcast,
    client: int,
    *,
    tickets: bool = False,
    reading: wire.Reading | None = None,
) -> ClientUpdate:
    """The update in :func:`update_content`, with an empty state.

    Args:
        content: of the reply; whatever another machine sent.
        broadcast: what the client got; the update and the buffers must be like its parameters and buffers.
        client: whose reply it should be.
        tickets: whether clients have masks of their own: it must have them for all weights then, and none otherwise.
        reading: how coded updates are read; None: they must not be coded.

    Raises:
        ValueError: not such a content, or one that does not answer this broadcast to this client.
    """
    update = wire.decode_update(_unpack(content), broadcast.masks, reading, broadcast.params)
    if update.client != client:
        raise ValueError(f"the update is of client {update.client}")
    if update.num_examples < 1:
        raise ValueError(f"num_examples must be >= 1, got {update.num_examples}")
    if "train_loss" not in update.metrics:
        raise ValueError("metrics have no train_loss")
    p.check_alike(update.update, broadcast.params)
    p.check_alike(update.buffers, broadcast.buffers)
    _check_tickets(update.kept, broadcast, wanted=tickets and not broadcast.probe)
    kept = update.kept or ({} if broadcast.masks is None or broadcast.probe else broadcast.masks.kept)
    if wrong := [name for name, mask in kept.items() if bool(update.update[name][~mask].any())]:
        raise ValueError(f"{wrong[0]}: the update has numbers where the masks have none")
    return update


def _check_tickets(found: Params, broadcast: Broadcast, *, wanted: bool) -> None:
    """All clients must have masks for the same weights, or the mean over those who hold an entry means nothing."""
    names = prunable(broadcast.params) if wanted else ()
    if found.keys() != set(names):
        rule = f"must have masks of its own for {', '.join(names)}" if wanted else "must have no masks of its own"
        raise ValueError(f"the update {rule}, got {', '.join(found) or 'none'}")


def state_content(state: Params) -> RecordDict:
    """A client's ``context.state``: copies of the tensors, nothing for an empty state."""
    return RecordDict({STATE: ArrayRecord.from_torch_state_dict(state)} if state else {})


def read_state(content: RecordDict) -> Params:
    """The inverse of :func:`state_content`."""
    arrays = content.get(STATE)
    return dict(arrays.to_torch_state_dict()) if isinstance(arrays, ArrayRecord) else {}


def content_bytes(content: RecordDict) -> int:
    """Size of a content as Flower serialises it to protobuf, without the message's metadata.

    Equal to ``recorddict_to_proto(content).ByteSize()``, which copies the tensors five times over; here their lengths
    are added to the size of the rest.
    """
    return sum(
        _field(_text(name) + _field(_array_record_bytes(record)))
        if isinstance(record, ArrayRecord)
        else int(recorddict_to_proto(RecordDict({name: record})).ByteSize())
        for name, record in content.items()
    )


def _array_record_bytes(record: ArrayRecord) -> int:
    return sum(_field(_text(name) + _field(_array_bytes(array))) for name, array in record.items())


def _array_bytes(array: Array) -> int:
    length = encoded_length(array)
    return _frame_bytes(array.dtype, tuple(array.shape), array.stype) + (_field(length) if length else 0)


@functools.lru_cache(maxsize=4096)
def _frame_bytes(dtype: str, shape: tuple[int, ...], stype: str) -> int:
    return int(array_to_proto(Array(dtype, shape, stype, b"")).ByteSize())


def _text(text: str) -> int:
    return _field(len(text.encode())) if text else 0  # protobuf leaves empty text and bytes out


def _field(length: int) -> int:
    """Size of a protobuf field of so many bytes: a tag of one byte, the length in 7-bit groups, the bytes."""
    return 1 + max(1, math.ceil(length.bit_length() / 7)) + length


def _pack(blob: bytes) -> ArrayRecord:
    return ArrayRecord({_BLOB: Array("uint8", (len(blob),), STYPE, blob)})


def _unpack(content: RecordDict) -> bytes:
    """The blob itself, not a copy."""
    arrays = content.get(_TENSORS)
    array = arrays.get(_BLOB) if isinstance(arrays, ArrayRecord) else None
    if array is None or array.stype != STYPE:
        raise ValueError(f"the message has no array {_TENSORS}/{_BLOB} of type {STYPE}")
    return array.data
