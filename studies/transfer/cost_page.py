"""The part of the page that is about costs: of one machine, beside what was asked of them."""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
HEAD = """## Costs

![Seconds and bytes of an iteration](transfer-costs.svg)

One linear layer at either party, 15 columns each, half of the common people labelled, nobody to predict for. Seconds
are the median of ten iterations, after a first one with the making of keys, of both parties together in one process on
a machine with 2 cores. Runs were made one after the other, {times} of each, whose least numbers these are; others
worked on the machine (its load was {load} when runs began), and the same run took up to
twice as long at one time as at another. Triples are dealt by a helper in the same process, or made by
the two parties by Paillier with keys of 2048 bits: offline. Online and offline are means over the iterations of a run
(offline with the making of keys). MB: both ways together.
"""
COUNTS = """### Ciphertexts

Of an iteration, counted in `summary.json` and equal to `fedsim.transfer.encrypted.ciphertexts_of` in every run, or
the study would have stopped. *As in the paper*: Algorithm 1 as it is written down, `N_c (d^2 + d) + N_AB d` from A,
one more from B, and a masked one of every parameter and of the loss. Two savings: `y^2 = 1` lets the matrices of
every person collapse into one sum, and a ciphertext of 2048 bits holds up to 31 numbers (of 3072 bits more). The
second one is absent where all of a net is trained (`trains: all`): there numbers travel one by one.
"""


def told(rows: Sequence[Row]) -> str:
    """Tables of seconds, bytes and ciphertexts, and the claims about them."""
    loads = [load for row in rows for load in row["load"]]
    facts = {"load": f"{min(loads):.1f} to {max(loads):.1f}", "times": min(len(row["load"]) for row in rows)}
    encrypted = [row for row in rows if row["protocol"] == "paillier"]
    parts = [HEAD.format(**facts), _table(rows), _claims(rows), COUNTS]
    return "\n".join([*parts, _fixed(encrypted), _counts(encrypted)])


def _name(row: Row) -> str:
    if row["protocol"] == "paillier":
        return f"paillier, {row['key_bits']} bits"
    return str(row["protocol"]) + (", triples of the two" if row["triples"] == "paillier" else "")


def _net(row: Row) -> str:
    return "linear" if row["trains"] == "linear" else "8 hidden units, all"


def _table(rows: Sequence[Row]) -> str:
    titles = ("protocol", "net", "overlap", "hidden", "seconds", "online", "offline", "MB", "first iteration, s")
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        parts = [_short(row[part]) if part in row else "" for part in ("online", "offline")]
        parts[1] += f", {row['beforehand'] / 1e6:.3f} MB" if row["triples"] == "paillier" else ""
        megabytes = f"{(row['up'] + row['down']) / 1e6:.3f}"
        cells = [
            _name(row),
            _net(row),
            row["overlap"],
            row["hidden"],
            _short(row["seconds"]),
            *parts,
            megabytes,
            _short(row["first"]),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _short(seconds: float) -> str:
    return f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"


def _counts(rows: Sequence[Row]) -> str:
    lines = ["| key | net | overlap | hidden | ciphertexts | as in the paper | fewer by |", f"|{'---|' * 7}"]
    for row in rows:
        ratio = row["paper"] / row["ciphertexts"]
        cells = [row["key_bits"], _net(row), row["overlap"], row["hidden"], row["ciphertexts"], row["paper"]]
        lines.append(
            f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else cell for cell in cells)} | {ratio:.1f} |"
        )
    return "\n".join([*lines, ""])


def _fixed(rows: Sequence[Row]) -> str:
    """How many ciphertexts there are whatever the overlap, of 16 hidden values and keys of 2048 bits."""
    counts = {row["overlap"]: row["ciphertexts"] for row in rows if _key(row)[2:] == (16, 2048)}
    if not {50, 400} <= counts.keys():
        return ""
    each = (counts[400] - counts[50]) / 350
    return (
        f"With 16 hidden values and 2048 bits there are {each:g} ciphertexts for each common person and "
        f"{counts[50] - 50 * each:g} whatever the overlap, so twice the people are less than twice the work.\n"
    )


def _claims(rows: Sequence[Row]) -> str:
    """Of one run each, so without a test: whether the number is in the range."""
    lines = ["### Claims about costs\n", "| claim | measured | verdict |", "|---|---|---|"]
    for statement, values, fits in _asked(rows):
        if values:
            verdict = "holds" if all(map(fits, values)) else "does not hold here"
            lines.append(f"| {statement} | {', '.join(f'{value:.3g}' for value in values)} | **{verdict}** |")
    lines += ["", _same_bits(rows)]
    return "\n".join([*lines, ""])


def _asked(rows: Sequence[Row]) -> list[tuple[str, list[float], Callable[[float], bool]]]:
    linear = {_key(row): row for row in rows if row["trains"] == "linear" and row["triples"] == "helper"}

    def ratios(top: Callable[[Row], float], below: str, bottom: str, bits: int = 2048) -> list[float]:
        """Of Paillier to secret sharing, for every overlap at 16 hidden values."""
        found = []
        for overlap in (50, 100, 200, 400):
            mine = linear.get(("paillier", overlap, 16, bits))
            other = linear.get((below, overlap, 16, 2048))
            found += [top(mine) / other[bottom]] if mine and other else []
        return found

    def doubled(bits: int) -> list[float]:
        pairs = [
            (linear.get(("paillier", n, 16, bits)), linear.get(("paillier", 2 * n, 16, bits))) for n in (50, 100, 200)
        ]
        return [two["seconds"] / one["seconds"] for one, two in pairs if one and two]

    def seconds(row: Row) -> float:
        return float(row["seconds"])

    sharing = "secret-sharing"
    return [
        (
            "Paillier, 2048 bits: twice the overlap (50, 100, 200) takes 1.7 to 2.3 times as long",
            doubled(2048),
            _doubles,
        ),
        ("Paillier, 3072 bits: the same", doubled(3072), _doubles),
        (
            "secret sharing: online at least 50 times as fast as Paillier (overlap 50, 100, 200, 400)",
            ratios(seconds, sharing, "online"),
            lambda ratio: ratio >= 50,
        ),
        (
            "secret sharing: whole iteration, nets and triples with it, at least 10 times as fast",
            ratios(seconds, sharing, "seconds"),
            lambda ratio: ratio >= 10,
        ),
    ]


def _doubles(ratio: float) -> bool:
    return 1.7 <= ratio <= 2.3


def _key(row: Row) -> tuple[Any, ...]:
    return row["protocol"], row["overlap"], row["hidden"], row["key_bits"]


def _same_bits(rows: Sequence[Row]) -> str:
    digests: dict[tuple[Any, ...], dict[str, set[str]]] = {}
    for row in rows:
        place = digests.setdefault((row["overlap"], row["hidden"], row["trains"]), {})
        place.setdefault(row["protocol"], set()).add(row["nets"])
    both = [one for one in digests.values() if {"paillier", "secret-sharing"} <= one.keys()]
    equal = sum(one["paillier"] == one["secret-sharing"] for one in both)
    return (
        f"In {equal} of {len(both)} settings Paillier and secret sharing, with whatever keys and triples, gave the "
        "same nets, bit for bit."
    )
