"""Claims as differences of accuracy between runs of one seed: positive where it is as claimed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

from verdicts import Pick, Row, rows_of, verdict


class Claim(NamedTuple):
    """better, worse: which rows of an experiment. margin: in points, added; either way: minus the distance."""

    statement: str
    experiment: str
    better: Pick
    worse: Pick
    margin: float = 0.0
    either_way: bool = False


class Finding(NamedTuple):
    """A claim on a data set: differences by seed, in points."""

    claim: Claim
    data: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.differences)

    @property
    def verdict(self) -> str:
        """By the t-test of all studies."""
        return verdict(self.differences)


_FEW, _ALL = "20 labelled", "all labelled"
CLAIMS = (
    *(
        Claim(
            f"200 common people above 20 by 2 or more, {arm}",
            "overlap",
            rows_of(arm, overlap=200),
            rows_of(arm, overlap=20),
            -2.0,
        )
        for arm in (_FEW, _ALL)
    ),
    *(
        Claim(
            f"{more} common people not below {fewer} by more than 1, all labelled",
            "overlap",
            rows_of(_ALL, overlap=more),
            rows_of(_ALL, overlap=fewer),
            1.0,
        )
        for fewer, more in ((20, 50), (50, 100), (100, 200))
    ),
    Claim("100 labels above 10", "labelled", rows_of("transfer", labelled=100), rows_of("transfer", labelled=10)),
    *(
        Claim(
            f"{n} labels: transfer above {told}", "labelled", rows_of("transfer", labelled=n), rows_of(arm, labelled=n)
        )
        for arm, told in (("B alone", "B alone, a regression"), ("B alone, a net", "B alone, a net"))
        for n in (10, 20, 50, 100)
    ),
    Claim(
        "Taylor loss within 2 of the exact one, seed by seed", "loss", rows_of("taylor"), rows_of("exact"), 2.0, True
    ),
    Claim(
        "secret sharing within 1 of plain, seed by seed",
        "same",
        rows_of("adam, secret-sharing"),
        rows_of("adam, plain"),
        1.0,
        True,
    ),
    *(
        Claim(f"{arm}: not below the plain net by more than 1", "nets", rows_of(arm), rows_of("plain"), 1.0)
        for arm in ("magnitude 50 %", "magnitude 80 %", "dropout 0.5")
    ),
    *(
        Claim(
            f"net of a federation above a new one, trains: {trains}",
            "start",
            rows_of("source run", trains=trains),
            rows_of("new", trains=trains),
        )
        for trains in ("all", "head")
    ),
)


def findings(rows: Sequence[Row], claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Of all claims on all data sets where both sides were run."""
    found = []
    for claim in claims:
        own = [row for row in rows if row["experiment"] == claim.experiment]
        for data in dict.fromkeys(row["data"] for row in own):
            here = [row for row in own if row["data"] == data]
            better = {row["seed"]: accuracy(row) for row in here if claim.better(row)}
            worse = {row["seed"]: accuracy(row) for row in here if claim.worse(row)}
            both = sorted(better.keys() & worse.keys())
            if both:
                differences = tuple(_as_claimed(claim, better[seed] - worse[seed]) for seed in both)
                found.append(Finding(claim, data, differences))
    return found


def _as_claimed(claim: Claim, difference: float) -> float:
    return claim.margin - abs(difference) if claim.either_way else difference + claim.margin


def accuracy(row: Row) -> float:
    """Percent."""
    return 100.0 * float(row["accuracy"])
