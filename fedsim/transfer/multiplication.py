"""How two parties multiply what one has by what the other has: the one thing in which the protocols differ."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fedsim.transfer.channel import Channel, array, of_array
from fedsim.transfer.fixed import Reals
from fedsim.transfer.terms import Plan, Role


class Multiplication(Protocol):
    """One party's end of the products. Both parties call the same methods at the same time."""

    def begin(self, channel: Channel, role: Role, own: Plan, other: Plan, times: int) -> None:
        """Agree on keys, and do what can be done before there are secrets to multiply.

        own, other: what either party will learn in each of so many exchanges.
        """

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
        """Multiply both ways.

        Args:
            channel: to the other party.
            role: of this party; a sends first.
            own: what this party learns. coefficients: (batches, rows, terms) of each of its products.
            other: what the other party learns. secrets: the arrays that its plan asks for.

        Returns:
            (batches, rows, columns) of each product of this party's plan.

        Raises:
            TransferError: a value does not fit its place, or the other party is gone or sends something else.
        """

    def end(self, channel: Channel) -> None:
        """Nothing will be multiplied any more."""

    def describe(self) -> dict[str, object]:
        """What it has counted: numbers of ciphertexts, seconds."""


def swap(channel: Channel, role: Role, kind: str, payload: bytes) -> bytes:
    """Send a message and receive one of the same kind; party a sends first, so that neither waits for ever."""
    if role == "a":
        channel.send(kind, payload)
        return channel.receive(kind)
    received = channel.receive(kind)
    channel.send(kind, payload)
    return received


class Clear:
    """Everything in the clear: the twin that the others are compared with. It hides nothing."""

    def begin(self, channel: Channel, role: Role, own: Plan, other: Plan, times: int) -> None:
        """There is nothing to prepare."""

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
        given = np.concatenate([np.ravel(one) for one in secrets]) if secrets else np.zeros(0)
        received = array(swap(channel, role, "secrets", of_array(given)), np.float64, (sum(own.sources),))
        sources = np.split(received, np.cumsum(own.sources)[:-1])
        found = []
        for product, own_values in zip(own.products, coefficients, strict=True):
            batches, _, terms, columns = product.shape
            found.append(own_values @ sources[product.source].reshape(batches, terms, columns))
        return found

    def end(self, channel: Channel) -> None:
        """There is nobody to tell."""

    def describe(self) -> dict[str, object]:
        """Nothing was counted."""
        return {}
