"""Algorithm 1 of secure federated transfer learning as a user of python-paillier (`phe`) would write it, and metered.

Every entry of every row's matrices is encrypted by itself, as the float it is; gradients are sums of ciphertexts times
floats. Where there is a choice it is the cheaper one: a gradient is formed at the hidden values first and taken to the
parameters once, sums are taken before factors where that is the same, what a party knows by itself is added in the
clear, and masks are floats, which hide less than uniform numbers do.

Source: Liu et al. 2018, arXiv:1812.03337, Algorithm 1.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from secrets import SystemRandom
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import phe

Reals = npt.NDArray[np.float64]
Encrypted = npt.NDArray[np.object_]  # of phe.EncryptedNumber
GAMMA, L2, KAPPA = 0.05, 0.001, -2.0  # with means, as fedsim has them; distances of hidden values align them


class Size(NamedTuple):
    """Common rows, rows of A alone, hidden values, columns of each party, bits of the keys."""

    common: int
    alone: int = 69
    hidden: int = 16
    columns: int = 15
    bits: int = 2048


class Side(NamedTuple):
    """Of a party: inputs (n, columns), common rows first; labels (n,), unused at B; weight (d, columns), bias (d,)."""

    inputs: Reals
    labels: Reals
    weight: Reals
    bias: Reals

    def hidden(self) -> Reals:
        """(n, d)."""
        return self.inputs @ self.weight.T + self.bias


class Found(NamedTuple):
    """Gradients of an iteration, (d, columns + 1) with the bias last, and the loss; means, as fedsim has them."""

    a: Reals
    b: Reals
    loss: float


def drawn(size: Size) -> tuple[Side, Side]:
    """Standard normal columns, labels of both signs, and nets as torch would start them."""
    generator = np.random.default_rng(1)

    def side(rows: int) -> Side:
        most = size.columns**-0.5
        weight, bias = (generator.uniform(-most, most, shape) for shape in ((size.hidden, size.columns), size.hidden))
        labels = np.where(generator.random(rows) < 0.6, 1.0, -1.0)
        return Side(generator.normal(size=(rows, size.columns)), labels, weight, bias)

    return side(size.common + size.alone), side(size.common)


# ---------------------------------------------------------------- Algorithm 1, with phe


def algorithm_1(a: Side, b: Side, key_of_a: tuple[Any, Any], key_of_b: tuple[Any, Any]) -> Found:
    """One iteration of both parties, one after the other, with sums over rows as in the paper."""
    (public_a, private_a), (public_b, private_b) = key_of_a, key_of_b
    n, u_a, u_b = len(b.inputs), a.hidden(), b.hidden()
    phi, common, labels = a.labels @ u_a / len(u_a), u_a[:n], a.labels[:n]

    own_a, own_loss_a = alone(a, common)
    own_b, own_loss_b = alone(b, u_b)
    from_a = sent_by_a(public_a, phi, labels, common)
    from_b = sent_by_b(public_b, u_b, own_loss_b)

    secret_a, loss = gradient_of_a(a, phi, from_b)
    masked_a, mask_a = masked(secret_a)
    masked_b, mask_b = masked(gradient_of_b(b, from_a))
    loss = sent(loss + (n * float(np.log(2)) + own_loss_a))

    opened_b, opened_a = decrypted(private_a, masked_b), decrypted(private_b, masked_a)
    total = private_b.decrypt(loss)
    return Found((opened_a - mask_a + own_a) / n, (opened_b - mask_b + own_b) / n, total / n)


def alone(side: Side, hidden: Reals) -> tuple[Reals, float]:
    """Gradient and value of ``gamma sum_i |u_i|^2 + lambda / 2 |theta|^2`` over common rows; lambda is n l2."""
    n, theta = len(hidden), np.column_stack([side.weight, side.bias])
    rows = np.column_stack([side.inputs[:n], np.ones(n)])
    gradient = 2 * GAMMA * hidden.T @ rows + n * L2 * theta
    return gradient, float(GAMMA * (hidden**2).sum() + n * L2 / 2 * (theta**2).sum())


def sent_by_a(public: Any, phi: Reals, labels: Reals, hidden: Reals) -> tuple[Encrypted, ...]:
    """``D(y_i) / 8 Phi' Phi``, ``C(y_i) / 2 Phi`` and ``gamma kappa u_i`` of each row; C(y) = -y, D(y) = y^2."""
    h1 = np.einsum("i,k,l->ikl", labels**2 / 8, phi, phi)
    return tuple(encrypted(public, values) for values in (h1, np.outer(-labels / 2, phi), GAMMA * KAPPA * hidden))


def sent_by_b(public: Any, hidden: Reals, own_loss: float) -> tuple[Encrypted, ...]:
    """``u_i' u_i``, ``u_i`` and ``kappa u_i`` of each row, and B's own part of the loss."""
    h1 = np.einsum("ik,il->ikl", hidden, hidden)
    return tuple(encrypted(public, values) for values in (h1, hidden, KAPPA * hidden, np.array([own_loss])))


def gradient_of_b(b: Side, received: tuple[Encrypted, ...]) -> Encrypted:
    """``sum_i (2 h1_i u_i + h2_i + h3_i) du_i / dtheta``, encrypted: (d, columns + 1)."""
    h1, h2, h3 = received
    rows = np.stack([matrix @ exact(2 * u) for matrix, u in zip(h1, b.hidden(), strict=True)]) + h2 + h3
    return np.column_stack([rows.T @ exact(b.inputs), rows.sum(0)])


def gradient_of_a(a: Side, phi: Reals, received: tuple[Encrypted, ...]) -> tuple[Encrypted, Any]:
    """``sum_i (D(y_i) / 4 h1_i Phi + C(y_i) / 2 h2_i) dPhi / dtheta + gamma h3_i du_i / dtheta``; and the loss."""
    h1, h2, h3, own_loss = received
    n, signs = len(h1), a.labels[: len(h1)]
    by_phi = np.stack([matrix @ exact(sign**2 / 4 * phi) for matrix, sign in zip(h1, signs, strict=True)]).sum(0)
    by_label = (h2 * exact(-signs / 2)[:, None]).sum(0)
    means = exact(np.append(a.labels @ a.inputs, a.labels.sum()) / len(a.labels))  # dPhi_k / dtheta_k
    pull = np.column_stack([h3.T @ exact(GAMMA * a.inputs[:n]), h3.sum(0) * GAMMA])
    together = (h3 * exact(GAMMA * a.hidden()[:n])).sum()
    loss = by_phi @ exact(phi / 2) + by_label @ exact(phi) + together + own_loss[0]
    return np.outer(by_phi + by_label, means) + pull, loss


def exact(values: Reals) -> Encrypted:
    """Python's floats, which `phe` multiplies by."""
    return np.asarray(values).astype(object)


def encrypted(public: Any, values: Reals) -> Encrypted:
    """Every entry in a ciphertext of its own."""
    found: Encrypted = np.vectorize(public.encrypt, otypes=[object])(exact(values))
    return found


def masked(gradient: Encrypted) -> tuple[Encrypted, Reals]:
    """The gradient under random floats, as it is sent, and these."""
    draw = SystemRandom().uniform
    mask = np.array([draw(-(2.0**20), 2.0**20) for _ in range(gradient.size)]).reshape(gradient.shape)
    hidden = gradient + exact(mask)
    for one in hidden.flat:
        sent(one)
    return hidden, mask


def sent(one: Any) -> Any:
    """A ciphertext as it leaves: made random again, which `phe` does here."""
    one.ciphertext()
    return one


def decrypted(private: Any, values: Encrypted) -> Reals:
    """Every entry."""
    return np.array([private.decrypt(one) for one in values.flat]).reshape(values.shape)


# ---------------------------------------------------------------- how much phe is asked to do

OPERATIONS = {
    "encrypt": (phe.PaillierPublicKey, "encrypt"),
    "multiply": (phe.EncryptedNumber, "__mul__"),
    "add": (phe.EncryptedNumber, "__add__"),
    "make random again": (phe.EncryptedNumber, "obfuscate"),
    "decrypt": (phe.PaillierPrivateKey, "decrypt"),
}


def operations(size: Size) -> dict[str, int]:
    """How often an iteration asks for each."""
    n, d, f = size.common, size.hidden, size.columns
    at_b = {"multiply": n * d * d + n * d * f, "add": n * d * (d - 1) + 2 * n * d + (n - 1) * d * (f + 1)}
    at_a = {
        "multiply": n * d * d + n * d + n * d * f + d + d * (f + 1) + n * d + 2 * d,
        "add": n * d * (d - 1) + 2 * (n - 1) * d  # by_phi, by_label
        + (n - 1) * d * (f + 1) + d + d * (f + 1)  # pull, both sums, all
        + (n * d - 1) + 2 * (d - 1) + 3 + 1,  # the loss
    }  # fmt: skip
    entries = d * (f + 1)
    return {
        "encrypt": 2 * n * (d * d + 2 * d) + 1,
        "multiply": at_a["multiply"] + at_b["multiply"],
        "add": at_a["add"] + at_b["add"] + 2 * entries,
        "make random again": 2 * entries + 1,
        "decrypt": 2 * entries + 1,
    }


@contextlib.contextmanager
def metered() -> Iterator[tuple[dict[str, int], dict[str, float]]]:
    """Count and time what `phe` is asked for. What an operation itself asks for is a part of it."""
    counts, seconds, inside = dict.fromkeys(OPERATIONS, 0), dict.fromkeys(OPERATIONS, 0.0), [False]

    def meter(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def called(*given: Any, **named: Any) -> Any:
            if inside[0]:
                return method(*given, **named)
            inside[0], began = True, time.perf_counter()
            try:
                return method(*given, **named)
            finally:
                seconds[name] += time.perf_counter() - began
                counts[name] += 1
                inside[0] = False

        return called

    with contextlib.ExitStack() as patches:
        for name, (kind, method) in OPERATIONS.items():
            patches.enter_context(patch.object(kind, method, meter(name, getattr(kind, method))))
        yield counts, seconds


def phe_parts(size: Size, repeats: int) -> tuple[dict[str, float], float, Found]:
    """Best seconds of each operation, best seconds of the whole, and what came out, which is always the same."""
    a, b = drawn(size)
    keys = [phe.generate_paillier_keypair(n_length=size.bits) for _ in range(2)]
    best, whole = dict.fromkeys(OPERATIONS, float("inf")), float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        with metered() as (counts, seconds):
            found = algorithm_1(a, b, *keys)
        whole = min(whole, time.perf_counter() - began)
        if counts != operations(size):
            sys.exit(f"counted {counts}, by the formula {operations(size)}")
        best = {name: min(best[name], seconds[name] / counts[name]) for name in best}
    return best, whole, found
