"""The page of one run: ``fedsim report RUN`` makes RUN/report.html, a single file that asks the network for nothing."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from fedsim import runs
from fedsim.errors import DataError
from fedsim.records import Params
from fedsim.report import sections
from fedsim.report.numbers import ABSENT, duration, number, percent, size
from fedsim.report.page import leaves, render
from fedsim.report.pruning import pruning
from fedsim.report.results import Point, Results, results
from fedsim.report.transfer import NOTE, transfer

BASELINES = {
    "centralised": "Baseline: all data in one place.",
    "alone": "Baseline: every client on its own; loss and accuracy are means over the clients' own models.",
}
FLOWER_APP = "A Flower app, run as it is: the numbers are those that its messages and its strategy show."
_KEY = re.compile(r"^( *(?:- )*)([^\s:#'&\"-][^:\n]*)(?=:(?: |$))", re.MULTILINE)


@dataclass(frozen=True)
class Tile:
    """One headline number; ``value`` is the exact one, where there is one."""

    label: str
    text: str
    detail: str = ""
    value: float | None = None


def write(folder: Path) -> Path:
    """Make ``folder``/report.html from a run folder, whole or broken off.

    Returns:
        The file written.

    Raises:
        DataError: not a run folder, or one of its files is damaged.
    """
    path = folder / "report.html"
    runs.write_bytes(path, page(runs.open_run(folder)))
    return path


def page(run: runs.RunFolder) -> bytes:
    """The page of a run; the same folder content gives the same bytes."""
    found, evaluations, facts, config = results(run), run.clients(), run.split(), run.config()
    summary = run.summary()
    parts: list[sections.Section | None]
    if found.kind == "transfer":
        parts = [sections.learning(found), transfer(summary), sections.rounds(found)]
    else:
        parts = [
            sections.learning(found),
            _pruning(run, found, config, summary),
            sections.clients(evaluations, found.kind),
            sections.split(facts, evaluations),
            sections.rounds(found),
        ]
    return render(
        "report.html",
        title=found.name,
        folder=run.path.resolve().name,
        found=found,
        note=_note(found.kind, summary),
        about=_about(config),
        tiles=_tiles(found, facts, config),
        sections=[part for part in parts if part is not None],
        config=_highlighted(config),
        environment={key: _plain(value) for key, value in leaves(run.environment()).items()},
    )


def _pruning(
    run: runs.RunFolder, found: Results, config: Mapping[str, Any], summary: Mapping[str, Any]
) -> sections.Section | None:
    method = config.get("pruning")
    name = str(method.get("name")) if isinstance(method, Mapping) and found.kind == "federated" else ""
    tensors = None if found.sparsity is None else _model(run)
    return pruning(found, name, summary.get("model") or {}, tensors)


def _model(run: runs.RunFolder) -> Params | None:
    """The model; None of a run that was killed before its first checkpoint, or is just writing another."""
    try:
        return run.model()
    except DataError:
        if (run.path / "model.safetensors").exists():
            raise
        return None


def _note(kind: str, summary: Mapping[str, Any]) -> str:
    """What must be known of a run that is not an ordinary one."""
    if kind == "transfer":
        return NOTE
    if kind != "flower-app":
        return BASELINES.get(kind, "")
    missing = summary.get("not_seen") or []
    return " ".join([FLOWER_APP, *(["What it does not show:"] if missing else []), *missing])


def _about(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, in a line: the names of the main components."""
    data = config.get("data") or {}
    named = {
        "dataset": data.get("dataset"),
        "split": data.get("split"),
        **{key: config.get(key) for key in ("model", "strategy", "engine")},
    }
    if isinstance(config.get("transfer"), Mapping):
        named = {"dataset": data.get("dataset"), "model": config.get("model")}
        named["protocol"] = config["transfer"].get("protocol")
    names = {key: value.get("name") if isinstance(value, Mapping) else value for key, value in named.items()}
    return [(key, str(name)) for key, name in names.items() if name]


def _tiles(found: Results, facts: Mapping[str, Any], config: Mapping[str, Any]) -> list[Tile]:
    final, best, first = found.final, found.best, found.initial
    before = "" if first.accuracy is None else f"from {percent(first.accuracy)}"
    planned = f"of {number(found.planned)} planned" if found.planned else ""
    clients = facts.get("num_clients") or (config.get("data") or {}).get("clients")
    cohort = (config.get("train") or {}).get("clients_per_round") if found.kind == "federated" else None
    tiles = [
        Tile("Final accuracy", percent(final.accuracy), before, final.accuracy),
        Tile("Best accuracy", percent(best.accuracy), _after(best), best.accuracy),
        Tile("Final loss", number(final.loss), _after(final), final.loss),
        Tile("Rounds", number(len(found.rounds)), planned, len(found.rounds)),
    ]
    if found.target is not None:
        reached = "not reached" if found.rounds_to_target is None else number(found.rounds_to_target)
        tiles.append(Tile(f"Rounds to {percent(found.target, None)}", reached, "", found.rounds_to_target))
    if found.kind == "transfer":
        tiles += [
            Tile("Sent by A", size(found.bytes_up), "to party B", found.bytes_up),
            Tile("Sent by B", size(found.bytes_down), "to party A", found.bytes_down),
        ]
    else:
        tiles += [
            Tile("Clients", number(clients), f"{cohort} in a round" if cohort else "", clients),
            Tile("Sent up", size(found.bytes_up), "clients to server", found.bytes_up),
            Tile("Sent down", size(found.bytes_down), "server to clients", found.bytes_down),
        ]
    tiles += [
        Tile("Wall time", duration(found.seconds), "", found.seconds),
    ]
    if found.sparsity is not None:
        tiles.append(Tile("Sparsity", percent(found.sparsity), "of prunable weights", found.sparsity))
    if found.epsilon is not None:
        tiles.append(Tile("Epsilon", number(found.epsilon), "privacy spent", found.epsilon))
    return tiles


def _after(point: Point) -> str:
    return "" if point.round is None else f"after round {point.round}"


def _plain(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _highlighted(config: Mapping[str, Any]) -> Markup:
    """The config as YAML with its keys marked."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=100)
    return Markup(_KEY.sub(r"\1<b>\2</b>", html.escape(text, quote=False)))
