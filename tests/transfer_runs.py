"""Whole transfers for the tests of ``fedsim.transfer``: parties around the nets of ``transfer_pairs``, few rows."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transfer_pairs import NETS, normal, signs

from fedsim import params as p
from fedsim import rng
from fedsim.models.zoo import MODELS
from fedsim.records import Params
from fedsim.training.optimizers import Optimizer, sgd
from fedsim.transfer import protocols
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.channel import Channel
from fedsim.transfer.encrypted import Paillier
from fedsim.transfer.links import Link, pair
from fedsim.transfer.multiplication import Multiplication
from fedsim.transfer.nets import net_of
from fedsim.transfer.party import Outcome, take_part
from fedsim.transfer.pool import Pool
from fedsim.transfer.terms import Role
from fedsim.transfer.together import Ends, Iteration, run_together

PEOPLE, ONLY_A, ONLY_B, ASKS = 12, 8, 3, 9
WIDTHS = {"a": 6, "b": 9}
PROTOCOLS = ("plain", "paillier", "secret-sharing")
AGREED = Agreed(
    protocol="plain",
    loss="taylor",
    alignment="distance",
    gamma=0.3,
    l2=0.01,
    hidden=5,
    iterations=1,
    overlap=PEOPLE,
    labelled=7,
    tolerance=None,
    key_bits=1024,
    triples="helper",
)


def party(role: Role, kind: str = "linear", seed: int = 0, *, hidden: int = 5, **changes: Any) -> Party:
    """Party a: 6 columns, 12 + 8 rows; party b: 9 columns, 12 + 3 rows, and 9 that it asks about."""
    found: Any = NETS[kind]
    name, given, only_head = found
    key = rng.fold(seed, "party", role, kind)
    with rng.torch_seeded(key):
        model = MODELS[name]((WIDTHS[role],), hidden, **given)
    alone = ONLY_A if role == "a" else ONLY_B
    inputs = normal(rng.fold(key, "inputs"), PEOPLE + alone, WIDTHS[role])
    net = net_of(model, inputs[0], only_head=only_head)
    ids = [f"person-{i:03d}" for i in range(PEOPLE)] + [f"only-{role}-{i:03d}" for i in range(alone)]
    made = Party(
        role=role,
        ids=ids,
        inputs=inputs,
        labels=signs(rng.fold(key, "labels"), len(ids)) if role == "a" else None,
        asks=None if role == "a" else normal(rng.fold(key, "asks"), ASKS, WIDTHS[role]),
        net=net,
        params={n: tensor.detach().clone() for n, tensor in p.of(net.model)[0].items()},
        optimizer=sgd(lr=0.1),
        key=key,
    )
    return replace(made, **changes)


def small(output: Path) -> dict[str, Any]:
    """A config: few rows, few iterations, keys that are quick."""
    tables = {"name": "overlap-tables", "rows_a": 30, "rows_b": 25, "overlap": 20, "held_out": 10}
    agreed = {"protocol": "plain", "overlap": 20, "labelled": 10, "hidden": 4, "iterations": 3}
    return {
        "name": "t",
        "data": {"dataset": tables},
        "model": {"name": "linear"},
        "train": {"optimizer": {"name": "sgd", "lr": 0.1}},
        "transfer": {**agreed, "key_bits": 1024, "insecure": True},
        "output": str(output),
    }


@dataclass
class Heard:
    """Every message of a party: direction, kind, payload."""

    messages: list[tuple[str, str, bytes]] = field(default_factory=list)

    def __call__(self, direction: str, kind: str, payload: bytes) -> None:
        self.messages.append((direction, kind, payload))

    def of(self, direction: str, *kinds: str) -> list[bytes]:
        return [payload for way, kind, payload in self.messages if way == direction and (kind in kinds or not kinds)]


@dataclass
class Done:
    """What came of a transfer, and what each party heard and counted; iterations as they went."""

    ends: Ends
    heard: tuple[Heard, Heard]
    iterations: list[Iteration]
    counted: tuple[dict[str, Any], dict[str, Any]]

    @property
    def nets(self) -> tuple[Params, Params]:
        return self.ends.a.params, self.ends.b.params


@contextlib.contextmanager
def multiplications(agreed: Agreed) -> Iterator[tuple[Multiplication, Multiplication]]:
    """Both ends, with no process but this one."""
    if agreed.protocol != "paillier":
        with protocols.multiplications(agreed) as found:
            yield found
        return
    ends = [Paillier(agreed.key_bits, insecure=True, pool=Pool(1)) for _ in "ab"]
    yield ends[0], ends[1]


def transfer(a: Party, b: Party, agreed: Agreed, *, links: tuple[Link, Link] | None = None) -> Done:
    """Run it to its end."""
    heard = Heard(), Heard()
    iterations: list[Iteration] = []
    with multiplications(agreed) as ends:
        done = run_together(a, b, agreed, ends, iterations.append, records=heard, links=links)
        counted = ends[0].describe(), ends[1].describe()
    return Done(done, heard, iterations, counted)


def both(
    a: Party,
    b: Party,
    agreed: Agreed,
    at_b: Agreed | None = None,
    *,
    ends: tuple[Multiplication, Multiplication] | None = None,
    links: tuple[Link, Link] | None = None,
    timeout_s: float = 20.0,
    peers: tuple[str, str] = ("party b", "party a"),
) -> list[Outcome | BaseException]:
    """What either party comes to, or dies of, by itself: nobody looks on, and no end is closed before both are done."""
    found: list[Outcome | BaseException] = [RuntimeError("still running")] * 2
    made = links or pair()

    def act(number: int, party: Party, own: Agreed, multiplication: Multiplication) -> None:
        channel = Channel(made[number], peers[number], timeout_s=timeout_s)
        try:
            found[number] = take_part(party, own, channel, multiplication, lambda *_: None)
        except BaseException as error:
            found[number] = error

    with contextlib.ExitStack() as stack:
        given = ends or stack.enter_context(multiplications(agreed))
        work = [(0, a, agreed, given[0]), (1, b, at_b or agreed, given[1])]
        threads = [threading.Thread(target=act, args=one, daemon=True) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for link in made:
            link.close()
    return found


class Watched:
    """An optimizer that keeps every gradient it is given."""

    def __init__(self, lr: float = 0.1, momentum: float = 0.0) -> None:
        self.gradients: list[Params] = []
        self._inner = sgd(lr=lr, momentum=momentum)

    @property
    def optimizer(self) -> Optimizer:
        return self._inner._replace(step=self._step)

    def _step(self, params: Params, grads: Params, state: Any, t: int, factor: float) -> Any:
        self.gradients.append(grads)
        return self._inner.step(params, grads, state, t, factor)


def same(one: Params, other: Params) -> bool:
    """Whether all entries are equal bit for bit, signs of zeros too."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(torch.int64), other[name].view(torch.int64)) for name, tensor in one.items()
    )


def furthest(one: Params, other: Params) -> float:
    """The largest difference of an entry."""
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())
