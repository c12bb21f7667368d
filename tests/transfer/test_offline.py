"""Triples that two parties make: against Python's integers, and what either of them sees."""

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest

gmpy2 = pytest.importorskip("gmpy2")

from gmpy2 import mpz  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fedsim.errors import TransferError  # noqa: E402
from fedsim.transfer import offline, ring, triples  # noqa: E402
from fedsim.transfer.paillier import generate  # noqa: E402
from fedsim.transfer.pool import Pool  # noqa: E402
from fedsim.transfer.ring import Ring  # noqa: E402
from fedsim.transfer.terms import Shape  # noqa: E402
from fedsim.transfer.triples import Batch, Left, Right  # noqa: E402

KEY = generate(1024, insecure=True)  # 3 slots
WIDE = KEY.public.bits // 8
BATCHES = [
    Batch((Shape(1, 1, 1, 1),)),
    Batch((Shape(1, 4, 3, 5),)),  # two cells for five columns, one slot is empty
    Batch((Shape(2, 3, 4, 1),)),  # three results in a ciphertext
    Batch((Shape(1, 2, 20, 7),)),
    Batch((Shape(2, 3, 3, 4), Shape(1, 2, 12, 2), Shape(4, 5, 1, 6))),  # cells of two
    Batch((Shape(1, 3, 7, 2), Shape(1, 2, 14, 1), Shape(2, 4, 7, 1))),
]


def halves(batch: Batch) -> tuple[Left, Right]:
    """New ones, right's without products."""
    return Left(batch, ring.random_seed()), Right(batch, ring.random_seed(), ())


def made(batch: Batch, pool: Pool) -> tuple[Left, Right]:
    left, right = halves(batch)
    request = offline.encrypted_factor(KEY, right, pool=pool)
    answer = offline.multiplied(KEY.public, left, request, pool=pool)
    return left, offline.opened(KEY, right, answer, pool=pool)


def integers_of(d: Ring, e: Ring) -> "np.ndarray[tuple[int, ...], np.dtype[np.object_]]":
    return d.astype(object) @ e.astype(object)


def check(left: Left, right: Right) -> None:
    for index, shape in enumerate(left.batch.shapes):
        exact = integers_of(left.factor(index), triples.laid_out(right.factor(), left.batch, index))
        expected = [int(value) % 2**64 for value in exact.ravel()]
        assert (left.product(index) + right.products[index]).ravel().tolist() == expected
        assert right.products[index].shape == triples.result_shape(shape)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_shares_add_up(batch: Batch) -> None:
    left, right = made(batch, Pool(1))
    check(left, right)
    assert right.batch == batch and len(pickle.dumps(right)) < 2000


def test_several_processes_give_shares_that_add_up() -> None:
    with Pool(2) as pool:
        check(*made(BATCHES[1], pool))


def test_a_product_is_that_of_int64() -> None:
    left, right = made(BATCHES[1], Pool(1))
    rng = np.random.default_rng(1)
    x, y = rng.integers(-(2**27), 2**27, (1, 4, 3)), rng.integers(-(2**32) + 1, 2**32, 15)
    answered = triples.answer(triples.open_left(x, left.factor(0)), y.reshape(1, 3, 5), right.products[0])
    opened = triples.laid_out(triples.open_right(y, right.factor()), left.batch, 0)
    found = triples.finish(answered, left.factor(0), opened, left.product(0))
    np.testing.assert_array_equal(found, x @ y.reshape(1, 3, 5))


@pytest.mark.parametrize("batch", BATCHES[:4])
@pytest.mark.parametrize("f_left", [0, 1, 2**64 - 1])
def test_the_largest_factors_and_masks_stay_in_their_slots(
    batch: Batch, f_left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: bytes, label: str, shape: tuple[int, ...]) -> Ring:
        return np.full(shape, f_left if label[0] == "F" else 2**64 - 1, np.uint64)

    monkeypatch.setattr(ring, "expand", full)
    monkeypatch.setattr(offline.secrets, "randbits", lambda bits: 2**bits - 1)
    check(*made(batch, Pool(1)))


@given(st.integers(1, 2**30), st.lists(st.integers(1, 80), min_size=1, max_size=3), st.sampled_from([1024, 2048, 3072]))
def test_slots_have_room_for_every_masked_sum_and_cells_for_every_column(
    terms: int, columns: list[int], bits: int
) -> None:
    common = math.lcm(*columns)
    shapes = [Shape(common // one, 1, terms, one) for one in columns]
    batch = Batch((Shape(terms * common // columns[0], 1, 1, columns[0]), *shapes))
    cells = offline.cells_of(batch, bits)
    most = terms * (2**64 - 1) ** 2
    assert most + 2**cells.mask_bits - 1 < 2**cells.slot
    assert most * 2**128 <= 2**cells.mask_bits
    assert cells.slot * cells.size * cells.several(bits) <= bits - 1 and cells.several(bits) >= 1
    assert cells.width == math.gcd(*columns) <= cells.run * cells.size < cells.width + cells.run
    assert sum(cells.count(one) for one in columns) * cells.width == sum(columns) * cells.run


def test_keys_of_2048_bits_have_seven_slots_for_sixteen_columns() -> None:
    cells = offline.cells_of(Batch((Shape(1, 31, 216, 16),)), 2048)
    assert cells == (16, 3, 6, 264) and cells.several(2048) == 1 and 2047 // cells.slot == 7


# ---------------------------------------------------------------- what either party sees


def decrypted(answer: bytes, batch: Batch) -> list[int]:
    """The masked sum in every slot, of a batch whose ciphertexts are all full."""
    cells = offline.cells_of(batch, KEY.public.bits)
    count = len(answer) // (2 * WIDE)
    values = [
        int(KEY.decrypt(mpz.from_bytes(answer[2 * WIDE * at : 2 * WIDE * (at + 1)], "big"))) for at in range(count)
    ]
    return [value >> cells.slot * at & 2**cells.slot - 1 for value in values for at in range(3)]


def test_what_right_decrypts_is_explained_by_any_other_factor() -> None:
    """But for masks at the edge of their range, a share of 2^-128 of them."""
    batch = Batch((Shape(1, 4, 3, 3),))
    left, right = halves(batch)
    answer = offline.multiplied(KEY.public, left, offline.encrypted_factor(KEY, right))
    found = offline.opened(KEY, right, answer).products[0].ravel().tolist()
    other, e = ring.random((1, 4, 3)), triples.laid_out(right.factor(), batch, 0)
    mask_bits = offline.cells_of(batch, KEY.public.bits).mask_bits
    seen = decrypted(answer, batch)
    for value, product, share in zip(seen, integers_of(other, e).ravel(), found, strict=True):
        mask = value - int(product)
        assert 0 <= mask < 2**mask_bits
        assert (share - mask) % 2**64 == int(product) % 2**64
    assert min(seen).bit_length() > mask_bits - 40  # false alarms: 12 * 2^-40


def test_empty_slots_hide_as_well() -> None:
    """Right could put something into them. False alarms: 4 * 2^-40."""
    batch = BATCHES[1]
    left, right = halves(batch)
    answer = offline.multiplied(KEY.public, left, offline.encrypted_factor(KEY, right))
    empty = decrypted(answer, batch)[5::6]
    mask_bits = offline.cells_of(batch, KEY.public.bits).mask_bits
    assert len(empty) == 4 and min(empty).bit_length() > mask_bits - 40
    assert all(value % 2**64 for value in empty)


def test_masks_are_uniform_above_the_share_and_never_repeat() -> None:
    """Means of 2,000 masks in units of their range, within 7 standard errors; false alarms: 3e-12."""
    cells = offline.Cells(1, 1, 1, 260)
    masks = [int(offline._mask([5], cells)) for _ in range(2000)]
    assert all(0 <= mask < 2**260 and (mask + 5) % 2**64 == 0 for mask in masks)
    assert len(set(masks)) == 2000
    assert abs(sum(mask / 2**260 for mask in masks) / 2000 - 0.5) < 7 * math.sqrt(1 / 12 / 2000)


def parts(payload: bytes) -> set[bytes]:
    return {payload[at : at + 2 * WIDE] for at in range(0, len(payload), 2 * WIDE)}


def test_nothing_that_is_sent_can_be_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the same E nor the same D and R have any ciphertext in common with themselves."""
    batch = BATCHES[2]
    left, right = halves(batch)
    requests = [offline.encrypted_factor(KEY, right) for _ in range(2)]
    monkeypatch.setattr(offline.secrets, "randbits", lambda bits: 2**bits - 1)
    answers = [offline.multiplied(KEY.public, left, requests[0]) for _ in range(2)]
    assert [len(parts(one)) for one in requests + answers] == [8, 8, 2, 2]
    assert not parts(requests[0]) & parts(requests[1]) and not parts(answers[0]) & parts(answers[1])
    check(left, offline.opened(KEY, right, answers[1]))


# ---------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one[:-1],
        lambda one: one + b"\0",
        lambda one: b"",
        lambda one: bytes(len(one)),
        lambda one: b"\xff" * len(one),
    ],
)
def test_what_holds_no_ciphertexts_is_refused(change: Callable[[bytes], bytes]) -> None:
    left, right = halves(BATCHES[2])
    request = offline.encrypted_factor(KEY, right)
    with pytest.raises(TransferError):
        offline.multiplied(KEY.public, left, change(request))
    answer = offline.multiplied(KEY.public, left, request)
    with pytest.raises(TransferError):
        offline.opened(KEY, right, change(answer))


def test_a_masked_product_that_leaves_its_slots_is_refused() -> None:
    _, right = halves(BATCHES[0])
    slot = offline.cells_of(BATCHES[0], KEY.public.bits).slot
    good, bad = (KEY.encrypt(mpz(value)).to_bytes(2 * WIDE, "big") for value in (2**slot - 1, 2**slot))
    assert offline.opened(KEY, right, good).products[0].tolist() == [[[2**64 - 1]]]
    with pytest.raises(TransferError, match="at most"):
        offline.opened(KEY, right, bad)
