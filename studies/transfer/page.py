"""From rows to claims, plots and docs/studies/transfer.md. As a script: page.py results.json FOLDER."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from math import log
from pathlib import Path
from statistics import fmean
from typing import Any

import plots
from claims import Finding, Row, accuracy, findings
from cost_page import told as costs_told
from verdicts import LEVEL, deviation

HEAD = """# Transfer between two parties: what holds here

Made by `python studies/transfer/study.py --page docs/studies` from {rows} results, {seeds} seeds each, in
{minutes:.0f} minutes of processor time; do not edit.

Party A has labels, party B has none; they have other columns of {most} common people, of whom the first ones train.
breast-cancer and digits are scikit-learn's, fashion is 2,000 pictures of Fashion-MNIST at 14 x 14 pixels (2,000
others held out), each cut into two column halves, +1 for the upper half of the classes; synthetic is
`overlap-tables`, 500 rows each, 1,000 others held out. How many rows A has stays the same while the overlap grows.
Accuracy is of the labels that B gets for rows that nobody trained on. One setting for all, chosen before any result
was seen: a hidden layer of 32 and 16 hidden values at either party, Adam with step 0.02, 100 iterations, gamma 0.01,
l2 0.001, and, where nothing else is said, 200 common people of whom 100 are labelled. Every config is in
`studies/transfer/`, every change to it in `experiments.py`. Seeds vary which rows are held out (of fashion: which
pictures are there), who is at which party, the first weights, and all of synthetic.

Accuracies are of `protocol: plain`, but in one table: the encrypted protocols calculate the same up to rounding.

**Verdicts.** A claim is a difference in points between runs of the same seed, positive if it is as claimed; a margin
that it allows for is added. It *holds* if a one-sided t-test over seeds excludes 0 at {level:.0%}, *does not hold
here* if it excludes 0 the other way, and is *not distinguishable* otherwise. Of claims without any truth in them one in
twenty would be found to hold: with {tests} tests, some of the verdicts are chance. Claims about common people, labels
and the Taylor loss go the way that readers of Liu et al. 2018 report; the others, and all margins, are ours.
"""
LIMITS = """## Limits

- Four data sets, one setting, five seeds: what is not distinguishable here may be with more of them.
- The halves of one table are an easy case: what the two parties know of a person is much the same.
- *B alone* is given labels that B does not have in this setting. *A's columns* is what A could say of the held-out
  people if it had their columns: a reference, not something to choose, and no bound, since B's columns are others.
- synthetic is linear by construction, so a regression is the right model of it; the nets of the transfer have to find
  that out. Regressions and nets of *B alone* are scikit-learn's, and nothing is tuned.
- B's rows outside the overlap do not train: nothing in the method uses them.
- Costs are of one machine, one run, both parties in one process on its two cores, without a network; parties with a
  machine each have more processors and wait for each other's messages.
"""


def write(found: dict[str, Any], folder: Path) -> None:
    """Write the page and its plots into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = found["rows"]
    results = findings(rows)
    plots.draw(rows, folder)
    facts = {"rows": len(rows), "seeds": found["seeds"], "minutes": found["minutes"], "level": LEVEL}
    facts |= {"tests": len(results), "most": 200}
    parts = [HEAD.format(**facts), _claims(results), _overlap(rows), _labelled(rows), _loss(rows), _nets(rows)]
    parts += [_start(rows), _same(rows), costs_told(_of(rows, "costs")), LIMITS]
    (folder / "transfer.md").write_text("\n".join(parts))


def _claims(results: Sequence[Finding]) -> str:
    """A line for each claim, a column for each data set."""
    names = list(dict.fromkeys(one.data for one in results))
    lines = ["## Claims\n", f"| claim | {' | '.join(names)} |", f"|{'---|' * (len(names) + 1)}"]
    for claim in dict.fromkeys(one.claim for one in results):
        cells = {one.data: _cell(one) for one in results if one.claim == claim}
        lines.append(f"| {claim.statement} | {' | '.join(cells.get(name, '') for name in names)} |")
    return "\n".join([*lines, ""])


def _cell(one: Finding) -> str:
    return f"{one.mean:+.1f} ± {deviation(one.differences):.1f}, **{one.verdict}**"


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment]


def _by_data(rows: Sequence[Row], keys: Sequence[str], titles: Sequence[str]) -> str:
    """Accuracy, a line for each combination of ``keys`` and a column for each data set."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    lines = [f"| {' | '.join([*titles, *names])} |", f"|{'---|' * (len(titles) + len(names))}"]
    for key in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        groups = [[row for row in rows if row["data"] == name and tuple(row[k] for k in keys) == key] for name in names]
        lines.append(f"| {' | '.join([*map(str, key), *map(_told, groups)])} |")
    return "\n".join([*lines, ""])


def _told(group: Sequence[Row], value: Callable[[Row], float] = accuracy) -> str:
    values = [value(row) for row in group]
    return f"{fmean(values):.1f}" + (f" ± {deviation(values):.1f}" if len(values) > 1 else "")


def _arms(rows: Iterable[Row], key: str) -> list[Row]:
    """Sorted by arm, as they first appear, then by the key."""
    found = list(rows)
    arms = list(dict.fromkeys(row["arm"] for row in found))
    return sorted(found, key=lambda row: (arms.index(row["arm"]), row[key]))


def _overlap(rows: Sequence[Row]) -> str:
    text = "## Common people\n\n![Accuracy against the number of common people](transfer-overlap.svg)\n\nAccuracy, %.\n"
    return text + "\n" + _by_data(_arms(_of(rows, "overlap"), "overlap"), ("arm", "overlap"), ("arm", "overlap"))


def _labelled(rows: Sequence[Row]) -> str:
    text = (
        "## Labels, and what either could do alone\n\n"
        "![Accuracy against the number of labels](transfer-labelled.svg)\n\n"
        "Accuracy, %, with 200 common people. *B alone*: logistic regression of B's columns on the same labelled "
        "people, were B given their labels; *a net*: scikit-learn's, of a party's size and training, in its place. "
        "*A's columns*: logistic regression on all of A's rows and labels, asked about A's columns of the held-out "
        "people. *one answer*: the larger class for everybody.\n"
    )
    varying, fixed = ("transfer", "B alone", "B alone, a net"), ("A's columns", "one answer")
    own = _arms(_of(rows, "labelled"), "labelled")
    shown = [row for row in own if row["arm"] in varying]
    shown += [{**row, "labelled": ""} for row in own if row["arm"] in fixed and row["labelled"] == 10]
    return text + "\n" + _by_data(shown, ("arm", "labelled"), ("arm", "labels"))


def _loss(rows: Sequence[Row]) -> str:
    text = "## Taylor loss\n\nAccuracy, %. The exact loss can be calculated in the clear only.\n"
    return text + "\n" + _by_data(_of(rows, "loss"), ("arm",), ("loss",))


def _nets(rows: Sequence[Row]) -> str:
    own = _of(rows, "nets")
    zeros = {arm: fmean(row["zeros"] for row in own if row["arm"] == arm) for arm in {row["arm"] for row in own}}
    told = ", ".join(f"{arm} {100 * zeros[arm]:.0f} %" for arm in dict.fromkeys(row["arm"] for row in own))
    text = (
        "## Pruned and regularised nets\n\nAccuracy, %. At both parties; neither hears of it from the other. Weights "
        f"that are 0 in the end: {told}. {_halted(own)}\n"
    )
    return text + "\n" + _by_data(own, ("arm",), ("nets",))


def _halted(rows: Sequence[Row]) -> str:
    """Runs that ended where all hidden values are 0: there the loss is ln 2, and no gradient leads away."""
    which = [f"{row['arm']} on {row['data']}, seed {row['seed']}" for row in rows if abs(row["loss"] - log(2)) < 1e-3]
    if not which:
        return "No run came to a halt with all hidden values at 0."
    return f"All hidden values went to 0, where the loss is ln 2 and its gradient 0, in: {'; '.join(which)}."


def _start(rows: Sequence[Row]) -> str:
    own = _of(rows, "start")
    source = _told(own, lambda row: 100 * row["source_accuracy"])
    text = (
        "## A net from a federation\n\nAccuracy, %. Ten clients with A's columns of the digits train a net on all ten "
        f"classes (accuracy {source}) with `fedsim run`; `source_run` gives its layers but the last to A. The same "
        "rows are held out. B's net starts anew; with `trains: head` all but the last layer stays as it started, at "
        "both parties.\n"
    )
    return text + "\n" + _by_data(own, ("trains", "arm"), ("trains", "A's net"))


def _same(rows: Sequence[Row]) -> str:
    own = _of(rows, "same")
    text = (
        "## Secret sharing beside plain\n\nAccuracy, %, with 50 common people, 20 of them labelled; Adam as "
        "everywhere, of all seeds, and SGD with step 0.2 of the first. The protocols round a gradient at about 1e-9. "
        "Adam divides a gradient by its own size, so where one is nearly 0 its rounding can become a whole step, and "
        "the nets drift apart. With SGD they stay together.\n"
    )
    apart: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(row["data"] for row in own):
        for arm in ("adam", "sgd"):
            some = [row for row in own if row["data"] == name and row["arm"] == f"{arm}, secret-sharing"]
            labels, params = (max(row[key] for row in some) for key in ("different", "apart"))
            apart.setdefault((arm, "labels that differ, at most, %"), []).append(f"{100 * labels:.1f}")
            apart.setdefault((arm, "parameters apart, at most"), []).append(f"{params:.0e}")
    lines = [f"| {arm}, {what} | {' | '.join(cells)} |" for (arm, what), cells in apart.items()]
    return text + "\n" + _by_data(own, ("arm",), ("",)) + "\n".join([*lines, ""])


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
