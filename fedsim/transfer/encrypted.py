"""The homomorphic protocol: each party's secrets under its own Paillier key, products by the other, under a mask.

An exchange has three messages each way: encrypted secrets, products under a mask, and the masked products in the clear.
Whoever decrypts sees numbers that are uniform mod n; whoever knows the mask sees the products, and nothing else.

Source: Liu et al. 2018, arXiv:1812.03337, Algorithm 1. Differs: see ``terms`` for what is encrypted; masks are uniform
over all plaintexts; products are packed before they are masked.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from fedsim.errors import TransferError
from fedsim.transfer import ciphertexts as c
from fedsim.transfer import products
from fedsim.transfer.channel import Channel
from fedsim.transfer.ciphertexts import Encrypted, Layout
from fedsim.transfer.fixed import SECRET_BITS, SECRET_FRACTION, Reals, decode, encode_coefficients, encode_secrets
from fedsim.transfer.multiplication import swap
from fedsim.transfer.paillier import PrivateKey, PublicKey, generate
from fedsim.transfer.pool import Pool
from fedsim.transfer.terms import Plan, Product, Role


class Paillier:
    """One party's end.

    sent: ciphertexts that this party has sent, of its secrets and of masked products.
    """

    def __init__(self, bits: int, *, insecure: bool, pool: Pool) -> None:
        """An end with a new key, made when it begins.

        Args:
            bits: of the key: 2048 or 3072.
            insecure: 1024 as well.
            pool: of processes, open.
        """
        self._bits, self._insecure, self._pool = bits, insecure, pool
        self._key: PrivateKey | None = None
        self._theirs: PublicKey | None = None
        self.sent = {"secrets": 0, "masked": 0}
        self._seconds = dict.fromkeys(("encrypting", "multiplying", "decrypting"), 0.0)

    def begin(self, channel: Channel, role: Role, own: Plan, other: Plan, times: int) -> None:
        """See ``Multiplication``."""
        self._key = generate(self._bits, insecure=self._insecure)
        received = swap(channel, role, "key", self._key.public.to_bytes())
        self._theirs = PublicKey.from_bytes(received, self._bits)

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
        assert self._key is not None and self._theirs is not None
        began = time.perf_counter()
        x = [encode_coefficients(values) for values in coefficients]
        mine = self._encrypted(self._key, secrets, other)
        began = self._took("encrypting", began)
        payload = swap(channel, role, "secrets", b"".join(c.to_bytes(one, pool=self._pool) for one in mine))
        theirs = self._read(payload, own)

        began = time.perf_counter()
        masked = []
        for product, factor in zip(own.products, x, strict=True):
            read = theirs[product.source]
            read = replace(read, layout=replace(read.layout, shape=_read_shape(product)))
            found = products.matmul(factor.values, read, fraction=factor.fraction, pool=self._pool)
            masked.append(c.masked(_packed(found, self._pool), pool=self._pool))
        self.sent["masked"] += sum(len(mask.values) for _, mask in masked)
        self._took("multiplying", began)
        payload = swap(channel, role, "masked", b"".join(sent for sent, _ in masked))

        began = time.perf_counter()
        count = sum(result_layout(product, self._key.public.bits).count for product in other.products)
        opened = c.opened(self._key, payload, count, pool=self._pool)
        self._took("decrypting", began)
        payload = swap(channel, role, "opened", opened)
        found_reals, at = [], 0
        for product, (_, mask), factor in zip(own.products, masked, x, strict=True):
            size = len(mask.values) * self._theirs.bits // 8
            values = c.unmasked(payload[at : at + size], mask)
            at += size
            shape = product.shape
            found_reals.append(decode(values.reshape(shape.batches, shape.rows, shape.columns), factor.fraction))
        return found_reals

    def end(self, channel: Channel) -> None:
        """See ``Multiplication``."""
        self._key = None

    def describe(self) -> dict[str, object]:
        """Ciphertexts that this party has sent, and seconds."""
        return {"ciphertexts": dict(self.sent), "seconds": dict(self._seconds)}

    def _encrypted(self, key: PrivateKey, secrets: Sequence[Reals], other: Plan) -> list[Encrypted]:
        found = []
        for values, layout in zip(secrets, source_layouts(other, key.public.bits), strict=True):
            encoded = encode_secrets(values).reshape(layout.shape)
            kept = {"slots": layout.slots, "fraction": layout.fraction, "bound": layout.bound}
            found.append(c.encrypt(key, encoded, pool=self._pool, **kept))
        self.sent["secrets"] += sum(len(one.values) for one in found)
        return found

    def _read(self, payload: bytes, own: Plan) -> list[Encrypted]:
        assert self._theirs is not None
        layouts = source_layouts(own, self._theirs.bits)
        expected = self._theirs.bits // 4 * sum(layout.count for layout in layouts)
        if len(payload) != expected:
            raise TransferError(f"secrets of {len(payload)} bytes where {expected} were expected")
        found, at = [], 0
        for layout in layouts:
            size = layout.count * self._theirs.bits // 4
            found.append(c.from_bytes(payload[at : at + size], self._theirs, layout))
            at += size
        return found

    def _took(self, what: str, since: float) -> float:
        now = time.perf_counter()
        self._seconds[what] += now - since
        return now


def source_layouts(plan: Plan, bits: int) -> list[Layout]:
    """How the secrets that a plan asks for lie in ciphertexts: (entries / columns, columns) each."""
    found = []
    for source, size in enumerate(plan.sources):
        (columns,) = {product.shape.columns for product in plan.products if product.source == source}
        slots = min(columns, c.most_slots(bits))
        found.append(Layout((size // columns, columns), slots, SECRET_FRACTION, 2**SECRET_BITS))
    return found


def result_layout(product: Product, bits: int) -> Layout:
    """How a product lies in ciphertexts before it is masked."""
    shape, most = product.shape, c.most_slots(bits)
    if shape.columns > most:
        return Layout((shape.batches, shape.rows, shape.columns), most)
    return Layout((shape.batches * shape.rows * shape.columns,), shape.columns * (most // shape.columns))


def ciphertexts_of(plan: Plan, bits: int) -> tuple[int, int]:
    """Ciphertexts of one exchange for one party: secrets that it is sent, and masked products that it sends.

    With keys of 2048 bits a ciphertext has 31 slots. By rows: ``(d + n) ceil(d / 31)`` for V and, for the loss,
    ``d (d + 1) / 2 + 1``; otherwise one for each entry, ``d (d + n)``.
    """
    secrets = sum(layout.count for layout in source_layouts(plan, bits))
    return secrets, sum(result_layout(product, bits).count for product in plan.products)


def _read_shape(product: Product) -> tuple[int, int, int]:
    shape = product.shape
    return shape.batches, shape.terms, shape.columns


def _packed(found: Encrypted, pool: Pool) -> Encrypted:
    return found if found.layout.groups > 1 else products.packed(found, pool=pool)
