"""The papers' claims about directions, as differences between runs of one seed: positive where it is as claimed."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import verdicts
from verdicts import LEVEL

__all__ = ["CLAIMS", "LEVEL", "Claim", "Finding", "findings"]

HOPELESS = 10.0  # nats; guessing among ten classes costs 2.3

Row = dict[str, Any]
Value = Callable[[Row], float]
Key = tuple[str, str]  # experiment, variant


class Claim(NamedTuple):
    """statement: as the paper has it, for this study. source: section of a paper. unit: of the difference.

    better, worse: runs whose values are compared; value: the larger of better is as claimed.
    """

    statement: str
    source: str
    unit: str
    better: Key
    worse: Key
    value: Value
    other: Value | None = None  # of worse, if it is another one


class Finding(NamedTuple):
    """A claim in one federation: differences by seed, and the verdict."""

    claim: Claim
    federation: str
    differences: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return fmean(self.differences)

    @property
    def deviation(self) -> float:
        """Sample deviation over seeds."""
        return verdicts.deviation(self.differences)

    @property
    def verdict(self) -> str:
        """By the t-test of all studies."""
        return verdicts.verdict(self.differences)


def gap(row: Row) -> float:
    """How much worse it is on the test set than on what it was trained on, nats; negative, as smaller is better."""
    return -float(row["test_loss"] - row["train_loss"])


def accuracy(row: Row) -> float:
    """On the test set, percent; that of guessing for a run that diverged."""
    return 100 * float(row.get("test_accuracy", 0.1))


def single(row: Row) -> float:
    """Mean accuracy of single heads, percent."""
    return 100 * fmean(row["head_accuracies"])


def agreement(row: Row) -> float:
    """Of two heads, percent of examples."""
    return -100 * float(row["disagreement"])


def kept_when_occluded(row: Row) -> float:
    """Accuracy lost to a square of zeros, negative, percent."""
    return 100 * float(row["occluded_accuracy"] - row["test_accuracy"])


def kept_when_pruned(row: Row) -> float:
    """Accuracy lost to pruning, negative, percent."""
    return 100 * float(row["pruned_accuracy"] - row["test_accuracy"])


def early(row: Row) -> float:
    """Mean training loss of the first three rounds, nats; the negative."""
    return -fmean(row["train_losses"][:3])


def deepest_alone(row: Row) -> float:
    """Accuracy of the deepest column alone, less that of the whole net, percent."""
    return 100 * float(row["deepest_accuracy"] - row["test_accuracy"])


def last_training(row: Row) -> float:
    """Training loss of the last round, nats, at most HOPELESS, which stands for divergence too; the negative."""
    return -min(HOPELESS, row.get("train_losses", [HOPELESS])[-1])


def test_loss(row: Row) -> float:
    """Nats; the negative."""
    return -float(row["test_loss"])


def _smaller_gap(name: str, source: str, than: str = "plain") -> Claim:
    return Claim(
        f"{name}: a smaller gap between training and test loss than without",
        source,
        "nats",
        (name, ""),
        (than, ""),
        gap,
    )


PLAIN, DROPOUT, BLOCK = ("plain", ""), ("dropout-convolutions", ""), ("dropblock", "")
CLAIMS = (
    _smaller_gap("dropout", "Srivastava 2014"),
    _smaller_gap("spatial-dropout", "Tompson 2015"),
    _smaller_gap("dropblock", "Ghiasi 2018"),
    _smaller_gap("dropconnect", "Wan 2013"),
    _smaller_gap("variational-dropout", "Kingma 2015"),
    _smaller_gap("cutout", "DeVries 2017"),
    _smaller_gap("mixup", "Zhang 2018"),
    _smaller_gap("label-smoothing", "Szegedy 2016"),
    _smaller_gap("stochastic-depth", "Huang 2016", "plain-resnet"),
    _smaller_gap("shakedrop", "Yamada 2018", "plain-resnet"),
    Claim(
        "dropblock: test accuracy above dropout's of the same rate behind convolutions",
        "Ghiasi 2018",
        "points",
        BLOCK,
        DROPOUT,
        accuracy,
    ),
    Claim(
        "dropblock: loses less accuracy to an occluded square than dropout behind convolutions",
        "Ghiasi 2018",
        "points",
        BLOCK,
        DROPOUT,
        kept_when_occluded,
    ),
    Claim(
        "cutout: loses less accuracy to an occluded square than the plain model",
        "DeVries 2017",
        "points",
        ("cutout", ""),
        PLAIN,
        kept_when_occluded,
    ),
    Claim(
        "dropblock at 0.3: a rate that grows ends with a lower test loss than a constant one",
        "Ghiasi 2018",
        "nats",
        ("dropblock-schedules", "linear"),
        ("dropblock-schedules", "constant"),
        test_loss,
    ),
    Claim(
        "multi-sample dropout: training loss falls faster with 2 samples than with 1",
        "Inoue 2019",
        "nats",
        ("multi-sample-dropout", "2"),
        ("multi-sample-dropout", "1"),
        early,
    ),
    Claim(
        "multi-sample dropout: training loss falls faster with 8 samples than with 2",
        "Inoue 2019",
        "nats",
        ("multi-sample-dropout", "8"),
        ("multi-sample-dropout", "2"),
        early,
    ),
    Claim(
        "multi-sample dropout: 8 samples end with a higher test accuracy than 1",
        "Inoue 2019",
        "points",
        ("multi-sample-dropout", "8"),
        ("multi-sample-dropout", "1"),
        accuracy,
    ),
    Claim(
        "targeted dropout: loses less accuracy than the plain model when half of the weights are pruned",
        "Gomez 2019",
        "points",
        ("targeted-dropout", ""),
        PLAIN,
        kept_when_pruned,
    ),
    Claim(
        "targeted dropout: loses less accuracy than with dropout when half of the weights are pruned",
        "Gomez 2019",
        "points",
        ("targeted-dropout", ""),
        ("dropout", ""),
        kept_when_pruned,
    ),
    Claim(
        "collaborative, 40 % wrong labels: the first of four heads is better than a single net",
        "Song 2018",
        "points",
        ("noisy-labels", "collaborative"),
        ("noisy-labels", "one head"),
        accuracy,
    ),
    Claim(
        "collaborative, 40 % wrong labels: better than without the consensus (beta 1)",
        "Song 2018",
        "points",
        ("noisy-labels", "collaborative"),
        ("noisy-labels", "no consensus"),
        accuracy,
    ),
    Claim(
        "collaborative, 40 % wrong labels: better than without rescaling",
        "Song 2018",
        "points",
        ("noisy-labels", "collaborative"),
        ("noisy-labels", "no rescaling"),
        accuracy,
    ),
    Claim(
        "ensemblenet, mu 0.5: three heads of half the width beat one net",
        "Li 2019",
        "points",
        ("ensemblenet", "0.5"),
        PLAIN,
        accuracy,
    ),
    Claim(
        "ensemblenet, mu 0.5: the mean of the heads beats a head",
        "algebra",
        "points",
        ("ensemblenet", "0.5"),
        ("ensemblenet", "0.5"),
        accuracy,
        single,
    ),
    Claim(
        "ensemblenet: heads agree more at mu 0.5 than at 0",
        "algebra",
        "points",
        ("ensemblenet", "0.5"),
        ("ensemblenet", "0.0"),
        agreement,
    ),
    Claim(
        "ensemblenet: heads agree more at mu 1.5 than at 0.5",
        "algebra",
        "points",
        ("ensemblenet", "1.5"),
        ("ensemblenet", "0.5"),
        agreement,
    ),
    Claim(
        "ensemblenet: a single head is better at mu 1 than at 0",
        "algebra",
        "points",
        ("ensemblenet", "1.0"),
        ("ensemblenet", "0.0"),
        single,
    ),
    Claim(
        "Fixup: 20 layers without normalisation at step size 0.1 end better than with the default start",
        "Zhang 2019",
        "points",
        ("deep-residual", "fixup"),
        ("deep-residual", "default"),
        accuracy,
    ),
    Claim(
        "Fixup: six steps of a thousand residual blocks end lower than with the default start",
        "Zhang 2019",
        "nats",
        ("depth", "fixup, 1000 blocks"),
        ("depth", "default, 1000 blocks"),
        last_training,
    ),
    Claim(
        "droppath: the deepest column alone is nearer to the whole net than without",
        "Larsson 2017",
        "points",
        ("droppath", ""),
        ("plain-fractal", ""),
        deepest_alone,
    ),
    Claim(
        "two classes a client: group norm beats batch norm",
        "Hsieh 2020",
        "points",
        ("skewed-norms", "group"),
        ("skewed-norms", "batch"),
        accuracy,
    ),
    Claim(
        "tied dropout: a smaller gap on Shakespeare than without",
        "Gal 2016",
        "nats",
        ("speeches", "tied-dropout"),
        ("speeches", "plain"),
        gap,
    ),
    Claim(
        "zoneout: a smaller gap on Shakespeare than without",
        "Krueger 2017",
        "nats",
        ("speeches", "zoneout"),
        ("speeches", "plain"),
        gap,
    ),
)


def findings(rows: Sequence[Row], claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    """Every claim in every federation whose runs are there, seed by seed."""
    found = []
    by = {(row["experiment"], row["variant"], row["federation"], row["seed"]): row for row in rows}
    for claim in claims:
        for federation in dict.fromkeys(row["federation"] for row in rows):
            pairs = [
                (by[*claim.better, federation, seed], by[*claim.worse, federation, seed])
                for seed in sorted({row["seed"] for row in rows})
                if {(*claim.better, federation, seed), (*claim.worse, federation, seed)} <= by.keys()
            ]
            if pairs:
                other = claim.other or claim.value
                differences = tuple(claim.value(better) - other(worse) for better, worse in pairs)
                found.append(Finding(claim, federation, differences))
    return found
