"""The papers' claims as differences of accuracy between runs of one seed: positive where it is as claimed."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

from verdicts import Pick, Row, rows_of, verdict


class Claim(NamedTuple):
    """statement, source: for the table. better, worse: which rows of an experiment; margin: in points, added."""

    statement: str
    source: str
    experiment: str
    better: Pick
    worse: Pick
    margin: float = 0.0


class Finding(NamedTuple):
    """A claim at a place: differences by seed, in points."""

    claim: Claim
    place: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.differences)

    @property
    def verdict(self) -> str:
        """By the t-test of all studies."""
        return verdict(self.differences)


TICKET, REINIT, MASK = (lambda level, arm=arm: rows_of(arm, level=level) for arm in ("ticket", "reinit", "random-mask"))
RETHINKING = "Liu 2019"
CLAIMS = (
    Claim(
        "tickets, 7 levels (21 %): not below the whole net by more than 0.5",
        "Frankle 2019",
        "tickets",
        TICKET(7),
        TICKET(0),
        0.5,
    ),
    Claim("tickets, 7 levels (21 %): above newly drawn weights", "Frankle 2019", "tickets", TICKET(7), REINIT(7)),
    Claim("tickets, 9 levels (13 %): above newly drawn weights", "Frankle 2019", "tickets", TICKET(9), REINIT(9)),
    Claim("tickets, 9 levels (13 %): above random masks", "Frankle 2019", "tickets", TICKET(9), MASK(9)),
    Claim("newly drawn weights above random masks, 9 levels", "Frankle 2019, app. E", "tickets", REINIT(9), MASK(9)),
    Claim("seven levels above one shot of as much (21 %)", "Frankle 2019", "tickets", TICKET(7), rows_of("one-shot")),
    Claim(
        "Scratch-B: not below fine-tuning by more than 0.3",
        RETHINKING,
        "arms",
        rows_of("scratch-b"),
        rows_of("fine-tune"),
        0.3,
    ),
    Claim(
        "Scratch-E: not below fine-tuning by more than 1",
        RETHINKING,
        "arms",
        rows_of("scratch-e"),
        rows_of("fine-tune"),
        1.0,
    ),
    Claim(
        "Scratch-B: not below Scratch-E by more than 0.2",
        RETHINKING,
        "arms",
        rows_of("scratch-b"),
        rows_of("scratch-e"),
        0.2,
    ),
    Claim(
        "95 % of single weights gone: fine-tuned above Scratch-E",
        RETHINKING,
        "arms",
        rows_of("magnitude 95%, fine-tune"),
        rows_of("magnitude 95%, scratch-e"),
    ),
    Claim(
        "half of the single weights gone: Scratch-E not below fine-tuning by more than 0.5",
        RETHINKING,
        "arms",
        rows_of("magnitude 50%, scratch-e"),
        rows_of("magnitude 50%, fine-tune"),
        0.5,
    ),
    Claim(
        "L1 norms: fine-tuned above filters removed at random",
        "Li 2017",
        "arms",
        rows_of("fine-tune"),
        rows_of("random"),
    ),
    Claim("ThiNet: fine-tuned above L1 norms", "Luo 2017", "arms", rows_of("thinet"), rows_of("fine-tune")),
    Claim(
        "reconstruction: fine-tuned above L1 norms", "He 2017", "arms", rows_of("reconstruction"), rows_of("fine-tune")
    ),
    *(
        Claim(
            f"targeted dropout, {share:.0%} pruned: above {told}",
            "Gomez 2019",
            "targeted",
            rows_of(arm, sparsity=share),
            rows_of(other, sparsity=share),
        )
        for share in (0.5, 0.75, 0.9)
        for arm, other, told in (("targeted", "plain", "plain"), ("targeted", "dropconnect", "untargeted dropconnect"))
    ),
    Claim(
        "targeted dropout: costs no more than 1 unpruned",
        "Gomez 2019",
        "targeted",
        rows_of("targeted", sparsity=0.0),
        rows_of("plain", sparsity=0.0),
        1.0,
    ),
    Claim(
        "targeted dropout: 75 % pruned costs no more than 0.5",
        "Gomez 2019",
        "targeted",
        rows_of("targeted", sparsity=0.75),
        rows_of("targeted", sparsity=0.0),
        0.5,
    ),
    Claim(
        "targeted dropout, 90 % pruned: ramped above constant",
        "Gomez 2019",
        "targeted",
        rows_of("targeted, ramped", sparsity=0.9),
        rows_of("targeted", sparsity=0.9),
    ),
    Claim(
        "FBS at density 0.5: within 1.5 of density 1",
        "Gao 2019",
        "gates",
        rows_of("fbs", density=0.5),
        rows_of("fbs", density=1.0),
        1.5,
    ),
    Claim(
        "FBS at density 1: within 0.5 of the plain net",
        "Gao 2019",
        "gates",
        rows_of("fbs", density=1.0),
        rows_of("l1-filter", density=1.0),
        0.5,
    ),
    *(
        Claim(
            f"FBS above static pruning of that width, density {density}",
            "Gao 2019",
            "gates",
            rows_of("fbs", density=density),
            rows_of("l1-filter", density=density),
        )
        for density in (0.5, 0.3)
    ),
)


def findings(rows: Sequence[Row], claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Of all claims at all places where both sides were run; NaN and missing accuracies count as guessing."""
    found = []
    for claim in claims:
        own = [row for row in rows if row["experiment"] == claim.experiment]
        for data, split in dict.fromkeys((row["data"], row["split"]) for row in own):
            here = [row for row in own if (row["data"], row["split"]) == (data, split)]
            better = {row["seed"]: accuracy(row) for row in here if claim.better(row)}
            worse = {row["seed"]: accuracy(row) for row in here if claim.worse(row)}
            both = sorted(better.keys() & worse.keys())
            if both:
                differences = tuple(better[seed] - worse[seed] + claim.margin for seed in both)
                found.append(Finding(claim, f"{data}, {split}", differences))
    return found


def accuracy(row: Row) -> float:
    """Percent."""
    found = row["accuracy"]
    return 10.0 if found is None or math.isnan(found) else 100.0 * float(found)
