"""The results page: docs/studies/regularisation.md with its plots, from results.json. python page.py RESULTS FOLDER."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import claims
import matplotlib.pyplot as plt
from claims import LEVEL, Finding, Row
from verdicts import deviation

HEAD = """# Regularisers in a federation: what holds here

Made by `python studies/regularisation/study.py --page docs/studies` from {runs} runs, {seeds} seeds each, in
{minutes:.0f} minutes on two cores; do not edit. {failed}

Federations of five clients: 1,000 pictures of Fashion-MNIST at 14 x 14 and 2,000 to test on, a CNN of three
convolutions (16, 32, 32 channels, group norm) and a hidden layer of 64, 12 rounds of 4 local epochs, SGD with
momentum at 0.05; IID, or with a Dirichlet split of 0.3. So few pictures are learnt by heart, so that a
regulariser has something to do. Residual nets, fractal nets (on digits) and the LSTM (on 300 windows of
Shakespeare) have configs of their own; every config is in `studies/regularisation/`. Strengths are the defaults
of the papers or of fedsim and were not tuned. No number here says how good a method is at its best, or at
another scale.

**Verdicts.** A claim is a difference between two runs of the same seed, positive if it is as claimed. It
*holds* if a one-sided t-test over seeds excludes 0 at {level:.0%}, *does not hold here* if it excludes 0 the
other way, and is *not distinguishable* otherwise. Of claims without any truth in them one in twenty would be
found to hold, and one in twenty not to: with {tests} tests, some of the verdicts are chance. Seeds vary the
model's first weights, the order of the batches and all masks; the data and the split stay the same.
"""


def write(found: dict[str, Any], folder: Path) -> None:
    """Write the page and its plots into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, results = found["rows"], claims.findings(found["rows"])
    done = [row for row in rows if row["status"] == "finished" and row["experiment"] != "depth"]
    _plot_gaps(done, folder / "regularisation-gaps.svg")
    _plot_samples(done, folder / "regularisation-samples.svg")
    _plot_heads(done, folder / "regularisation-heads.svg")
    parts = [_head(found, results), _claims(results), _methods(done), _heads(done), _depth(rows)]
    (folder / "regularisation.md").write_text("\n".join(parts))


def _head(found: dict[str, Any], results: Sequence[Finding]) -> str:
    failed = [row for row in found["rows"] if row["status"] != "finished"]
    names = sorted({f"{row['experiment']} ({row['variant'] or 'as it is'}, {row['federation']})" for row in failed})
    told = f"{len(failed)} of them diverged: {'; '.join(names)}. They count as guessing." if failed else "All finished."
    facts = {"runs": len(found["rows"]), "seeds": found["seeds"], "minutes": found["minutes"], "tests": len(results)}
    return HEAD.format(**facts, failed=told, level=LEVEL)


def _claims(results: Sequence[Finding]) -> str:
    lines = [
        "## Claims\n",
        "| claim | source | federation | difference, mean ± deviation | verdict |",
        "|---|---|---|---|---|",
    ]
    for one in results:
        number = f"{one.mean:+.3g} ± {one.deviation:.2g} {one.claim.unit}"
        lines.append(
            f"| {one.claim.statement} | {one.claim.source} | {one.federation} | {number} | **{one.verdict}** |"
        )
    return "\n".join([*lines, ""])


def _methods(rows: Sequence[Row]) -> str:
    lines = [
        "## Every method\n",
        "![The gap between training and test loss](regularisation-gaps.svg)\n",
        "Final global model in evaluation mode, mean ± sample deviation over seeds. A gap is also small where",
        "training itself got worse: hold accuracies against that of the plain model of the same kind.\n",
        "| method | federation | test accuracy, % | test loss | gap to training loss |",
        "|---|---|---|---|---|",
    ]
    for (name, variant, federation), group in _grouped(rows).items():
        told = f"{name}, {variant}" if variant else name
        accuracy = _told((100 * row["test_accuracy"] for row in group), 1)
        loss, gap = _told((row["test_loss"] for row in group), 2), _told((-claims.gap(row) for row in group), 2)
        lines.append(f"| {told} | {federation} | {accuracy} | {loss} | {gap} |")
    return "\n".join([*lines, ""])


def _heads(rows: Sequence[Row]) -> str:
    lines = [
        "## Several heads, several samples\n",
        "![Training loss by number of dropout samples](regularisation-samples.svg)\n",
        "![Heads of EnsembleNet by mu](regularisation-heads.svg)\n",
        "| model | federation | a head's accuracy, % | of what it answers, % | two heads disagree, % |",
        "|---|---|---|---|---|",
    ]
    for (name, variant, federation), group in _grouped(row for row in rows if "disagreement" in row).items():
        single = _told((claims.single(row) for row in group), 1)
        whole, apart = (
            _told((claims.accuracy(row) for row in group), 1),
            _told((-claims.agreement(r) for r in group), 1),
        )
        lines.append(f"| {name}, {variant} | {federation} | {single} | {whole} | {apart} |")
    return "\n".join([*lines, ""])


def _depth(rows: Sequence[Row]) -> str:
    lines = [
        "## Depth\n",
        "Training loss of `residual-mlp` on digits before each of six steps of gradient descent, mean over seeds.\n",
        "| start, depth | losses, nats |",
        "|---|---|",
    ]
    for (_, variant, _), group in _grouped(row for row in rows if row["experiment"] == "depth").items():
        curves = [row["train_losses"] for row in group if row["status"] == "finished"]
        means = ", ".join(f"{fmean(step):.4g}" for step in zip(*curves, strict=True))
        gone = len(group) - len(curves)
        told = f"{gone} of {len(group)} diverged" if gone else ""
        lines.append(f"| {variant} | {f'{means} ({told})' if means and told else means or told} |")
    return "\n".join([*lines, ""])


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["experiment"], row["variant"], row["federation"]), []).append(row)
    return groups


def _told(values: Iterable[float], digits: int) -> str:
    found = [*values]
    return f"{fmean(found):.{digits}f} ± {deviation(found):.{digits}f}"


def _plot_gaps(rows: Sequence[Row], file: Path) -> None:
    """A dot for each run on the CNN, methods from the largest gap to the smallest."""
    kept = [row for row in rows if not row["variant"] and "occluded_loss" in row]
    names = {
        name: fmean(-claims.gap(r) for r in kept if r["experiment"] == name) for name in {r["experiment"] for r in kept}
    }
    order = sorted(names, key=lambda name: names[name])
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(order) + 1.2), layout="constrained")
    federations = [*dict.fromkeys(row["federation"] for row in kept)]
    for i, (federation, marker) in enumerate(zip(federations, "ox", strict=False)):
        own = [row for row in kept if row["federation"] == federation]
        places = [order.index(row["experiment"]) + 0.2 * i - 0.1 for row in own]
        axes.plot([-claims.gap(row) for row in own], places, marker, markersize=4, label=federation)
    axes.set(yticks=range(len(order)), yticklabels=order, xlabel="test loss - training loss, nats")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, axes, file, legend="lower right")


def _plot_samples(rows: Sequence[Row], file: Path) -> None:
    """Mean training loss by round."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for (_, variant, _), group in _grouped(
        row for row in rows if row["experiment"] == "multi-sample-dropout" and row["federation"] == "IID"
    ).items():
        curve = [fmean(losses) for losses in zip(*(row["train_losses"] for row in group), strict=True)]
        axes.plot(range(1, len(curve) + 1), curve, label=f"{variant} sample{'s' * (variant != '1')}, IID")
    axes.set(xlabel="round", ylabel="training loss, nats", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    _save(figure, axes, file)


def _plot_heads(rows: Sequence[Row], file: Path) -> None:
    """Accuracy of the mean and of single heads against mu."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    shown: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("mean of heads", claims.accuracy),
        ("a head", claims.single),
    )
    for told, value in shown:
        for federation in dict.fromkeys(row["federation"] for row in rows):
            groups = _grouped(r for r in rows if r["experiment"] == "ensemblenet" and r["federation"] == federation)
            if groups:
                mus = [float(variant) for _, variant, _ in groups]
                means = [fmean(map(value, group)) for group in groups.values()]
                spread = [deviation([*map(value, group)]) for group in groups.values()]
                axes.errorbar(mus, means, spread, capsize=3, label=f"{told}, {federation}")
    axes.set(xlabel="mu", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    _save(figure, axes, file)


def _save(figure: Any, axes: Any, file: Path, legend: str = "best") -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", loc=legend)
    plt.rcParams["svg.hashsalt"] = file.stem  # else every drawing has other names inside
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
