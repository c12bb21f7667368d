"""Keys of Paillier's cryptosystem, and single ciphertexts: numbers that can be added without being read.

``Enc(m) = (1 + n)^m r mod n^2`` with a random n-th power r. Whoever has n can encrypt and add; p and q decrypt. All
randomness is the operating system's, by ``secrets``; ``fedsim.rng`` must not be used for it. Python's arithmetic takes
no constant time; only the power by which a key decrypts is taken without branches on its bits.

Source: Paillier 1999, "Public-key cryptosystems based on composite degree residuosity classes". *Differs*: g = 1 + n,
and r as in :func:`generate`.
"""

import secrets
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cryptography.hazmat.primitives.asymmetric import rsa

from fedsim.errors import MissingDependencyError, TransferError

try:
    from gmpy2 import gcd, invert, mpz, powmod, powmod_sec
except ImportError as error:
    told = "transfer.protocol: paillier needs the package gmpy2, which pip install 'fedsim-flower[he]' brings"
    raise MissingDependencyError(told) from error

EXPONENT_BYTES = {2048: 56, 3072: 64, 1024: 40}  # of random exponents: 4 times a key's strength (112, 128, 80 bits)
INSECURE_BITS = 1024
_VERSION = b"\1"
_Table = list[list[mpz]]


@dataclass(frozen=True, repr=False)
class PublicKey:
    """What encrypts.

    n: the modulus. base: h_n, an n-th power, of which every random factor is a power.
    """

    n: mpz
    base: mpz

    def __repr__(self) -> str:
        return f"PublicKey(bits={self.bits})"

    @property
    def bits(self) -> int:
        """Of n."""
        return int(self.n.bit_length())

    @cached_property
    def square(self) -> mpz:
        """The modulus n^2 of ciphertexts."""
        return self.n * self.n

    def noise(self) -> mpz:
        """A fresh encryption of 0: ``h_n^x mod n^2`` with x random; a ciphertext times it holds the same number."""
        return _power(_public_table(self), _exponent(self.bits), self.square)

    def encrypt(self, message: mpz) -> mpz:
        """``(1 + m n) h_n^x mod n^2``, a new one each time; m mod n is what it holds."""
        return self.bare(message) * self.noise() % self.square

    def bare(self, message: mpz) -> mpz:
        """``1 + m n mod n^2``: the number as a ciphertext that hides nothing, to be added to another one."""
        return (1 + message % self.n * self.n) % self.square

    def to_bytes(self) -> bytes:
        """A version byte, n, h_n; see :meth:`from_bytes`."""
        size = self.bits // 8
        payload: bytes = _VERSION + self.n.to_bytes(size, "big") + self.base.to_bytes(2 * size, "big")
        return payload

    @staticmethod
    def from_bytes(payload: bytes, bits: int) -> "PublicKey":
        """The key that somebody sent.

        Args:
            payload: from :meth:`to_bytes`.
            bits: that n must have; one of 2048, 3072, 1024.

        Raises:
            TransferError: it is no such key. That n has two large prime factors, and that h_n is an n-th power, cannot
                be seen: whoever sends another key harms its own secrets in the first case. In the second, products
                come out wrong, or the random factors of what it is sent hide less.
        """
        size = bits // 8
        if bits not in EXPONENT_BYTES or len(payload) != 1 + 3 * size:
            raise _refused(f"has {len(payload)} bytes where one of {bits} bits has {1 + 3 * size}")
        if payload[:1] != _VERSION:
            raise _refused(f"is of version {payload[0]}, and 1 is known here")
        n, base = mpz.from_bytes(payload[1 : 1 + size], "big"), mpz.from_bytes(payload[1 + size :], "big")
        if n.bit_length() != bits:
            raise _refused(f"has a modulus of {n.bit_length()} bits where {bits} were agreed")
        if n.is_even() or n.is_probab_prime() or n.is_square():
            raise _refused("has a modulus that is even, a prime or a square")
        if not 1 < base < n * n - 1 or gcd(base, n) != 1:
            raise _refused("has an h_n that is not in the group of ciphertexts")
        return PublicKey(n, base)


@dataclass(frozen=True, repr=False)
class PrivateKey:
    """What decrypts, and encrypts faster.

    p, q: the prime factors of n.
    """

    public: PublicKey
    p: mpz
    q: mpz

    def __repr__(self) -> str:
        return f"PrivateKey(bits={self.public.bits})"

    def noise(self) -> mpz:
        """See ``PublicKey.noise``: here mod p^2 and mod q^2."""
        own, exponent = _own(self), _exponent(self.public.bits)
        modp, modq = (_power(own.tables[i], exponent, own.squares[i]) for i in range(2))
        return own.joined(modp, modq)

    def encrypt(self, message: mpz) -> mpz:
        """See ``PublicKey.encrypt``."""
        return self.public.bare(message) * self.noise() % self.public.square

    def decrypt(self, ciphertext: mpz) -> mpz:
        """The number in [0, n) that a ciphertext holds.

        ``m = L_p(c^(p-1) mod p^2) / L_p((1+n)^(p-1) mod p^2) mod p`` with ``L_p(u) = (u - 1) / p``, the same mod q, and
        both joined by the Chinese remainder theorem.

        Source: Paillier 1999, section 7, "Decryption using Chinese-remaindering".
        """
        own = _own(self)
        modp = (powmod_sec(ciphertext, self.p - 1, own.squares[0]) - 1) // self.p * own.scales[0] % self.p
        modq = (powmod_sec(ciphertext, self.q - 1, own.squares[1]) - 1) // self.q * own.scales[1] % self.q
        return modq + self.q * ((modp - modq) * own.q_inverse % self.p)


def generate(bits: int = 2048, *, insecure: bool = False) -> PrivateKey:
    """A new key.

    Random factors are ``r = h_n^x`` with ``h_n = (-y^2)^n mod n^2`` for one random y, and x uniform of 448 bits (512
    for 3072, 320 for 1024). That r cannot be told from a random n-th power is an assumption beyond Paillier's own: in
    this group, a power with a short random exponent looks like one with any exponent. Finding x takes about the square
    root of the number of exponents, 2^224 steps, unless n is factored.

    Args:
        bits: of n: 2048 or 3072; 1024 too, if ``insecure``.
        insecure: for tests.

    Raises:
        ValueError: another number of bits.

    Source: Damgard, Jurik and Nielsen 2010, "A generalization of Paillier's public-key system with applications to
    electronic voting", whose primes and h these are. *Differs*: there x has half as many bits as n.
    """
    if bits not in EXPONENT_BYTES or (bits == INSECURE_BITS and not insecure):
        raise ValueError(f"key_bits must be 2048 or 3072, got {bits}")
    p, q = _primes(bits)
    n = p * q
    y = mpz(secrets.randbelow(int(n) - 2) + 2)
    return PrivateKey(PublicKey(n, powmod(-y * y % n, n, n * n)), p, q)


def _primes(bits: int) -> tuple[mpz, mpz]:
    """Two primes that are 3 mod 4, with gcd(p - 1, q - 1) = 2, as the source of :func:`generate` has them."""
    known: list[mpz] = []
    while True:
        numbers = rsa.generate_private_key(public_exponent=65537, key_size=bits).private_numbers()
        for prime in (mpz(numbers.p), mpz(numbers.q)):
            if prime % 4 != 3:
                continue
            for other in known:
                if gcd(prime - 1, other - 1) == 2 and (prime * other).bit_length() == bits:
                    return prime, other
            known.append(prime)


def _refused(what: str) -> TransferError:
    return TransferError(f"a public key that {what}")


# ---------------------------------------------------------------- powers of h_n


def _exponent(bits: int) -> bytes:
    return secrets.token_bytes(EXPONENT_BYTES[bits])


def _table(base: mpz, modulus: mpz, length: int) -> _Table:
    """``base^(d 256^i)`` for every place i and digit d of an exponent of so many bytes."""
    table = []
    for _ in range(length):
        row = [mpz(1)]
        for _ in range(255):
            row.append(row[-1] * base % modulus)
        table.append(row)
        base = row[-1] * base % modulus
    return table


def _power(table: _Table, exponent: bytes, modulus: mpz) -> mpz:
    """``base^exponent``, the exponent's lowest byte first."""
    found = mpz(1)
    for row, digit in zip(table, exponent, strict=True):
        found = found * row[digit] % modulus
    return found


@lru_cache(maxsize=4)
def _public_table(key: PublicKey) -> _Table:
    return _table(key.base, key.square, EXPONENT_BYTES[key.bits])


@dataclass(frozen=True, repr=False)
class _Own:
    """What follows from p and q, for each of them.

    square_inverse: q^-2 mod p^2. scales: what L of a power is multiplied by. q_inverse: q^-1 mod p.
    """

    squares: tuple[mpz, mpz]
    tables: tuple[_Table, _Table]
    scales: tuple[mpz, mpz]
    square_inverse: mpz
    q_inverse: mpz

    def joined(self, modp: mpz, modq: mpz) -> mpz:
        """The number mod n^2 with these remainders."""
        return modq + self.squares[1] * ((modp - modq) * self.square_inverse % self.squares[0])


@lru_cache(maxsize=4)
def _own(key: PrivateKey) -> _Own:
    p, q, length = key.p, key.q, EXPONENT_BYTES[key.public.bits]
    squares = p * p, q * q
    tables = [_table(key.public.base % square, square, length) for square in squares]
    return _Own(
        squares,
        (tables[0], tables[1]),
        (invert(-q % p, p), invert(-p % q, q)),
        invert(squares[1], squares[0]),
        invert(q, p),
    )
