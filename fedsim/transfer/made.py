"""Triples that the two parties make without a helper, from Paillier, before there are secrets to multiply."""

from collections import deque
from collections.abc import Sequence

from fedsim.errors import TransferError
from fedsim.transfer import offline, ring
from fedsim.transfer.channel import Channel
from fedsim.transfer.multiplication import swap
from fedsim.transfer.paillier import PrivateKey, PublicKey, generate
from fedsim.transfer.pool import Pool
from fedsim.transfer.terms import Role
from fedsim.transfer.triples import Batch, Left, Right

_LENGTH = 8  # bytes of a part's length


class Made:
    """One party's end: for its own products it draws D and multiplies, for the other's it draws and encrypts E."""

    def __init__(self, bits: int, *, insecure: bool, pool: Pool) -> None:
        """An end with a new key, made when it begins; arguments as for ``encrypted.Paillier``."""
        self._bits, self._insecure, self._pool = bits, insecure, pool
        self._keys: tuple[PrivateKey, PublicKey] | None = None
        self._asked: tuple[list[Batch], list[Batch]] = ([], [])
        self._waiting: deque[tuple[list[Left], list[Right]]] = deque()

    def begin(self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch], times: int) -> None:
        """See ``Triples``."""
        mine = generate(self._bits, insecure=self._insecure)
        theirs = PublicKey.from_bytes(swap(channel, role, "key", mine.public.to_bytes()), self._bits)
        self._keys, self._asked = (mine, theirs), (list(own), list(other))
        for _ in range(times):
            self._waiting.append(self._made(channel, role, own, other))

    def take(
        self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch]
    ) -> tuple[list[Left], list[Right]]:
        """See ``Triples``; those of other products than were prepared for are made now."""
        if self._waiting and (list(own), list(other)) == self._asked:
            return self._waiting.popleft()
        return self._made(channel, role, own, other)

    def end(self) -> None:
        """Forget what is left, and the key."""
        self._waiting.clear()
        self._keys = None

    def _made(
        self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch]
    ) -> tuple[list[Left], list[Right]]:
        assert self._keys is not None
        key, theirs = self._keys
        lefts = [Left(batch, ring.random_seed()) for batch in own]
        rights = [Right(batch, ring.random_seed(), ()) for batch in other]
        requests = [offline.encrypted_factor(key, right, pool=self._pool) for right in rights]
        asked = _split(swap(channel, role, "factor", _joined(requests)), len(lefts))
        answers = [
            offline.multiplied(theirs, left, request, pool=self._pool)
            for left, request in zip(lefts, asked, strict=True)
        ]
        answered = _split(swap(channel, role, "factor", _joined(answers)), len(rights))
        opened = [
            offline.opened(key, right, answer, pool=self._pool) for right, answer in zip(rights, answered, strict=True)
        ]
        return lefts, opened


def _joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(_LENGTH, "little") + part for part in parts)


def _split(payload: bytes, count: int) -> list[bytes]:
    """The parts of :func:`_joined`.

    Raises:
        TransferError: there are not so many.
    """
    found: list[bytes] = []
    at = 0
    while at < len(payload) and len(found) < count:
        size = int.from_bytes(payload[at : at + _LENGTH], "little")
        found.append(payload[at + _LENGTH : at + _LENGTH + size])
        at += _LENGTH + size
    if at != len(payload) or len(found) != count:
        raise TransferError(f"a message whose {count} parts have other lengths than it says")
    return found
