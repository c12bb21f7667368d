"""Points: against the curve's group law in affine coordinates, and Euler's criterion."""

import builtins
import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import TransferError
from fedsim.transfer import curve

P, A = 2**255 - 19, 486662
ORDER = 2**252 + 27742317777372353535851937790883648493  # of the subgroup, RFC 7748
LOW = [0, 1, 325606250916557431795983626356110631294008115727848805560023387167927233504, P - 1]


def seed(number):
    return hashlib.sha256(str(number).encode()).digest()


def is_on_curve(u):
    """Euler's criterion."""
    return pow(u**3 + A * u**2 + u, (P - 1) // 2, P) == 1


def root(square):
    """By Atkin's formula, p = 5 mod 8."""
    found = pow(square, (P + 3) // 8, P)
    return found if found * found % P == square % P else found * pow(2, (P - 1) // 4, P) % P


def plus(one, two):
    """The group law of v^2 = u^3 + A u^2 + u in affine coordinates; None is the neutral element."""
    if one is None or two is None:
        return two if one is None else one
    (u, v), (x, y) = one, two
    if u == x and (v + y) % P == 0:
        return None
    slope = (3 * u * u + 2 * A * u + 1) * pow(2 * v, -1, P) if one == two else (y - v) * pow(x - u, -1, P)
    w = (slope * slope - A - u - x) % P
    return w, (slope * (u - w) - v) % P


def times(number, point):
    total = None
    for bit in bin(number)[2:]:
        total = plus(total, total)
        if bit == "1":
            total = plus(total, point)
    return total


def number_of(key):
    """The secret number of 32 bytes, RFC 7748, section 5."""
    return int.from_bytes(bytes([key[0] & 248, *key[1:31], key[31] & 127 | 64]), "little")


def slow(seed_):
    for counter in range(1000):
        digest = hashlib.sha256(seed_ + bytes([counter, 0, 0, 0])).digest()
        u = int.from_bytes(digest, "little") % 2**255
        if u < P and is_on_curve(u):
            return u
    raise AssertionError


def test_hashes_are_those_of_a_slow_formula_and_lie_on_the_curve():
    tries = 0
    for number in range(100):
        found = int.from_bytes(curve.hashed(seed(number)), "little")
        assert found == slow(seed(number)) < P
        tries += found != int.from_bytes(hashlib.sha256(seed(number) + bytes(4)).digest(), "little") % 2**255
    assert 20 < tries < 80  # a first try fails with probability 1/2: outside with probability 1e-9


def test_hashes_are_the_same_without_gmpy2(monkeypatch):
    expected = [curve.hashed(seed(number)) for number in range(20)]
    real = builtins.__import__

    def without(name, *args, **named):
        if name == "gmpy2":
            raise ImportError(name)
        return real(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    assert [curve.hashed(seed(number)) for number in range(20)] == expected


def test_multiplying_is_that_of_the_group_and_ends_in_the_subgroup():
    for number in range(6):
        key, point = curve.new_key(), curve.hashed(seed(number))
        u = int.from_bytes(point, "little")
        lifted = u, root(u**3 + A * u**2 + u)
        multiple = times(number_of(key), lifted)
        found = int.from_bytes(curve.multiplied(key, point), "little")
        assert found == multiple[0] and is_on_curve(found)
        assert times(ORDER, multiple) is None
        assert times(ORDER, lifted) is None or times(8 * ORDER, lifted) is None


def test_a_point_of_the_twist_stays_there_so_that_hashes_must_not_lie_on_it():
    u = next(u for u in range(2, 100) if not is_on_curve(u))
    found = curve.multiplied(curve.new_key(), u.to_bytes(32, "little"))
    assert not is_on_curve(int.from_bytes(found, "little"))


@given(st.integers(0, 2**64), st.integers(1, 5))
def test_masking_commutes_and_keeps_the_order(number, count):
    seeds = b"".join(seed(number + one) for one in range(count))
    a, b = curve.new_key(), curve.new_key()
    assert curve.multiplied(b, curve.masked(a, seeds)) == curve.multiplied(a, curve.masked(b, seeds))
    parts = [curve.masked(a, one) for one in curve.each(seeds)]
    assert b"".join(parts) == curve.masked(a, seeds) and len(set(parts)) == count


@pytest.mark.parametrize("u", LOW)
def test_a_point_of_low_order_is_refused(u):
    good = curve.hashed(seed(0))
    with pytest.raises(TransferError, match="low order"):
        curve.multiplied(curve.new_key(), good + u.to_bytes(32, "little") + good)


@pytest.mark.parametrize("u", [P, P + 1, 2**255 - 1, 2**255, 2**255 + 9, 2**256 - 1])
def test_a_point_that_is_not_written_as_it_must_be_is_refused(u):
    with pytest.raises(TransferError, match="not below"):
        curve.check(curve.hashed(seed(0)) + u.to_bytes(32, "little"))


def test_every_other_point_is_written_well():
    draw = random.Random(1)
    numbers = [0, P - 1, P - 2, P - 2**247, 2**254, *(draw.randrange(P) for _ in range(200))]
    curve.check(b"".join(number.to_bytes(32, "little") for number in numbers))
    curve.check(b"")


def test_processes_give_the_same(monkeypatch):
    monkeypatch.setattr(curve, "_PIECE", 20)
    seeds = b"".join(seed(number) for number in range(61))
    key = curve.new_key()
    expected = curve.masked(key, seeds)
    assert curve.spread(curve.masked, key, seeds, 3) == expected
    assert curve.spread(curve.masked, key, seeds, 1) == expected
    assert curve.spread(curve.multiplied, key, expected, 2) == curve.multiplied(key, expected)
    with pytest.raises(TransferError, match="low order"):
        curve.spread(curve.multiplied, key, expected[:-32] + bytes(32), 2)


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(curve, "_PIECE", 1)
    monkeypatch.setattr(curve, "_START", "raise SystemExit('no memory left')")
    with pytest.raises(TransferError, match="masks ids failed: no memory left"):
        curve.spread(curve.masked, curve.new_key(), bytes(64), 2)
