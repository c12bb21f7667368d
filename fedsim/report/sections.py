"""The parts of a run's page: each takes what was read from the folder and says in words what is not there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim.records import ClientEvaluation, Indices, RoundRecord
from fedsim.report import figures
from fedsim.report.figures import Floats, Series
from fedsim.report.numbers import ABSENT, duration, number, percent, size
from fedsim.report.page import Chart, Key, Table, chart, column, curve_chart, table
from fedsim.report.results import Results, curve


@dataclass(frozen=True)
class Section:
    """One part of a page. ``lead`` is a sentence or two; it alone stands where there is nothing to draw."""

    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    table: Table | None = None


def learning(found: Results) -> Section:
    """Accuracy and loss against rounds and against traffic; privacy spent, if it was accounted."""
    title = "Learning"
    evaluated = [r for r in found.rounds if r.loss is not None or r.accuracy is not None]
    if not evaluated:
        what = "No round was finished" if not found.rounds else "No round was evaluated"
        return Section(title, f"{what}, so there is nothing to show yet.")
    if len(evaluated) == 1:
        only = evaluated[0]
        return Section(
            title,
            f"Only one round was evaluated, so there are no curves. After round {only.round} the accuracy was "
            f"{percent(only.accuracy)}, the loss {number(only.loss)} and the training loss {number(only.train_loss)}.",
        )
    charts = [_accuracy(found, "round"), _accuracy(found, "bytes"), _loss(found), _loss_by_traffic(found)]
    if found.epsilon is not None:
        spent = Series("epsilon", *curve(found, "epsilon", "round"))
        charts.append(curve_chart("Privacy spent by round", [spent], x="round", y="epsilon"))
    skipped = sum(len(r.skipped) for r in found.rounds)
    lead = "Loss and accuracy are those of the global model on held-out examples."
    if found.kind == "transfer":
        lead = "Held-out loss and accuracy are of both nets on rows whose labels only a simulation knows, or party B."
    if found.kind == "alone":
        lead = "Loss and accuracy are means over the clients' own models, each on the held-out examples of all."
    if skipped:
        lead += f" Updates left out because they were not finite: {skipped}."
    failed = sum(len(r.failed) for r in found.rounds)
    if failed:
        times = "times" if failed > 1 else "time"
        lead += f" {failed} {times} a client of a cohort contributed nothing; see the table."
    return Section(title, lead, tuple(charts))


def _accuracy(found: Results, against: str) -> Chart:
    title = "Accuracy by round" if against == "round" else "Accuracy by traffic"
    series = Series("accuracy", *curve(found, "accuracy", against))
    return curve_chart(title, [series], x=against, y="accuracy", fraction=True, target=found.target)


def _loss(found: Results) -> Chart:
    held_out = Series("held-out", *curve(found, "loss", "round"), number=0)
    training = Series("training", *curve(found, "train_loss", "round"), number=1)
    drawn = curve_chart("Loss by round", [held_out, training], x="round", y="loss")
    if not training.x:
        return Chart(drawn.title, drawn.image, "No training loss was recorded.", drawn.legend)
    return drawn


def _loss_by_traffic(found: Results) -> Chart:
    series = Series("held-out loss", *curve(found, "loss", "bytes"))
    return curve_chart("Loss by traffic", [series], x="bytes", y="loss")


# ---------------------------------------------------------------- clients


def clients(evaluations: Sequence[ClientEvaluation], kind: str = "federated") -> Section:
    """How accuracy is spread over clients, by round and at the end."""
    title = "Clients"
    scored = [e for e in evaluations if e.accuracy is not None]  # NaN comes back from JSON as None
    if not scored:
        return Section(title, "No client was evaluated on its own, so the spread over clients is not known.")
    rounds = np.array([e.round for e in scored])
    accuracy = np.array([e.accuracy for e in scored], float)
    last = accuracy[rounds == rounds.max()]
    model = "Each client's own model on its own held-out examples"
    if kind != "alone":
        model = "The global model on the held-out examples of each client"
    lead = (
        f"{model}. After round {rounds.max()}: {len(last)} clients, "
        f"lowest {percent(last.min())}, median {percent(float(np.median(last)))}, highest {percent(last.max())}."
    )
    if rounds.min() == rounds.max():
        lead += " Clients were evaluated after this round only, so there is no course to draw."
        return Section(title, lead, (_final(int(rounds.max()), last),))
    return Section(title, lead, (_bands(rounds, accuracy), _final(int(rounds.max()), last)))


def _bands(rounds: Indices, accuracy: Floats) -> Chart:
    title = "Spread over clients by round"
    distinct = np.unique(rounds)
    order = np.argsort(rounds, kind="stable")
    parts = np.split(accuracy[order], np.searchsorted(rounds[order], distinct[1:]))
    quantiles = np.array([np.quantile(part, [0, 0.1, 0.5, 0.9, 1]) for part in parts]).T  # (5, rounds)
    told = f"median from {percent(quantiles[2, 0])} to {percent(quantiles[2, -1])}"
    legend = [Key("median"), Key("10 % to 90 %", kind="inner"), Key("lowest to highest", kind="outer")]
    return chart(title, figures.bands(distinct.tolist(), quantiles), told, legend)


def _final(round: int, accuracy: Floats) -> Chart:
    title = f"Clients by accuracy after round {round}"
    figure = figures.histogram(accuracy.tolist(), x="accuracy", percent=True, span=(0.0, 1.0))
    return chart(title, figure, f"{len(accuracy)} clients, mean {percent(float(accuracy.mean()))}")


# ---------------------------------------------------------------- split


def split(facts: Mapping[str, Any], evaluations: Sequence[ClientEvaluation]) -> Section:
    """Who holds what: label counts, sizes, skew."""
    title = "Split"
    if not facts:
        return Section(title, "No details of the split were written.")
    summary = _summary(facts.get("summary") or {})
    sizes = facts.get("sizes") or [sum(row) for row in facts.get("counts") or []]
    num_clients, num_classes = facts.get("num_clients"), facts.get("num_classes")
    lead = f"{number(num_clients)} clients hold {number(facts.get('num_examples'))} examples of {num_classes} classes"
    if not sizes:
        return Section(title, f"{lead}; they are too many to list one by one.", facts=summary)
    least, most = min(sizes), max(sizes)
    median = number(float(np.median(sizes)))
    lead += f": {least} each." if least == most else f": between {least:,} and {most:,} each, median {median}."
    charts = []
    if facts.get("counts"):
        told = f"{num_clients} clients by {num_classes} classes"
        charts.append(chart("Label counts", figures.split_heatmap(facts), told))
    effective, distance = _known(facts.get("effective_classes")), _known(facts.get("earth_movers_distance"))
    if effective and distance:
        told = f"mean effective classes {number(_mean(effective))}, mean distance {number(_mean(distance))}"
        charts.append(chart("Skew over clients", figures.split_skew(effective, distance, int(num_classes or 1)), told))
    return Section(title, lead, tuple(charts), summary, _client_table(facts, sizes, evaluations))


def _client_table(facts: Mapping[str, Any], sizes: Sequence[int], evaluations: Sequence[ClientEvaluation]) -> Table:
    last = max((e.round for e in evaluations), default=0)
    final = {e.client: e for e in evaluations if e.round == last}
    after = [final.get(k) for k in range(len(sizes))] if final else []
    return table(
        "Every client",
        {
            "client": [str(k) for k in range(len(sizes))],
            "examples": column(sizes, number),
            "held out": column(facts.get("test_sizes"), number),
            "effective classes": column(facts.get("effective_classes"), "{:.2f}".format),
            "earth mover's distance": column(facts.get("earth_movers_distance"), "{:.3f}".format),
            "final accuracy": column([e and e.accuracy for e in after], percent),
            "final loss": column([e and e.loss for e in after], number),
        },
    )


def _known(values: Iterable[float | None] | None) -> list[float]:
    return [v for v in values or () if v is not None]  # None: a client without examples


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _summary(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Facts in words; x_mean, x_min and x_max become one."""
    shown = {}
    for key, value in facts.items():
        name, _, kind = key.rpartition("_")
        low, high = facts.get(f"{name}_min"), facts.get(f"{name}_max")
        if kind == "mean":
            shown[name] = f"mean {number(value)} ({number(low)} to {number(high)})"
        elif kind not in ("min", "max") and key != "clients":  # the lead says that one
            shown[key] = number(value)
    return tuple((key.replace("emd", "earth mover's distance").replace("_", " "), text) for key, text in shown.items())


# ---------------------------------------------------------------- rounds

LISTED, REASON = 3, 60  # clients that failed in a round, and letters of a reason, that its row shows


def _left_out(record: RoundRecord) -> str:
    """How many updates of a cohort are not in the model, and why."""
    if not record.skipped and not record.failed:
        return ABSENT
    reasons = [f"client {client}: {reason[:REASON]}" for client, reason in list(record.failed.items())[:LISTED]]
    more = len(record.failed) - len(reasons)
    told = "; ".join([*reasons, *([f"and {more} more"] if more > 0 else [])])
    return number(len(record.skipped) + len(record.failed)) + (f" ({told})" if told else "")


def rounds(found: Results) -> Section:
    """Every round as a row."""
    if not found.rounds:
        return Section("Rounds", "No round was finished.")
    records = found.rounds
    listed = table(
        f"All {len(records)} rounds" if len(records) > 1 else "The one round",
        {
            "round": [str(r.round) for r in records],
            "accuracy": column((r.accuracy for r in records), percent),
            "loss": column((r.loss for r in records), number),
            "training loss": column((r.train_loss for r in records), number),
            "clients": [number(r.clients) for r in records],
            "left out": [_left_out(r) for r in records],
            "up": [size(r.bytes_up) for r in records],
            "down": [size(r.bytes_down) for r in records],
            "time": [duration(r.seconds) for r in records],
            "epsilon": column((r.epsilon for r in records), number),
            "sparsity": column((r.sparsity for r in records), percent),
            "overlap": column((r.overlap for r in records), percent),
        },
    )
    per_round = found.seconds / len(records)
    return Section("Rounds", f"A round took {duration(per_round)} on average.", table=listed)
