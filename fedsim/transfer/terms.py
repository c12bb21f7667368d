"""What each party multiplies: its secrets, the coefficients that its own gradient gives to the other's, and the layout.

With the Taylor loss both gradients are linear in what the other party has to give. Party A gives V_A (T, d), T = d +
overlap: first ``Phi Phi' / 4``, then of each person ``w_i = gamma kappa u_i^A - [i labelled] (n / n_c) y_i Phi / 2``.
Party B gives V_B: first ``S = sum_i u_i u_i' / n_c`` over labelled rows, then ``u_i^B``. Either gradient is a matrix of
the party's own, the coefficients, times the other's secrets; neither learns more than the product. Because y^2 = 1 the
paper's matrices of every single row collapse into these sums.

Parameters of the last linear layer, ``u = W h + b``, need only products of the few columns of ``h`` with whole rows of
V. The others need every entry of V by itself. Where only a last layer is trained, V therefore travels as rows, which a
ciphertext holds many entries of; otherwise as entries.

Source: Liu et al. 2018, arXiv:1812.03337, section 4.2 and Algorithm 1. Differs: means instead of sums; the sums above;
one product of depth one, where the paper multiplies twice; only A learns the loss.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.transfer.fixed import Reals
from fedsim.transfer.objective import Objective

Role = Literal["a", "b"]
Signs = npt.NDArray[np.float64]


class Shape(NamedTuple):
    """A batch of products (rows, terms) @ (terms, columns)."""

    batches: int
    rows: int
    terms: int
    columns: int


class Product(NamedTuple):
    """Coefficients (batches, rows, terms) times a source, read as (batches, terms, columns) in C order."""

    source: int
    shape: Shape


class Plan(NamedTuple):
    """What a party learns in an iteration.

    sources: number of entries of each array of secrets that the other gives. products: what they are multiplied by.
    head, body: numbers of products for each hidden value and of parameters beside the head; by_rows: the layout.
    """

    sources: tuple[int, ...]
    products: tuple[Product, ...]
    head: int
    body: int
    by_rows: bool


class View(NamedTuple):
    """A party's values of one iteration, of its net alone.

    hidden: (overlap, d). features: (overlap, width + 1), inputs of the head with a 1 for its bias; width + 1 = 0
    columns where there is no head. body: (overlap, d, P), derivatives by the other parameters.
    """

    hidden: Reals
    features: Reals
    body: Reals


class Source(NamedTuple):
    """What only party A has.

    phi: (d,). labels: (labelled,) of +1 and -1. features: (width + 1,), ``mean_j y_j h_j`` over all of A's rows.
    body: (d, P), derivatives of phi by the other parameters.
    """

    phi: Reals
    labels: Signs
    features: Reals
    body: Reals


def plan(role: Role, overlap: int, hidden: int, head: int, body: int) -> Plan:
    """What this party learns, and in which layout the other must give its secrets.

    Args:
        role: ``a`` also learns the loss.
        overlap, hidden: n and d.
        head: width of the head's input and one more for the bias; 0 where there is no plain head.
        body: number of parameters beside the head's.
    """
    terms, loss = hidden + overlap, role == "a"
    if head and not body:
        products = [Product(0, Shape(1, head, terms, hidden))]
        sources = [terms * hidden]
        if loss:
            sources.append(_upper(hidden) + 1)
            products.append(Product(1, Shape(1, 1, sources[1], 1)))
        return Plan(tuple(sources), tuple(products), head, body, True)
    wide = terms + loss  # party B's own part of the loss has a row of its own
    shapes = [Shape(hidden, head, wide, 1)] * bool(head) + [Shape(1, body, hidden * wide, 1)] * bool(body)
    shapes += [Shape(1, 1, hidden * wide, 1)] * loss
    return Plan((hidden * wide,), tuple(Product(0, shape) for shape in shapes), head, body, False)


def determines(plan: Plan, overlap: int, hidden: int) -> bool:
    """Whether whoever has this plan learns at least as many numbers in an iteration as the other has hidden values.

    Then least squares may find the hidden values of every common person, and with them labels: an exact gradient is as
    many equations as it has entries. Nothing in the protocol prevents it; a narrower net or a larger overlap does.
    """
    return plan.head * hidden + plan.body >= overlap * hidden


def _upper(size: int) -> int:
    return size * (size + 1) // 2


# ---------------------------------------------------------------- what a party gives


def secrets_of_a(objective: Objective, mine: View, source: Source) -> Reals:
    """V_A: (T, d)."""
    count, labelled = len(mine.hidden), len(source.labels)
    people = objective.gamma * objective.kappa * mine.hidden
    people[:labelled] -= count / labelled / 2 * np.outer(source.labels, source.phi)
    return np.concatenate([np.outer(source.phi, source.phi) / 4, people])


def secrets_of_b(mine: View, labelled: int) -> Reals:
    """V_B: (T, d)."""
    some = mine.hidden[:labelled]
    return np.concatenate([some.T @ some / labelled, mine.hidden])


def laid_out(secrets: Reals, other: Plan, own_loss: float | None) -> list[Reals]:
    """The arrays that the other party's plan asks for.

    Args:
        secrets: (T, d).
        other: the other party's plan.
        own_loss: party B's own part of the loss, which only ever reaches A in the sum; None at party A.
    """
    hidden = secrets.shape[1]
    if other.by_rows:
        if own_loss is None:
            return [secrets.ravel()]
        pairs = secrets[:hidden][np.triu_indices(hidden)]
        return [secrets.ravel(), np.append(pairs, own_loss)]
    if own_loss is None:
        return [secrets.T.ravel()]
    padding = np.zeros((1, hidden))
    padding[0, 0] = own_loss
    return [np.concatenate([secrets, padding]).T.ravel()]


# ---------------------------------------------------------------- what a party multiplies by


def coefficients_of_a(objective: Objective, mine: View, source: Source, own: Plan) -> list[Reals]:
    """Of A's products with what B gives, in the order of the plan: (batches, rows, terms)."""
    count, labelled = len(mine.hidden), len(source.labels)
    phi, signs = source.phi, np.zeros(count)
    signs[:labelled] = source.labels / (2 * labelled)
    pull = objective.gamma * objective.kappa / count
    head = np.concatenate(
        [np.outer(source.features, phi) / 4, pull * mine.features.T - np.outer(source.features, signs)], axis=1
    )
    body = np.concatenate(
        [
            np.einsum("kp,l->pkl", source.body, phi) / 4,
            pull * mine.body.transpose(2, 1, 0) - np.einsum("kp,i->pki", source.body, signs),
        ],
        axis=2,
    )
    people = pull * mine.hidden
    people[:labelled] -= np.outer(source.labels, phi) / (2 * labelled)
    loss = np.concatenate([np.outer(phi, phi) / 8, people])  # (T, d): its products with V_B sum to the loss
    if own.by_rows:
        pairs = np.outer(phi, phi) / 8
        twice = (pairs + np.triu(pairs, 1))[np.triu_indices(len(phi))]
        return [head[None], np.append(twice, -1.0).reshape(1, 1, -1)]  # what is taken off, see ``gradient``
    return _by_entries(head, body, loss, own)


def coefficients_of_b(mine: View, labelled: int, own: Plan) -> list[Reals]:
    """Of B's products with what A gives, in the order of the plan: (batches, rows, terms)."""
    count, some = len(mine.hidden), mine.hidden[:labelled]
    head = np.concatenate([mine.features[:labelled].T @ some / labelled, mine.features.T / count], axis=1)
    if own.by_rows:
        return [head[None]]
    pairs = np.einsum("ikp,il->pkl", mine.body[:labelled], some, optimize=True) / labelled
    return _by_entries(head, np.concatenate([pairs, mine.body.transpose(2, 1, 0) / count], axis=2), None, own)


def _by_entries(head: Reals, body: Reals, loss: Reals | None, own: Plan) -> list[Reals]:
    """Coefficients of single entries, hidden value by hidden value; with the loss every one has a last, extra term.

    head: (width + 1, T). body: (P, d, T). loss: (T, d), or None.
    """
    hidden, found = body.shape[1], []
    if loss is not None:
        head = np.pad(head, ((0, 0), (0, 1)))
        body = np.pad(body, ((0, 0), (0, 0), (0, 1)))
    if own.head:
        found.append(np.broadcast_to(head, (hidden, *head.shape)))
    if own.body:
        found.append(body.reshape(1, len(body), -1))
    if loss is not None:
        whole = np.pad(loss.T, ((0, 0), (0, 1)))
        whole[0, -1] = 1.0
        found.append(whole.reshape(1, 1, -1))
    return found


# ---------------------------------------------------------------- what a party makes of the products


class Gradient(NamedTuple):
    """Of the part of the loss that needs both parties.

    weight: (d, width), bias: (d,), of the head. body: (P,). loss: of that part with B's own, minus ln 2; only at A.
    """

    weight: Reals
    bias: Reals
    body: Reals
    loss: float | None


def gradient(role: Role, products: list[Reals], own: Plan, head: Reals) -> Gradient:
    """Read the products of a plan.

    Args:
        role: of this party.
        products: (batches, rows, columns) of each.
        own: this party's plan.
        head: (d, width + 1), the weights and bias of the head, for the loss: hidden values are linear in them, so
            ``<theta, d loss / d theta>`` counts its quadratic part twice and the others once.
    """
    rest, hidden = list(products), len(head)
    by_head = np.zeros((hidden, 0))
    if own.head:
        found = rest.pop(0)
        by_head = found[0].T if own.by_rows else found[:, :, 0]
    body = rest.pop(0).ravel() if own.body else np.zeros(0)
    loss = None
    if role == "a":
        last = float(rest.pop(0).item())
        loss = last if not own.by_rows else float((head * by_head).sum()) - last
    return Gradient(by_head[:, :-1], by_head[:, -1] if own.head else np.zeros(0), body, loss)
