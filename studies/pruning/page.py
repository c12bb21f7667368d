"""From rows to claims, plots and docs/studies/pruning.md. As a script: page.py results.json FOLDER."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import plots
from claims import Finding, Row, accuracy, findings
from verdicts import LEVEL, deviation

HEAD = """# Pruned models in a federation: what holds here

Made by `python studies/pruning/study.py --page docs/studies` from {rows} results, {seeds} seeds each, in
{minutes:.0f} minutes of processor time; do not edit.

Data: Fashion-MNIST at 14 x 14 pixels (2,000 to 6,000 pictures to train on, 2,000 to test) and digits of
scikit-learn, 8 x 8; dealt out IID, or two shards of sorted labels to a client. Every config is in
`studies/pruning/`, every change to it in `experiments.py`. Step sizes and strengths are those of the configs or
fedsim's defaults and were not tuned to any claim. Accuracy is of the final global model on held-out examples,
but for personal tickets, where it is the mean of each client's own model on its own.

**Verdicts.** A claim is a difference between runs of the same seed, positive if it is as claimed; a margin that it
allows for is added. It *holds* if a one-sided t-test over seeds excludes 0 at {level:.0%}, *does not hold here* if it
excludes 0 the other way, and is *not distinguishable* otherwise. Of claims without any truth in them one in twenty
would be found to hold: with {tests} tests, some of the verdicts are chance. Seeds vary first weights, batches and
masks; data and split stay.
"""


def write(found: dict[str, Any], folder: Path) -> None:
    """Write the page and its plots into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = found["rows"]
    results = findings(rows)
    plots.draw(rows, folder)
    facts = {
        "rows": len(rows),
        "seeds": found["seeds"],
        "minutes": found["minutes"],
        "level": LEVEL,
        "tests": len(results),
    }
    parts = [
        HEAD.format(**facts),
        _claims(results),
        _tickets(rows),
        _arms(rows),
        _targeted(rows),
        _gates(rows),
        _sent(rows),
    ]
    (folder / "pruning.md").write_text("\n".join(parts))


def _claims(results: Sequence[Finding]) -> str:
    lines = [
        "## Claims\n",
        "| claim | source | where | difference with margin, points | verdict |",
        "|---|---|---|---|---|",
    ]
    for one in results:
        number = f"{one.mean:+.2f} ± {deviation(one.differences):.2f}"
        lines.append(f"| {one.claim.statement} | {one.claim.source} | {one.place} | {number} | **{one.verdict}** |")
    return "\n".join([*lines, ""])


def _table(
    titles: Sequence[str], rows: Iterable[Row], keys: Sequence[str], cells: Callable[[list[Row]], list[str]]
) -> str:
    """One line for each combination of ``keys``, of the rows of all its seeds."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    lines += [f"| {' | '.join([*map(_word, key), *cells(group)])} |" for key, group in groups.items()]
    return "\n".join([*lines, ""])


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of(rows: Sequence[Row], experiment: str) -> list[Row]:
    return [row for row in rows if row["experiment"] == experiment]


def _told(group: Sequence[Row], value: Callable[[Row], float] = accuracy, digits: int = 1) -> str:
    values = [value(row) for row in group]
    return f"{fmean(values):.{digits}f} ± {deviation(values):.{digits}f}"


def _tickets(rows: Sequence[Row]) -> str:
    shown = [row for row in _of(rows, "tickets") if row["level"] in (0, 3, 7, 9) or row["arm"] == "one-shot"]
    text = "## Lottery tickets\n\n![Accuracy against remaining weights](pruning-tickets.svg)\n"
    titles = ("where", "", "arm", "level", "remaining, %", "accuracy, %")
    keys = ("data", "split", "arm", "level")
    return text + "\n" + _table(titles, shown, keys, lambda g: [f"{100 * g[0]['remaining']:.1f}", _told(g)])


def _arms(rows: Sequence[Row]) -> str:
    text = (
        "## Rethinking the value of pruning\n\nHalf of the filters of every layer go (of `network-slimming` half of "
        "all, after training with its penalty). Fine-tuning has a quarter of the whole net's rounds, Scratch-E as "
        "many, Scratch-B as many as cost its multiply-accumulates.\n"
    )
    titles = ("where", "", "arm", "rounds in all", "MACs", "accuracy when pruned, %", "accuracy in the end, %")

    def cells(group: list[Row]) -> list[str]:
        pruned = [row for row in group if "accuracy_before" in row]
        when = _told(pruned, lambda row: 100 * row["accuracy_before"]) if pruned else ""
        return [
            f"{fmean(row['rounds'] for row in group):.0f}",
            f"{fmean(row['macs'] for row in group):,.0f}",
            when,
            _told(group),
        ]

    return text + "\n" + _table(titles, _of(rows, "arms"), ("data", "split", "arm"), cells)


def _targeted(rows: Sequence[Row]) -> str:
    text = (
        "## Targeted dropout\n\n![Accuracy after pruning](pruning-targeted.svg)\n\nOf every filter of the hidden "
        "layers the smallest weights go, and nothing is trained after. Mass: share of squared weights in the smallest "
        "three quarters of each filter, before pruning.\n"
    )
    titles = ("where", "", "arm", "pruned, %", "accuracy, %", "mass, %")

    def cells(group: list[Row]) -> list[str]:
        return [_told(group), _told(group, lambda row: 100 * row["mass"]) if "mass" in group[0] else ""]

    shown = [{**row, "sparsity": 100 * row["sparsity"]} for row in _of(rows, "targeted")]
    return text + "\n" + _table(titles, shown, ("data", "split", "arm", "sparsity"), cells)


def _gates(rows: Sequence[Row]) -> str:
    text = (
        "## Feature boosting and suppression\n\n![Accuracy against arithmetic](pruning-gates.svg)\n\nMACs are counted: "
        "of FBS those of the channels that are open, with what its gates cost; `l1-filter` removes `1 - density` of "
        "every layer half-way. Now and then: share of gated channels that are open for 5 to 95 % of test pictures.\n"
    )
    titles = ("where", "", "arm", "density", "MACs", "saving", "accuracy, %", "now and then, %")
    own = _of(rows, "gates")
    dense = {
        (row["data"], row["split"]): row["macs"] for row in own if row["arm"] == "l1-filter" and row["density"] == 1.0
    }

    def cells(group: list[Row]) -> list[str]:
        macs = fmean(row["macs"] for row in group)
        both = _told(group, lambda row: 100 * row["both"]) if "both" in group[0] else ""
        return [f"{macs:,.0f}", f"{dense[group[0]['data'], group[0]['split']] / macs:.2f}", _told(group), both]

    return text + "\n" + _table(titles, own, ("data", "split", "arm", "density"), cells)


def _sent(rows: Sequence[Row]) -> str:
    text = (
        "## Bytes\n\n![Accuracy against bytes sent up](pruning-sent.svg)\n\nReal bytes of all messages of all "
        "clients and rounds. To target: megabytes up until the held-out accuracy first reached it, mean over the "
        "seeds that did, and how many did. Broadcasts are not compressed, only pruned.\n"
    )
    titles = ("where", "", "arm", "MB up", "MB down", "accuracy, %", "MB up to target", "target, %")

    def cells(group: list[Row]) -> list[str]:
        reached = [row["to_target"] / 1e6 for row in group if row["to_target"] is not None]
        told = (
            f"{fmean(reached):.2f} ({len(reached)} of {len(group)})" if reached else f"not reached (0 of {len(group)})"
        )
        up, down = (_told(group, lambda row, key=key: row[key] / 1e6, 2) for key in ("up", "down"))
        return [up, down, _told(group), told, f"{100 * group[0]['target']:.0f}"]

    return text + "\n" + _table(titles, _of(rows, "sent"), ("data", "split", "arm"), cells)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
