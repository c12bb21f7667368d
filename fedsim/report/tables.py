"""A comparison as text: a line per run, a line per group, and the sentences that belong under them."""

from collections.abc import Callable

from fedsim.report.groups import Comparison, Group, Run, Statistic, shown
from fedsim.report.numbers import ABSENT, byte_unit, duration, number, percent, size, spread, time_unit
from fedsim.report.results import Results


def rows(comparison: Comparison) -> list[dict[str, str]]:
    """One line per run, column title -> text, every line with the same columns."""
    with_target = any(run.results.target is not None for run in comparison.runs)
    pruned = any(run.results.sparsity is not None for run in comparison.runs)
    return [_row(run, comparison.differing, with_target, pruned) for run in comparison.runs]


def _row(run: Run, differing: tuple[str, ...], with_target: bool, pruned: bool) -> dict[str, str]:
    found = run.results
    return {
        "run": run.folder,
        "accuracy": percent(found.final.accuracy),
        "best accuracy": percent(found.best.accuracy),
        **({"sparsity": percent(found.sparsity)} if pruned else {}),
        **(_to_target(found) if with_target else {}),
        "rounds": number(len(found.rounds)),
        "up": size(found.bytes_up),
        "down": size(found.bytes_down),
        "time": duration(found.seconds),
        "status": found.standing,
        **{key: shown(run.settings, key) for key in differing},
    }


def _to_target(found: Results) -> dict[str, str]:
    rounds, sent = number(found.rounds_to_target), size(found.bytes_to_target)
    if found.target is not None and found.rounds_to_target is None and found.status == "finished":
        rounds = sent = "not reached"
    return {"rounds to target": rounds, "bytes to target": sent}


def group_rows(comparison: Comparison) -> list[dict[str, str]]:
    """One line per group, column title -> text, values as mean ± standard deviation."""
    with_target = any(group.rounds_to_target for group in comparison.groups)
    pruned = any(group.sparsity for group in comparison.groups)
    return [_group_row(group, with_target, pruned) for group in comparison.groups]


def _group_row(group: Group, with_target: bool, pruned: bool) -> dict[str, str]:
    n = len(group.finished)
    rounds, sent = _number(group.rounds_to_target, n), _size(group.bytes_to_target, n)
    return {
        "group": group.label,
        "n": str(n),
        "accuracy": _percent(group.accuracy, n),
        "best accuracy": _percent(group.best_accuracy, n),
        **({"sparsity": _percent(group.sparsity, n)} if pruned else {}),
        **({"rounds to target": rounds, "bytes to target": sent} if with_target else {}),
        "loss": _number(group.loss, n),
        "traffic": _size(group.traffic, n),
        "time": _duration(group.seconds, n),
        "seeds": ", ".join(str(seed) for seed in group.seeds),
        **group.settings,
    }


def _percent(value: Statistic | None, n: int) -> str:
    return _told(value, n, percent, lambda mean, std: spread(mean, std, unit=0.01, name="%"))


def _number(value: Statistic | None, n: int) -> str:
    return _told(value, n, number, spread)


def _size(value: Statistic | None, n: int) -> str:
    def both(mean: float, std: float) -> str:
        unit, name = byte_unit(mean)
        return spread(mean, std, unit=unit, name=name, decimals=2)  # headers differ by a few bytes

    return _told(value, n, size, both)


def _duration(value: Statistic | None, n: int) -> str:
    def both(mean: float, std: float) -> str:
        unit, name = time_unit(mean)
        return spread(mean, std, unit=unit, name=name)

    return _told(value, n, duration, both)


def _told(value: Statistic | None, n: int, alone: Callable[[float], str], both: Callable[[float, float], str]) -> str:
    """A statistic over ``n`` runs; over how many, if not all of them have the value."""
    if value is None:
        return ABSENT
    text = alone(value.mean) if value.std is None else both(value.mean, value.std)
    return text if value.n == n else f"{text} (n = {value.n})"


def notes(comparison: Comparison) -> list[str]:
    """What must be known to read the lines of the groups; nothing where no group has two runs."""
    if not comparison.grouped:
        return []
    told = ["Runs that differ only in their seed, as mean ± standard deviation over n finished runs (divisor n - 1)."]
    if unfinished := sum(run.results.status != "finished" for run in comparison.runs):
        told.append(f"Unfinished runs are left out: {unfinished} of {len(comparison.runs)}.")
    averaged = [(run.group, run.settings.get("seed")) for run in comparison.runs if run.results.status == "finished"]
    if len(set(averaged)) < len(averaged):
        told.append(
            "Warning: some runs of a group have the same seed; they are not independent, "
            "and the deviation is too small."
        )
    return told
