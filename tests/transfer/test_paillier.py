"""Keys and single ciphertexts against Paillier's own formulas on Python's integers, and against another library."""

import math
import pickle

import pytest

gmpy2 = pytest.importorskip("gmpy2")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fedsim.errors import TransferError  # noqa: E402
from fedsim.transfer import paillier  # noqa: E402
from fedsim.transfer.paillier import PrivateKey, PublicKey, generate  # noqa: E402

mpz = gmpy2.mpz
KEY = generate(1024, insecure=True)
N = int(KEY.public.n)


def by_the_book(key: PrivateKey, ciphertext: int) -> int:
    """``L(c^lambda mod n^2) mu mod n``, Paillier 1999, with one modulus and Python's own arithmetic."""
    n, p, q = int(key.public.n), int(key.p), int(key.q)
    carmichael = math.lcm(p - 1, q - 1)
    mu = pow((pow(1 + n, carmichael, n * n) - 1) // n, -1, n)
    return (pow(ciphertext, carmichael, n * n) - 1) // n * mu % n


@given(st.one_of(st.integers(0, N - 1), st.sampled_from([0, 1, N - 1, N // 2, N // 2 + 1])))
@settings(max_examples=20, deadline=None)
def test_both_keys_encrypt_what_the_textbook_decrypts_and_so_does_the_private_key(message: int) -> None:
    for key in (KEY, KEY.public):
        ciphertext = key.encrypt(mpz(message))
        assert 0 < ciphertext < KEY.public.square
        assert by_the_book(KEY, int(ciphertext)) == message
        assert KEY.decrypt(ciphertext) == message


@given(st.integers(0, N - 1), st.integers(1, N - 1))
@settings(max_examples=20, deadline=None)
def test_textbook_ciphertexts_are_decrypted(message: int, r: int) -> None:
    assert KEY.decrypt(mpz(pow(1 + N, message, N * N) * pow(r, N, N * N) % (N * N))) == message


def test_negative_numbers_are_taken_mod_n() -> None:
    assert KEY.decrypt(KEY.public.encrypt(mpz(-5))) == N - 5
    assert KEY.decrypt(KEY.encrypt(mpz(-5)) * KEY.public.bare(mpz(7)) % KEY.public.square) == 2


@pytest.mark.parametrize("key", [KEY, KEY.public])
def test_equal_numbers_never_give_equal_ciphertexts(key: PrivateKey | PublicKey) -> None:
    assert len({int(key.encrypt(mpz(3))) for _ in range(200)}) == 200
    assert len({int(key.noise()) % 2**64 for _ in range(200)}) == 200


def test_noise_is_a_power_of_h_n_by_the_exponent_that_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    exponent = bytes(range(1, 41))
    asked = []
    monkeypatch.setattr(paillier.secrets, "token_bytes", lambda size: asked.append(size) or exponent)
    expected = pow(int(KEY.public.base), int.from_bytes(exponent, "little"), N * N)
    assert KEY.noise() == KEY.public.noise() == expected
    assert asked == [40, 40]


@pytest.mark.parametrize(("bits", "size"), [(2048, 56), (3072, 64)])
def test_keys_of_both_secure_lengths(bits: int, size: int) -> None:
    key = generate(bits)
    assert key.public.bits == bits and key.p.is_prime() and key.q.is_prime() and key.p != key.q
    assert key.public.n == key.p * key.q
    assert paillier.EXPONENT_BYTES[bits] == size
    message = -(2 ** (bits - 3))
    ciphertext = key.encrypt(mpz(message)) * key.public.encrypt(mpz(1)) % key.public.square
    assert key.decrypt(ciphertext) == by_the_book(key, int(ciphertext)) == (message + 1) % int(key.public.n)
    again = PublicKey.from_bytes(key.public.to_bytes(), bits)
    assert again == key.public and len(key.public.to_bytes()) == 1 + 3 * bits // 8


def test_h_n_encrypts_zero_and_comes_of_a_number_with_jacobi_symbol_1() -> None:
    assert by_the_book(KEY, int(KEY.public.base)) == 0
    assert gmpy2.jacobi(KEY.public.base, KEY.public.n) == 1  # n is odd: an odd power has the symbol of its base
    assert gmpy2.legendre(KEY.public.base, KEY.p) == -1  # -y^2 is no square
    assert KEY.p % 4 == KEY.q % 4 == 3
    assert math.gcd(int(KEY.p) - 1, int(KEY.q) - 1) == 2


@pytest.mark.parametrize("bits", [0, 1024, 1536, 2047, 4096])
def test_other_lengths_are_refused_by_name(bits: int) -> None:
    with pytest.raises(ValueError, match=f"^key_bits must be 2048 or 3072, got {bits}$"):
        generate(bits)
    if bits != 1024:
        with pytest.raises(ValueError, match="key_bits"):
            generate(bits, insecure=True)


def test_no_text_shows_a_secret() -> None:
    assert repr(KEY) == str(KEY) == "PrivateKey(bits=1024)"
    assert repr(KEY.public) == "PublicKey(bits=1024)"
    KEY.noise()
    assert str(KEY.p) not in repr(paillier._own(KEY))


def test_pickled_keys_are_equal_and_small() -> None:
    KEY.noise(), KEY.public.noise()
    assert pickle.loads(pickle.dumps(KEY)) == KEY
    assert len(pickle.dumps(KEY)) < 2000  # no tables


def wire(n: int, base: int, version: int = 1, size: int = 128) -> bytes:
    return bytes([version]) + n.to_bytes(size, "big") + base.to_bytes(2 * size, "big")


GOOD = int(KEY.public.base)


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (b"", "has 0 bytes where one of 1024 bits has 385"),
        (wire(N, GOOD)[:-1], "has 384 bytes"),
        (wire(N, GOOD) + b"\0", "has 386 bytes"),
        (wire(N, GOOD, version=2), "is of version 2"),
        (wire(0, GOOD), "a modulus of 0 bits where 1024 were agreed"),
        (wire(N >> 1, GOOD), "a modulus of 1023 bits where 1024 were agreed"),
        (wire(N + 1, GOOD), "even, a prime or a square"),
        (wire(int(gmpy2.next_prime(N)), GOOD), "even, a prime or a square"),
        (wire((int(gmpy2.isqrt(N)) | 1) ** 2, GOOD), "even, a prime or a square"),
        (wire(N, 0), "an h_n that is not in the group"),
        (wire(N, 1), "an h_n that is not in the group"),
        (wire(N, N * N - 1), "an h_n that is not in the group"),
        (wire(N, 2**2048 - 1), "an h_n that is not in the group"),
        (wire(N, int(KEY.p) * 12345), "an h_n that is not in the group"),
    ],
)
def test_hostile_keys_are_refused(payload: bytes, told: str) -> None:
    with pytest.raises(TransferError, match=told):
        PublicKey.from_bytes(payload, 1024)


def test_a_key_of_another_length_than_agreed_is_refused() -> None:
    with pytest.raises(TransferError, match="has 385 bytes where one of 2048 bits has 769"):
        PublicKey.from_bytes(KEY.public.to_bytes(), 2048)
    with pytest.raises(TransferError):
        PublicKey.from_bytes(KEY.public.to_bytes(), 1000)


@given(st.binary(max_size=400))
@settings(max_examples=50, deadline=None)
def test_noise_on_the_wire_is_refused(payload: bytes) -> None:
    with pytest.raises(TransferError):
        PublicKey.from_bytes(payload, 1024)


def test_another_library_reads_our_ciphertexts_and_we_read_its() -> None:
    phe = pytest.importorskip("phe")
    public = phe.PaillierPublicKey(N)
    private = phe.PaillierPrivateKey(public, int(KEY.p), int(KEY.q))
    for message in (0, 1, -7, 2**200, -(2**62)):
        assert private.raw_decrypt(int(KEY.encrypt(mpz(message)))) == message % N
        assert KEY.decrypt(mpz(public.raw_encrypt(message % N))) == message % N
