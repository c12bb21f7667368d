"""The secret-shared protocol: products in Z_2^64 by Beaver triples, and where the triples come from.

An exchange has two messages each way: what both open, and the answers. The opened matrices are uniform, the products
exact, so what comes out does not depend on the triples.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedsim.errors import TransferError
from fedsim.transfer import ring, triples
from fedsim.transfer.channel import Channel, facts, of_facts
from fedsim.transfer.fixed import Reals, decode, encode_coefficients, encode_secrets
from fedsim.transfer.multiplication import swap
from fedsim.transfer.ring import Ring
from fedsim.transfer.terms import Plan, Role, Shape
from fedsim.transfer.triples import Batch, Left, Right, left_shape, result_shape


class Triples(Protocol):
    """Where a party's halves of triples come from."""

    def begin(self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch], times: int) -> None:
        """Prepare for so many exchanges of these products."""

    def take(
        self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch]
    ) -> tuple[list[Left], list[Right]]:
        """Halves for one exchange: left ones of the party's own products, right ones of the other's."""

    def end(self) -> None:
        """No more are needed."""


def batches(plan: Plan) -> list[Batch]:
    """The products of a plan by the source that they read."""
    return [
        Batch(tuple(product.shape for product in plan.products if product.source == source))
        for source in range(len(plan.sources))
    ]


class SecretSharing:
    """One party's end."""

    def __init__(self, source: Triples) -> None:
        self._triples = source
        self._offline_s = self._online_s = 0.0
        self._used = 0

    def begin(self, channel: Channel, role: Role, own: Plan, other: Plan, times: int) -> None:
        """See ``Multiplication``."""
        before = time.perf_counter()
        self._triples.begin(channel, role, batches(own), batches(other), times)
        self._offline_s += time.perf_counter() - before

    def exchange(
        self,
        channel: Channel,
        role: Role,
        own: Plan,
        coefficients: Sequence[Reals],
        *,
        other: Plan,
        secrets: Sequence[Reals],
    ) -> list[Reals]:
        """See ``Multiplication``."""
        before = time.perf_counter()
        mine, theirs = batches(own), batches(other)
        lefts, rights = self._triples.take(channel, role, mine, theirs)
        dealt = time.perf_counter()
        x = [encode_coefficients(values) for values in coefficients]
        y = [encode_secrets(values) for values in secrets]
        places = _places(own)
        d = [lefts[source].factor(index) for source, index in places]
        opened = [triples.open_left(one.values, factor) for one, factor in zip(x, d, strict=True)]
        opened += [triples.open_right(one, right.factor()) for one, right in zip(y, rights, strict=True)]
        expected = [left_shape(product.shape) for product in other.products] + [(size,) for size in own.sources]
        received = _read(swap(channel, role, "opened", _written(opened)), expected)
        their_left, their_right = received[: len(other.products)], received[len(other.products) :]

        answers = []
        for opened_left, (source, index) in zip(their_left, _places(other), strict=True):
            secret = y[source].reshape(triples.right_shape(theirs[source].shapes[index]))
            answers.append(triples.answer(opened_left, secret, rights[source].products[index]))
        expected = [result_shape(product.shape) for product in own.products]
        answered = _read(swap(channel, role, "answer", _written(answers)), expected)

        found = []
        for number, (source, index) in enumerate(places):
            opened_right = triples.laid_out(their_right[source], mine[source], index)
            product = triples.finish(answered[number], d[number], opened_right, lefts[source].product(index))
            found.append(decode(product, x[number].fraction))
        self._offline_s += dealt - before
        self._online_s += time.perf_counter() - dealt
        self._used += len(places) + len(answers)
        return found

    def end(self, channel: Channel) -> None:
        """See ``Multiplication``."""
        self._triples.end()

    def describe(self) -> dict[str, object]:
        """Seconds before and while secrets are there, and how many triples this party had half of."""
        return {"offline_seconds": self._offline_s, "online_seconds": self._online_s, "triples": self._used}


def _places(plan: Plan) -> list[tuple[int, int]]:
    """Of each product: its source, and its number among those that read it."""
    seen: dict[int, int] = {}
    found = []
    for product in plan.products:
        index = seen.get(product.source, 0)
        found.append((product.source, index))
        seen[product.source] = index + 1
    return found


def _written(arrays: Sequence[Ring]) -> bytes:
    return b"".join(ring.to_bytes(one) for one in arrays)


def _read(payload: bytes, shapes: Sequence[tuple[int, ...]]) -> list[Ring]:
    """Arrays one after the other.

    Raises:
        TransferError: the payload is of another size.
    """
    sizes = [8 * math.prod(shape) for shape in shapes]
    if len(payload) != sum(sizes):
        raise TransferError(f"a message of {len(payload)} bytes where {sum(sizes)} were expected")
    found, at = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        found.append(ring.from_bytes(payload[at : at + size], shape))
        at += size
    return found


# ---------------------------------------------------------------- triples from a helper


class Helped:
    """Triples that a third party deals, over a channel of the party's own to it."""

    def __init__(self, helper: Channel) -> None:
        self._helper = helper

    def begin(self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch], times: int) -> None:
        """They are dealt when asked for: a whole run's would be a few kilobytes more in one message."""

    def take(
        self, channel: Channel, role: Role, own: Sequence[Batch], other: Sequence[Batch]
    ) -> tuple[list[Left], list[Right]]:
        """See ``Triples``."""
        self._helper.send("factor", of_facts({"own": _shapes(own), "other": _shapes(other)}))
        sizes = [ring.SEED_BYTES for _ in own] + [ring.SEED_BYTES + _result_bytes(batch) for batch in other]
        payload = self._helper.receive("factor")
        if len(payload) != sum(sizes):
            raise TransferError(f"{self._helper.peer} sent {len(payload)} bytes where {sum(sizes)} were expected")
        parts, at = [], 0
        for size in sizes:
            parts.append(payload[at : at + size])
            at += size
        lefts = [Left(batch, seed) for batch, seed in zip(own, parts, strict=False)]
        rights = []
        for batch, part in zip(other, parts[len(own) :], strict=True):
            products = _read(part[ring.SEED_BYTES :], [result_shape(shape) for shape in batch.shapes])
            rights.append(Right(batch, part[: ring.SEED_BYTES], tuple(products)))
        return lefts, rights

    def end(self) -> None:
        """Let the helper go."""
        self._helper.send("factor", of_facts({"over": True}))


def help_both(a: Channel, b: Channel) -> int:
    """Be the helper: deal what both ask for, until both say that it is enough.

    Returns:
        How often it has dealt.

    Raises:
        TransferError: they ask for different things, or one is gone.
    """
    dealt = 0
    try:
        while True:
            asked = [facts(channel.receive("factor")) for channel in (a, b)]
            if all(one == {"over": True} for one in asked):
                return dealt
            for_a, for_b = _dealt(*(_asked(one) for one in asked))
            a.send("factor", for_a)
            b.send("factor", for_b)
            dealt += 1
    except BaseException as error:
        for channel in (a, b):
            channel.abort(str(error) if isinstance(error, TransferError) else type(error).__name__)
        raise


_Batches = list[Batch]


def _dealt(a: tuple[_Batches, _Batches], b: tuple[_Batches, _Batches]) -> tuple[bytes, bytes]:
    if a[0] != b[1] or a[1] != b[0]:
        raise TransferError("the parties ask for triples of different products")
    lefts: list[list[bytes]] = [[], []]
    rights: list[list[bytes]] = [[], []]
    for owner, wanted in enumerate((a[0], b[0])):
        for batch in wanted:
            left, right = triples.deal(batch)
            lefts[owner].append(left.seed)
            rights[1 - owner].append(right.seed + _written(right.products))
    return b"".join(lefts[0] + rights[0]), b"".join(lefts[1] + rights[1])


def _asked(found: Mapping[str, Any]) -> tuple[_Batches, _Batches]:
    if "over" in found:
        raise TransferError("one party has finished, the other asks for more triples")
    try:
        own, other = ([Batch(tuple(Shape(*shape) for shape in one)) for one in found[key]] for key in ("own", "other"))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise TransferError(f"a party asks for triples of no shape ({error})") from error
    return own, other


def _shapes(asked: Sequence[Batch]) -> list[list[list[int]]]:
    return [[list(shape) for shape in batch.shapes] for batch in asked]


def _result_bytes(batch: Batch) -> int:
    return sum(8 * math.prod(result_shape(shape)) for shape in batch.shapes)
