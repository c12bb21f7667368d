"""The part of a run's page that shows what was pruned, and what that came to in bytes and arithmetic."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.records import Params, RoundRecord
from fedsim.report import pruning_figures as figures
from fedsim.report.figures import Floats, Series
from fedsim.report.numbers import byte_unit, number, percent, size
from fedsim.report.page import Chart, Key, Table, chart, column, curve_chart, table
from fedsim.report.results import Results, curve
from fedsim.report.sections import Section
from fedsim.summary import last_pruned
from fedsim.wire.sparse import sizes
from fedsim.wire.support import FORMS

TITLE = "Pruning"


def pruning(found: Results, method: str, facts: Mapping[str, Any], params: Params | None) -> Section | None:
    """What was pruned, when, and what it did.

    Args:
        found: the run.
        method: its name, "" for a run that does not prune.
        facts: what summary.json says of the model.
        params: of the model as it is now, None if there is none.

    Returns:
        None for a run that does not prune.
    """
    last = last_pruned(found.rounds)
    if last is None:
        return Section(TITLE, f"{method}: no weight has been removed yet.") if method else None
    charts = [_by_layer(found.rounds), _overall(found.rounds), _by_remaining(found), _traffic(found.rounds)]
    if _personal(found):
        overlap = Series("overlap", *curve(found, "overlap", "round"))
        charts.append(curve_chart("Overlap of masks by round", [overlap], x="round", y="Jaccard index", fraction=True))
    weights: Mapping[str, Any] = facts.get("weights") or {}
    shown = _facts(found, last, facts, params)
    return Section(TITLE, _lead(found, last, params), tuple(charts), shown, _table(last, weights, params))


# ---------------------------------------------------------------- charts


def known(rounds: Sequence[RoundRecord]) -> list[float]:
    """Overall sparsity after each round: 0 before anything is pruned, and as before where a round does not say."""
    told, so_far = [], 0.0
    for record in rounds:
        so_far = so_far if record.sparsity is None else record.sparsity
        told.append(so_far)
    return told


def by_layer(rounds: Sequence[RoundRecord]) -> tuple[list[str], Floats]:
    """Names of what is pruned, and the sparsity of each after each round, (layers, rounds); gaps as in `known`."""
    names = list(dict.fromkeys(name for record in rounds for name in record.remaining))
    told, so_far = [], dict.fromkeys(names, 1.0)
    for record in rounds:
        so_far = {**so_far, **record.remaining}
        told.append([1.0 - so_far[name] for name in names])
    return names, np.array(told).T


def levels(rounds: Sequence[RoundRecord]) -> list[tuple[float, float]]:
    """Share of weights that remains and accuracy, at the last evaluated round of each run of rounds of one sparsity."""
    points = []
    for sparsity, own in groupby(zip(known(rounds), rounds, strict=True), key=lambda pair: pair[0]):
        scored = [record.accuracy for _, record in own if record.accuracy is not None]
        if scored and sparsity < 1:
            points.append((1.0 - sparsity, scored[-1]))
    return points


def _by_layer(rounds: Sequence[RoundRecord]) -> Chart:
    names, sparsity = by_layer(rounds)
    last = [f"{_layer(name)} {percent(value)}" for name, value in zip(names, sparsity[:, -1], strict=True)]
    more = f"; and {len(last) - 12} more" if len(last) > 12 else ""
    figure = figures.layers([r.round for r in rounds], [_layer(name) for name in names], sparsity)
    return chart("Sparsity by layer", figure, f"in the end {'; '.join(last[:12])}{more}")


def _layer(name: str) -> str:
    return name.removesuffix(".weight")


def _overall(rounds: Sequence[RoundRecord]) -> Chart:
    sparsity = known(rounds)
    figure = figures.steps([r.round for r in rounds], [sparsity], y="sparsity", percent=True)
    return chart("Sparsity by round", figure, f"from {percent(sparsity[0])} to {percent(sparsity[-1])}")


def _by_remaining(found: Results) -> Chart:
    title, points = "Accuracy by weights remaining", levels(found.rounds)
    if len(points) < 2:
        return Chart(title, note="Fewer than two levels of sparsity were evaluated, so there is no curve to draw.")
    remaining, accuracy = zip(*points, strict=True)
    figure = figures.by_remaining(remaining, accuracy, target=found.target)
    told = "; ".join(f"{percent(a)} with {percent(left)}" for left, a in points[:12])
    key = [Key(f"target {percent(found.target, None)}", kind="dash")] if found.target is not None else []
    return chart(title, figure, told, key)


def _traffic(rounds: Sequence[RoundRecord]) -> Chart:
    up, down = [r.bytes_up for r in rounds], [r.bytes_down for r in rounds]
    total = [a + b for a, b in zip(up, down, strict=True)]
    if not any(total):
        return Chart("Bytes by round", note="Nothing was sent.")
    divisor, unit = byte_unit(max(total))
    parts = [[count / divisor for count in part] for part in (up, down)]
    figure = figures.steps([r.round for r in rounds], parts, y=f"sent in a round ({unit})")
    legend = [Key("up, clients to server", 0, "inner"), Key("down, server to clients, on top", 1, "inner")]
    return chart("Bytes by round", figure, f"from {size(total[0])} to {size(total[-1])}, both directions", legend)


# ---------------------------------------------------------------- words


def _lead(found: Results, last: RoundRecord, params: Params | None) -> str:
    gone = (
        f"After round {last.round}, {percent(last.sparsity)} of the weights were gone; biases and norms do not count."
    )
    told = [
        gone,
        "Accuracy by weights remaining has a point for each sparsity, at the last evaluated round that had it.",
    ]
    if _personal(found):
        told.append(
            "Clients have masks of their own: sparsity is the mean over those of a round's clients, and overlap the "
            "mean Jaccard index of pairs. The table counts the server's model, which is whole."
        )
    if found.status != "finished" and params is not None:
        told.append("Counts and bytes in the table are those of the last checkpoint, which may be some rounds older.")
    return " ".join(told)


def _personal(found: Results) -> bool:
    return any(r.overlap is not None for r in found.rounds)


def _facts(
    found: Results, last: RoundRecord, facts: Mapping[str, Any], params: Params | None
) -> tuple[tuple[str, str], ...]:
    """Counts and costs, each against what it was before pruning."""
    weights: Mapping[str, Any] = facts.get("weights") or {}
    first = {name: math.prod(weights[name]["shape"]) for name in last.remaining if name in weights}
    shown = []
    if first:
        left = round(sum(last.remaining[name] * count for name, count in first.items()))
        shown.append(("weights remaining", _of(left, sum(first.values()))))
    if facts.get("parameters_left") is not None and found.status != "running":  # it is written in the end
        shown.append(("parameters remaining", _of(facts["parameters_left"], facts["parameters"])))
    uses: dict[str, int] = {name: weight["uses"] for name, weight in weights.items() if weight["uses"]}
    if params and uses and uses.keys() <= params.keys() and not _personal(found):
        before = sum(count * math.prod(weights[name]["shape"]) for name, count in uses.items())
        after = sum(count * int(params[name].count_nonzero()) for name, count in uses.items())
        shown.append(("MACs for one example, without zeros", _of(after, before)))
    return tuple(shown)


def _of(count: int, whole: int) -> str:
    return f"{number(count)} of {number(whole)} ({percent(count / max(whole, 1))})"


# ---------------------------------------------------------------- table


def _table(last: RoundRecord, weights: Mapping[str, Any], params: Params | None) -> Table:
    """A row for each weight that can be pruned, and their sum where there is a model to count in."""
    model = params or {}
    names = list(dict.fromkeys([*weights, *last.remaining]))
    before = [tuple(weights[name]["shape"]) if name in weights else None for name in names]
    now = [tuple(model[name].shape) if name in model else None for name in names]
    rows = [_counts(model.get(name), weights[name]["uses"] if name in weights else None) for name in names]
    total = [{key: sum(row[key] or 0 for row in rows) or None for key in rows[0]}] if model else []
    blank = [None] * len(total)
    columns = {
        "layer": [*map(_layer, names), *(["total"] * len(total))],
        "shape at first": column([*(before if before != now else [None] * len(now)), *blank], _shape),
        "shape": column([*now, *blank], _shape),
        "remaining": column([*(last.remaining.get(name, 1.0) for name in names), *blank], percent),
    }
    for key in rows[0]:
        columns[key] = column([row[key] for row in [*rows, *total]], size if key in FORMS else number)
    return table("Every layer", columns)


def _counts(tensor: Tensor | None, uses: int | None) -> dict[str, int | None]:
    """Entries, arithmetic and bytes. All None without a tensor, and arithmetic if its uses are not known."""
    if tensor is None:
        return dict.fromkeys(("parameters", "non-zeros", "MACs", "effective", *FORMS))
    entries, nonzeros = tensor.numel(), int(tensor.count_nonzero())
    return {
        "parameters": entries,
        "non-zeros": nonzeros,
        "MACs": None if uses is None else uses * entries,
        "effective": None if uses is None else uses * nonzeros,
        **sizes(tensor),
    }


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
