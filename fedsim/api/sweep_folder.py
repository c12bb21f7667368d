"""The folder of a sweep: what it is to run, its runs, and what they have come to.

``<output>/<name>-sweep-<date>-<n>/`` holds sweep.yaml, one run folder for each combination of the axes, summary.csv
with a line per run, and summary.md with a line for each combination of the axes but ``seed``.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedsim import runs
from fedsim.api.running import Run
from fedsim.api.sweep_plan import Combination, Plan, short_keys, text
from fedsim.errors import DataError
from fedsim.report import groups, tables
from fedsim.report.numbers import ABSENT
from fedsim.report.results import results

FORMAT = 1  # of sweep.yaml; raised when an older fedsim could not read the result
NAMED = 3  # of runs that were interrupted, or not started; the others are counted
_FAILURES = "failures.json"
_SHOWN = ("accuracy", "best accuracy", "rounds to target", "loss", "traffic", "time")
Row = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep to look at. runs: those that were started, in the order of the combinations."""

    folder: Path
    runs: tuple[Run, ...]

    def rows(self) -> list[Row]:
        """One dict per run, for plotting: the values of the axes by dotted key, and what came out.

        ``run`` is the folder's name; ``status`` finished, failed, interrupted, running or killed, or not started;
        then rounds, loss, accuracy (final), best_accuracy, seconds, bytes_up, bytes_down, error. What is not known is
        None.
        """
        return rows(self.folder, read_plan(self.folder))

    def table(self) -> list[dict[str, str]]:
        """The table of summary.md, column title -> text: runs that differ only in their seed are one line."""
        return table(self.folder, read_plan(self.folder), self.rows())

    def notes(self) -> list[str]:
        """What must be known to read the table."""
        return notes(read_plan(self.folder))


def load_sweep(folder: str | Path) -> Sweep:
    """Open the folder of a sweep.

    Raises:
        DataError: it is not one, or from a newer version.
    """
    path = Path(folder)
    there = (path / one.name for one in read_plan(path).combinations())
    return Sweep(path, tuple(Run(one) for one in there if (one / "config.yaml").exists()))


# ---------------------------------------------------------------- sweep.yaml


def write_plan(folder: Path, plan: Plan) -> None:
    """Write sweep.yaml."""
    facts = {"format": FORMAT, "config_folder": str(plan.beside), "one_process_each": plan.alone}
    content = {**facts, "axes": plan.axes, "changes": plan.fixed, "base": plan.base}
    runs.write_bytes(folder / "sweep.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def read_plan(folder: Path) -> Plan:
    """What sweep.yaml says.

    Raises:
        DataError: there is none, it is damaged, or from a newer version.
    """
    path = folder / "sweep.yaml"
    if not path.exists():
        raise DataError(f"{folder}: not the folder of a sweep (it has no sweep.yaml)")
    try:
        found = yaml.safe_load(runs.read_bytes(path))
        if int(found["format"]) > FORMAT:
            raise DataError(f"{path}: format {found['format']} is newer than this fedsim reads ({FORMAT})")
        beside, alone = Path(found["config_folder"]), bool(found["one_process_each"])
        return Plan(dict(found["base"]), dict(found["changes"]), dict(found["axes"]), beside, alone)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error})") from error


# ---------------------------------------------------------------- failures


def failures(folder: Path) -> dict[str, str]:
    """Why runs failed, by name. Of one that was refused, or whose process died, no run folder can say it."""
    path = folder / _FAILURES
    return json.loads(runs.read_bytes(path)) if path.exists() else {}


def note_failure(folder: Path, name: str, why: str | None) -> None:
    """Remember why a run failed, or forget it."""
    before = failures(folder)
    now = {key: value for key, value in before.items() if key != name} | ({} if why is None else {name: why})
    if now != before:
        runs.write_json(folder / _FAILURES, now)


# ---------------------------------------------------------------- rows


def rows(folder: Path, plan: Plan) -> list[Row]:
    """See :meth:`Sweep.rows`."""
    failed = failures(folder)
    return [row(folder, one, failed.get(one.name)) for one in plan.combinations()]


def row(folder: Path, combination: Combination, failure: str | None) -> Row:
    """What one run has come to. What its folder says about its end counts more than ``failure`` if it has finished."""
    first = {"run": combination.name, **combination.values}
    numbers: Row = dict.fromkeys(("rounds", "loss", "accuracy", "best_accuracy", "seconds", "bytes_up", "bytes_down"))
    if not (folder / combination.name / "config.yaml").exists():
        return {**first, "status": "not started" if failure is None else "failed", **numbers, "error": failure}
    try:
        found = results(runs.open_run(folder / combination.name))
    except DataError as error:
        return {**first, "status": "failed", **numbers, "error": str(error)}
    numbers = {
        "rounds": len(found.rounds),
        "loss": found.final.loss,
        "accuracy": found.final.accuracy,
        "best_accuracy": found.best.accuracy,
        "seconds": found.seconds,
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
    }
    if failure is not None and found.status != "finished":
        return {**first, "status": "failed", **numbers, "error": failure}
    return {**first, "status": found.standing, **numbers, "error": found.error}


def write_csv(folder: Path, lines: Sequence[Row]) -> None:
    """Write summary.csv: the rows, with components and lists in the words of the table."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in line.items()} for line in lines)
    with runs.writing(folder):
        runs.write_bytes(folder / "summary.csv", file.getvalue().encode())


def _cell(value: Any) -> Any:
    return text(value) if isinstance(value, Mapping | list | bool) else value


# ---------------------------------------------------------------- the table


def table(folder: Path, plan: Plan, lines: Sequence[Row]) -> list[dict[str, str]]:
    """Runs that differ only in their seed as one line: column title -> text.

    Where ``seed`` is an axis, n says over how many finished runs mean and deviation are, and of how many.
    """
    readable = [line["run"] for line in lines if line["rounds"] is not None]
    compared = groups.compare([runs.open_run(folder / name) for name in readable]) if readable else None
    told = tables.group_rows(compared) if compared else []
    group_of = {run.folder: run.group for run in compared.runs} if compared else {}
    members: dict[str, list[Row]] = {}
    for line in lines:
        members.setdefault(json.dumps([line[key] for key in plan.axes if key != "seed"]), []).append(line)
    shown = [title for title in _SHOWN if not told or title in told[0]]
    made = []
    for own in members.values():
        numbers = dict.fromkeys(group_of[line["run"]] for line in own if line["run"] in group_of)
        for number in numbers:
            mine = [line for line in own if len(numbers) == 1 or group_of.get(line["run"]) == number]
            made.append({**_heads(plan, mine), **{title: told[number][title] for title in shown}})
        if not numbers:
            made.append({**_heads(plan, own), **dict.fromkeys(shown, ABSENT)})
    return made


def _heads(plan: Plan, members: Sequence[Row]) -> dict[str, str]:
    short = short_keys(list(plan.axes))
    heads = {short[key]: text(members[0][key]) for key in plan.axes if key != "seed"}
    if "seed" not in plan.axes:
        return {**heads, "status": members[0]["status"]}
    done = sum(line["status"] == "finished" for line in members)
    return {**heads, "n": str(done) if done == len(members) else f"{done} of {len(members)}"}


def notes(plan: Plan) -> list[str]:
    """What must be known to read the table."""
    mean = "Mean ± sample standard deviation over n finished runs that differ only in their seed (divisor n - 1)."
    return [mean] if len(plan.axes.get("seed", [])) > 1 else []


def _unfinished(lines: Sequence[Row]) -> list[str]:
    """What became of the runs that have not finished."""
    told = [f"Failed: {line['run']}: {line['error']}" for line in lines if line["status"] == "failed"]
    for status in dict.fromkeys(line["status"] for line in lines):
        names = [line["run"] for line in lines if line["status"] == status]
        if status not in ("finished", "failed"):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            told.append(f"{status.capitalize()}: {', '.join(names[:NAMED])}{more}")
    return told


def write_summary(folder: Path, plan: Plan, lines: Sequence[Row]) -> None:
    """Write summary.csv and summary.md."""
    done = sum(line["status"] == "finished" for line in lines)
    made = table(folder, plan, lines)
    paragraphs = [
        f"# {plan.name}: sweep of {', '.join(short_keys(list(plan.axes)).values())}",
        f"{done} of {len(lines)} runs finished.",
        "\n".join(f"- {key}: {', '.join(map(text, values))}" for key, values in plan.axes.items()),
        "\n".join(map(_line, [list(made[0]), ["---"] * len(made[0]), *(list(one.values()) for one in made)])),
        *notes(plan),
        *_unfinished(lines),
    ]
    with runs.writing(folder):
        runs.write_bytes(folder / "summary.md", ("\n\n".join(paragraphs) + "\n").encode())
    write_csv(folder, lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
