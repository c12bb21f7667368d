"""What an iteration costs, measured one run after the other, and how many ciphertexts it is made of."""

import hashlib
import os
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import fedsim
from fedsim.transfer import terms
from fedsim.transfer.encrypted import ciphertexts_of

HERE = Path(__file__).parent
Row = dict[str, Any]
WIDTH = 15 + 1  # columns of either party, and one for the bias


class Cell(NamedTuple):
    """What is measured. trains: a linear layer, or all of a small net. triples: who makes them."""

    protocol: str
    overlap: int = 100
    hidden: int = 16
    key_bits: int = 2048
    trains: str = "linear"
    triples: str = "helper"


PROTOCOLS = ("plain", "secret-sharing", "paillier")
OVERLAPS, HIDDEN = (50, 100, 200, 400), (4, 8, 16, 32)
CELLS = (
    *(Cell(protocol, overlap=count) for protocol in PROTOCOLS for count in OVERLAPS),
    *(Cell(protocol, hidden=d) for protocol in PROTOCOLS for d in HIDDEN if d != 16),
    *(Cell("paillier", overlap=count, key_bits=3072) for count in OVERLAPS),
    *(Cell("paillier", hidden=d, key_bits=3072) for d in HIDDEN if d != 16),
    *(Cell(protocol, overlap=50, hidden=4, trains="all") for protocol in PROTOCOLS),
    *(Cell("secret-sharing", overlap=count, triples="paillier") for count in OVERLAPS),
)
FAST = (Cell("secret-sharing", 50, 4), Cell("paillier", 50, 4))


def measured(cell: Cell, out: Path) -> Row:
    """Seconds and bytes of an iteration; the first one is left out, it has the making of keys.

    Raises:
        ValueError: other ciphertexts were sent than the formula has.
    """
    changes: dict[str, Any] = {"output": str(out), "transfer.protocol": cell.protocol, "transfer.hidden": cell.hidden}
    changes |= {"transfer.overlap": cell.overlap, "transfer.labelled": cell.overlap // 2}
    changes |= {"transfer.key_bits": cell.key_bits, "transfer.triples": cell.triples}
    if cell.trains == "all":
        changes["model"] = {"name": "mlp", "hidden": [8]}
    before = os.getloadavg()[0]
    run = fedsim.run(HERE / "costs.yaml", changes)
    told = run.summary["transfer"]
    row = {
        "experiment": "costs",
        **cell._asdict(),
        "seconds": median(one.seconds for one in run.rounds[1:]),
        "first": run.rounds[0].seconds,
        "up": run.rounds[-1].bytes_up,
        "down": run.rounds[-1].bytes_down,
        "load": [before],
        "nets": _digest(run.folder),
    }
    if cell.protocol == "paillier":
        row |= {"ciphertexts": _counted(cell, told, len(run.rounds)), "paper": in_the_paper(cell)}
    if cell.protocol == "secret-sharing":
        for part in ("online", "offline"):
            row[part] = max(told[f"counted_by_{role}"][f"{part}_seconds"] for role in "ab") / len(run.rounds)
        row["beforehand"] = sum(told[f"sent_by_{role}"].get("factor", 0) for role in "ab") / len(run.rounds)
    return row


def faster(one: Row, two: Row) -> Row:
    """Of a cell that was measured twice: the smaller seconds of each kind.

    Raises:
        ValueError: not the same was sent, or learnt.
    """
    kinds = {"seconds", "first", "online", "offline", "load"}
    if {key: value for key, value in one.items() if key not in kinds} != {
        k: v for k, v in two.items() if k not in kinds
    }:
        raise ValueError(f"the same cell came out otherwise: {one}, {two}")
    least = {key: min(one[key], two[key]) for key in (kinds & one.keys()) - {"load"}}
    return {**two, **least, "load": one["load"] + two["load"]}


def _digest(folder: Path) -> str:
    """Of both parties' nets, to see whether two protocols give the same bits."""
    return hashlib.sha256(b"".join((folder / f"party-{role}.safetensors").read_bytes() for role in "ab")).hexdigest()


def _counted(cell: Cell, told: Row, iterations: int) -> int:
    """Ciphertexts of an iteration of both parties, as sent and as the formula says."""
    body = (WIDTH * 8, 8 + 1) if cell.trains == "all" else (0, WIDTH)
    plans = {role: terms.plan(role, cell.overlap, cell.hidden, body[1], body[0]) for role in ("a", "b")}
    found = 0
    for role, other in (("a", "b"), ("b", "a")):
        sent = told[f"counted_by_{role}"]["ciphertexts"]
        expected = {
            "secrets": ciphertexts_of(plans[other], cell.key_bits)[0],
            "masked": ciphertexts_of(plans[role], cell.key_bits)[1],
        }
        if sent != {kind: iterations * count for kind, count in expected.items()}:
            raise ValueError(
                f"{cell}: party {role} sent {sent}, expected {expected} in each of {iterations} iterations"
            )
        found += sum(expected.values())
    return found


def in_the_paper(cell: Cell) -> int:
    """Ciphertexts of an iteration as Liu et al. 2018 write it down, unpacked, without savings.

    ``N_c (d^2 + d) + N_AB d`` from A, one more (the loss) from B, and a masked one of each parameter and of the loss.
    """
    d, parameters = cell.hidden, 2 * (WIDTH * cell.hidden if cell.trains == "linear" else WIDTH * 8 + 9 * cell.hidden)
    secrets = cell.overlap // 2 * (d * d + d) + cell.overlap * d
    return 2 * secrets + 1 + parameters + 1
