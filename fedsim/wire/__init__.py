"""What crosses the wire, as bytes: whole messages, and codings that make them shorter."""

from fedsim.wire.messages import (
    Known,
    Reading,
    broadcast_bytes,
    decode_broadcast,
    decode_update,
    encode_broadcast,
    encode_update,
    nothing_known,
    sent_down,
    sent_up,
    update_bytes,
)

__all__ = [
    "Known",
    "Reading",
    "broadcast_bytes",
    "decode_broadcast",
    "decode_update",
    "encode_broadcast",
    "encode_update",
    "nothing_known",
    "sent_down",
    "sent_up",
    "update_bytes",
]
