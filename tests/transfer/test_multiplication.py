"""The end that multiplies in the clear, and whose turn it is."""

import threading

import numpy as np
import pytest

from fedsim.errors import TransferError
from fedsim.transfer.channel import Channel
from fedsim.transfer.links import pair
from fedsim.transfer.multiplication import Clear, swap
from fedsim.transfer.terms import Plan, Product, Shape


def at_both(*work):
    """Call both, each with its own channel in its own thread; what they return, or raise."""
    found, ends = [None, None], pair()

    def act(number):
        channel = Channel(ends[number], "ba"[number], timeout_s=5)
        try:
            found[number] = work[number](channel)
        except TransferError as error:
            found[number] = error
            channel.close()

    threads = [threading.Thread(target=act, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_each_gets_what_the_other_says():
    assert at_both(lambda c: swap(c, "a", "loss", b"one"), lambda c: swap(c, "b", "loss", b"two")) == [b"two", b"one"]


def test_products_are_those_of_loops_and_sources_are_read_as_each_product_wants():
    draw = np.random.default_rng(5)
    own = Plan((12, 6), (Product(0, Shape(2, 3, 2, 3)), Product(1, Shape(1, 1, 6, 1)), Product(0, Shape(1, 2, 4, 3))),
               0, 0, False)  # fmt: skip
    other = Plan((5,), (Product(0, Shape(1, 1, 5, 1)),), 0, 0, False)
    mine = [draw.normal(size=product.shape[:3]) for product in own.products]
    theirs = [draw.normal(size=product.shape[:3]) for product in other.products]
    for_me, for_them = [draw.normal(size=12), draw.normal(size=6)], [draw.normal(size=5)]
    found, at_other = at_both(
        lambda c: Clear().exchange(c, "a", own, mine, other=other, secrets=for_them),
        lambda c: Clear().exchange(c, "b", other, theirs, other=own, secrets=for_me),
    )
    for product, values, result in zip(own.products, mine, found, strict=True):
        batches, height, terms, columns = product.shape
        assert result.shape == (batches, height, columns)
        for b in range(batches):
            for r in range(height):
                for s in range(columns):
                    at = [(b * terms + t) * columns + s for t in range(terms)]
                    expected = sum(values[b, r, t] * for_me[product.source][at[t]] for t in range(terms))
                    assert result[b, r, s] == pytest.approx(expected)
    assert at_other[0].item() == pytest.approx(float(theirs[0].ravel() @ for_them[0]))


def test_secrets_of_another_size_are_refused():
    own = Plan((4,), (Product(0, Shape(1, 1, 4, 1)),), 0, 0, False)
    nothing = Plan((), (), 0, 0, True)
    found = at_both(
        lambda c: Clear().exchange(c, "a", own, [np.ones((1, 1, 4))], other=nothing, secrets=[]),
        lambda c: Clear().exchange(c, "b", nothing, [], other=own, secrets=[np.ones(3)]),
    )
    assert "24 bytes where 32 were expected" in str(found[0])
