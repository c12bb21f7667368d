"""fedsim's Paillier against python-paillier (`phe`) with gmpy2: encryption, and a chain of operations on 10,000 values.

The chain: encrypt every value, add its neighbour's ciphertext, multiply by an integer of its own with 30 bits and a
sign, decrypt. Values are fixed-point numbers as integers of 31 bits, so `phe` has no floats to encode; it runs the same
chain on fewer values (300), and its seconds are scaled to 10,000, which is fair as each value takes as long as any
other. fedsim packs its products, 31 to a ciphertext, before it decrypts them. A second chain has one integer for every
31 values, so that they can share a ciphertext from the beginning. `phe` has no processes of its own: two of fedsim's
are compared with one of it. Ways take turns, and the best time of each counts. What is made once for a key (tables of
powers, processes) is made before, and its seconds are told apart.

Run in an environment with requirements/paillier.txt: python paillier.py [--quick] [--bits 2048] [--out FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import phe
import phe.util
from gmpy2 import mpz

from fedsim.transfer import ciphertexts as c
from fedsim.transfer.fixed import Integers
from fedsim.transfer.paillier import PrivateKey, generate
from fedsim.transfer.pool import Pool
from fedsim.transfer.products import packed

VALUES, PHE_VALUES = 10_000, 300
VALUE_BITS, SCALAR_BITS = 31, 30
AT_LEAST = {"encryption": 20, "chain, one process": 10, "chain, two processes": 20}


class Work(NamedTuple):
    """Values, the integers they are multiplied by, and what comes out."""

    values: Integers
    scalars: Integers

    def expected(self) -> Integers:
        """In the clear."""
        return (self.values + np.roll(self.values, -1)) * self.scalars


def drawn(count: int, shared: int) -> Work:
    """Fixed-point numbers as integers, and an integer for each ``shared`` of them."""
    generator = np.random.default_rng(1)
    values = generator.integers(-(2**VALUE_BITS) + 1, 2**VALUE_BITS, count)
    scalars = generator.integers(-(2**SCALAR_BITS) + 1, 2**SCALAR_BITS, -(-count // shared))
    return Work(values, np.repeat(scalars, shared)[:count])


def own_chain(key: PrivateKey, work: Work, pool: Pool) -> Integers:
    """Each value in a ciphertext of its own until it is multiplied."""
    first = c.encrypt(key, work.values[:, None], bound=2**VALUE_BITS, pool=pool)
    neighbours = c.Encrypted(first.key, first.layout, (*first.values[1:], first.values[0]))
    return c.decrypt(key, packed(c.scaled(c.add(first, neighbours), work.scalars, pool=pool), pool=pool), pool=pool)


def shared_chain(key: PrivateKey, work: Work, pool: Pool, slots: int) -> Integers:
    """Values that share an integer share a ciphertext. Neighbours are encrypted too, as slots cannot be turned."""
    first, second = (
        c.encrypt(key, values, slots=slots, bound=2**VALUE_BITS, pool=pool)
        for values in (work.values, np.roll(work.values, -1))
    )
    return c.decrypt(key, c.scaled(c.add(first, second), work.scalars[::slots], pool=pool), pool=pool)


def phe_chain(public: phe.PaillierPublicKey, private: phe.PaillierPrivateKey, work: Work) -> Integers:
    """The same with `phe`."""
    first = [public.encrypt(value) for value in work.values.tolist()]
    sums = [a + b for a, b in zip(first, [*first[1:], first[0]], strict=True)]
    found = [value * scalar for value, scalar in zip(sums, work.scalars.tolist(), strict=True)]
    return np.array([private.decrypt(value) for value in found], np.int64)


def checked(run: Callable[[], Integers], work: Work) -> Callable[[], object]:
    """The run, whose results must be right."""

    def once() -> None:
        if not np.array_equal(run(), work.expected()):
            sys.exit("wrong results")

    return once


def in_turn(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best seconds of each way."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measured(bits: int, count: int, few: int, repeats: int) -> dict[str, float]:
    """Milliseconds of an encryption, and seconds of a chain of ``count`` values, by way."""
    start = time.perf_counter()
    key = generate(bits)
    made = time.perf_counter()
    key.noise(), key.public.noise()
    found = {"a key, s": made - start, "tables of powers, s": time.perf_counter() - made}
    public = phe.PaillierPublicKey(int(key.public.n))
    private = phe.PaillierPrivateKey(public, int(key.p), int(key.q))
    number, times = 2**VALUE_BITS - 1, range(max(few // 3, 1))
    encryption = in_turn(
        {
            "phe": lambda: [public.encrypt(number) for _ in times],
            "with the private key": lambda: [key.encrypt(mpz(number)) for _ in times],
            "with the public key": lambda: [key.public.encrypt(mpz(number)) for _ in times],
        },
        repeats,
    )
    found |= {f"encryption, {name}, ms": 1e3 * seconds / len(times) for name, seconds in encryption.items()}
    slots = c.most_slots(bits)
    with Pool(1) as one, Pool(2) as two:
        own, shared, fewer = drawn(count, 1), drawn(count, slots), drawn(few, 1)
        start = time.perf_counter()
        own_chain(key, drawn(400, 1), two)
        found["starting two processes, s"] = time.perf_counter() - start
        chain = in_turn(
            {
                "phe": checked(lambda: phe_chain(public, private, fewer), fewer),
                "one process": checked(lambda: own_chain(key, own, one), own),
                "two processes": checked(lambda: own_chain(key, own, two), own),
                "shared integers, one process": checked(lambda: shared_chain(key, shared, one, slots), shared),
            },
            repeats,
        )
    chain["phe"] *= count / few
    return found | {f"chain, {name}, s": seconds for name, seconds in chain.items()}


def ratios(found: dict[str, float]) -> dict[str, float]:
    """How many times as fast as `phe`."""
    encryption, chain = found["encryption, phe, ms"], found["chain, phe, s"]
    return {
        "encryption": encryption / found["encryption, with the private key, ms"],
        "encryption, with the public key": encryption / found["encryption, with the public key, ms"],
        "chain, one process": chain / found["chain, one process, s"],
        "chain, two processes": chain / found["chain, two processes, s"],
        "chain, shared integers, one process": chain / found["chain, shared integers, one process, s"],
    }


def main() -> None:
    """Print both tables; exit 1 if something is below what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few values, once: does everything run?")
    parser.add_argument("--bits", type=int, default=2048, choices=[2048, 3072])
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    if not phe.util.HAVE_GMP:
        sys.exit("phe does not find gmpy2, and would be slower than it can be")
    found = measured(options.bits, *((200, 6, 1) if options.quick else (VALUES, PHE_VALUES, 3)))
    times = ratios(found)
    for name, value in found.items():
        print(f"{name:45} {value:10.3f}")
    for name, value in times.items():
        print(f"{name:45} x {value:8.1f}" + (f"   (asked: {AT_LEAST[name]})" if name in AT_LEAST else ""))
    if options.out:
        options.out.write_text(json.dumps({"bits": options.bits, "times": found, "ratios": times}, indent=1) + "\n")
    below = [name for name, least in AT_LEAST.items() if times[name] < least]
    if below and not options.quick:
        sys.exit(f"below what was asked: {', '.join(below)}")


if __name__ == "__main__":
    main()
