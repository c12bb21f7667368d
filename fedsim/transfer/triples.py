"""Matrix Beaver triples for a product whose two factors belong to two parties: X @ Y, with X here and Y there.

``left`` is the party with the coefficients X, which alone learns X @ Y; ``right`` has the secrets Y. Beforehand left
gets uniform matrices D and F_left, right gets E and F_right, with ``F_left + F_right = D @ E`` in Z_2^64. Then

1. left sends ``X - D``, right sends ``Y - E``: each uniform, whatever X and Y are;
2. right sends ``(X - D) @ Y + F_right``; left adds ``D @ (Y - E) + F_left``, and the sum is ``X @ Y``.

What right sends in the second step is ``X @ Y - D @ (Y - E) - F_left``, which left could calculate from X @ Y and
numbers that it has: it learns nothing else. Right learns nothing. (Uniform means: as far as AES is, see
``ring.expand``.) Both must follow the protocol, and **a triple is used once**: two openings with one D or E give away
the difference of two secrets. The parties need private channels to a dealer, or make the triples themselves
(``offline.py``).

Several products may read one Y in different layouts. They share E, and ``Y - E`` is sent once; each has its own D, F.

Source: Beaver 1991, "Efficient Multiparty Protocols Using Circuit Randomization"; matrices as in Liu et al. 2018,
arXiv:1812.03337, section 5. Differs: there X, Y, D and E are all shared by both parties, and a product needs two such
multiplications for its cross terms; here one party knows each factor whole, so half of the messages go.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedsim.transfer import ring
from fedsim.transfer.fixed import Integers
from fedsim.transfer.ring import Ring

if TYPE_CHECKING:
    from fedsim.transfer.terms import Shape  # imports torch, which processes that only multiply should not wait for


@dataclass(frozen=True)
class Batch:
    """Products of one Y: each reads it, in C order, as (batches, terms, columns) of its shape.

    Raises:
        ValueError: there is none, a size is below 1, or they do not read equally many elements.
    """

    shapes: "tuple[Shape, ...]"

    def __post_init__(self) -> None:
        for shape in self.shapes:
            if len(shape) != 4 or any(type(size) is not int or size < 1 for size in shape):
                raise ValueError(f"a shape must be four positive integers, got {tuple(shape)}")
        if len({math.prod(right_shape(shape)) for shape in self.shapes}) != 1:
            raise ValueError(f"shapes of a batch must read equally many elements, got {[*map(tuple, self.shapes)]}")

    @property
    def size(self) -> int:
        """Number of elements of Y."""
        return math.prod(right_shape(self.shapes[0]))


@dataclass(frozen=True)
class Left:
    """What the owner of the coefficients keeps for one batch: 32 bytes."""

    batch: Batch
    seed: bytes = field(repr=False)

    def factor(self, index: int) -> Ring:
        """D of a product: (batches, rows, terms)."""
        return ring.expand(self.seed, f"D {index}", left_shape(self.batch.shapes[index]))

    def product(self, index: int) -> Ring:
        """F_left of a product: (batches, rows, columns)."""
        return ring.expand(self.seed, f"F {index}", result_shape(self.batch.shapes[index]))


@dataclass(frozen=True)
class Right:
    """What the owner of the secrets keeps for one batch: 32 bytes, and as many numbers as the results have.

    products: F_right of each product.
    """

    batch: Batch
    seed: bytes = field(repr=False)
    products: tuple[Ring, ...] = field(repr=False)

    def factor(self) -> Ring:
        """E: (size,)."""
        return ring.expand(self.seed, "E", (self.batch.size,))


def left_shape(shape: "Shape") -> tuple[int, int, int]:
    """Of coefficients."""
    return shape.batches, shape.rows, shape.terms


def right_shape(shape: "Shape") -> tuple[int, int, int]:
    """Of secrets as the product reads them."""
    return shape.batches, shape.terms, shape.columns


def result_shape(shape: "Shape") -> tuple[int, int, int]:
    """Of the product."""
    return shape.batches, shape.rows, shape.columns


def deal(batch: Batch) -> tuple[Left, Right]:
    """A dealer's work, for one use: left gets one seed, right another and its part of D @ E.

    The dealer sees only random matrices, but it must not side with a party: it could open what that party receives.

    Source: Liu et al. 2018, arXiv:1812.03337, section 5. Differs: there a third party multiplies halves of numbers that
    the parties drew, and hands out shares of the result, so that it does not know the triple; here it draws the triple
    itself, and is gone before training starts. Either way it is trusted not to side with a party.
    """
    left, seed = Left(batch, ring.random_seed()), ring.random_seed()
    e = ring.expand(seed, "E", (batch.size,))
    products = tuple(
        ring.matmul(left.factor(index), e.reshape(right_shape(shape))) - left.product(index)
        for index, shape in enumerate(batch.shapes)
    )
    return left, Right(batch, seed, products)


# ---------------------------------------------------------------- one product


def open_left(x: Integers, d: Ring) -> Ring:
    """``X - D``, which left sends: (batches, rows, terms)."""
    return _same(ring.unsigned(x), d, "coefficients") - d


def open_right(y: Integers, e: Ring) -> Ring:
    """``Y - E``, which right sends: (size,), once for all products of a batch."""
    return _same(ring.unsigned(y), e, "secrets") - e


def answer(opened_left: Ring, y: Integers, f_right: Ring) -> Ring:
    """``(X - D) @ Y + F_right``, which right sends then.

    Args:
        opened_left: (batches, rows, terms), as received.
        y: (batches, terms, columns).
        f_right: (batches, rows, columns).

    Raises:
        ValueError: shapes or types do not fit.
    """
    return _same(ring.matmul(opened_left, ring.unsigned(y)), f_right, "products") + f_right


def finish(answered: Ring, d: Ring, opened_right: Ring, f_left: Ring) -> Integers:
    """``X @ Y``, at left; exact where it fits 64 bits.

    Args:
        answered: (batches, rows, columns), as received.
        d: (batches, rows, terms).
        opened_right: (batches, terms, columns), as received and reshaped.
        f_left: (batches, rows, columns).

    Raises:
        ValueError: shapes or types do not fit.
    """
    own = _same(ring.matmul(d, opened_right), f_left, "products") + f_left
    return ring.signed(_same(answered, own, "an answer") + own)


def laid_out(flat: Ring, batch: Batch, index: int) -> Ring:
    """Y, E or Y - E, (size,), as a product of the batch reads it: (batches, terms, columns)."""
    if flat.shape != (batch.size,):
        raise ValueError(f"secrets must have shape ({batch.size},), got {flat.shape}")
    return flat.reshape(right_shape(batch.shapes[index]))


def _same(values: Ring, like: Ring, what: str) -> Ring:
    """The values; numpy would otherwise stretch one to the other's shape."""
    if values.shape != like.shape or values.dtype != like.dtype:
        raise ValueError(f"{what} must be {like.dtype} of shape {like.shape}, got {values.dtype} of {values.shape}")
    return values
