"""The run folder of a Flower app: what can be seen of its rounds, and in words what cannot."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsim import runs
from fedsim.federation import with_spread
from fedsim.params import num_entries
from fedsim.recording import OnRound
from fedsim.records import ClientEvaluation, RoundRecord
from fedsim.summary import Metrics, Status, summarize

if TYPE_CHECKING:
    from fedsim.engines.flower.watching import Round, Watch

KIND = "flower-app"

Seen = dict[str, float | list[float]]


class Recording:
    """A context in which an app runs; on leaving, summary.json says how it ended and what could not be seen.

    ``watch`` is what sees the run.
    """

    def __init__(self, folder: Path, name: str, clients: int, on_round: OnRound) -> None:
        from fedsim.engines.flower import foreign  # noqa: PLC0415 -- flwr takes half a second to import

        self.folder, self.name, self.clients, self.on_round = folder, name, clients, on_round
        self.rounds: list[RoundRecord] = []
        self.watch: Watch = foreign.watching(self.take)

    def __enter__(self) -> "Recording":
        with runs.writing(self.folder):
            self._write("running", None, {}, [])
            self.lines = runs.Lines(self.folder)
            self.metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        return self

    def take(self, seen: "Round") -> None:
        """A round is over."""
        record, evaluations = records(seen)
        groups = {"train": seen.train.metrics(), "evaluate": seen.evaluate.metrics(), "server": seen.server or {}}
        with runs.writing(self.folder):
            self.lines.add(record, evaluations)
            self.metrics.write(json.dumps({"round": seen.number, **groups}) + "\n")
            self.metrics.flush()
        self.rounds.append(record)
        self.on_round(record)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Write the last model that could be seen, and the summary."""
        from fedsim.engines.flower import foreign  # noqa: PLC0415 -- as above

        status: Status = "finished" if error is None else "failed"
        if isinstance(error, KeyboardInterrupt):
            status = "interrupted"
        self.lines.close()
        self.metrics.close()
        tensors, left = foreign.tensors(self.watch.arrays) if self.watch.arrays is not None else ({}, [])
        with runs.writing(self.folder):
            if tensors:
                runs.save_model(self.folder, tensors, {})
            self._write(status, None if error is None else str(error), tensors, left)

    def _write(self, status: Status, error: str | None, tensors: dict[str, torch.Tensor], left: list[str]) -> None:
        seen, done = self.watch, status != "running"
        initial = _point(0, seen.initial) if seen.initial else None
        content = {
            "format": runs.FORMAT,
            "name": self.name,
            "kind": KIND,
            "status": status,
            "error": error,
            **summarize(self.rounds, initial, planned=seen.planned or len(self.rounds), target=None),
            "clients": self.clients,
            "model": {"name": None, "parameters": num_entries(tensors)},
            "strategies": seen.strategies,
            "failed_messages": seen.messages - seen.answers,
            "first_failure": seen.first_failure,
            "not_seen": not_seen(seen, self.rounds, bool(tensors), left) if done else [],
        }
        runs.write_json(self.folder / "summary.json", content)


def not_seen(watch: "Watch", rounds: Sequence[RoundRecord], model: bool, left: Sequence[str]) -> list[str]:
    """What the folder lacks because the app did not show it, in sentences."""
    told = []
    if not watch.messages:
        told.append("The app sent no message to any client.")
    elif not rounds:
        told.append("Rounds: the app starts no Flower strategy, and its messages do not say their round.")
    elif not watch.strategies:
        told.append("The server's own metrics: the app starts no Flower strategy; shown are means over its clients.")
    if watch.unnumbered and rounds:
        told.append(f"The round of {watch.unnumbered} messages.")
    if rounds and all(r.loss is None and r.accuracy is None for r in rounds):
        told.append("Held-out loss and accuracy: no metric has such a name; all metrics are in metrics.jsonl.")
    if not model:
        told.append("The final model: no strategy has shown any arrays.")
    if left:
        told.append(f"Arrays that are not in model.safetensors, since torch cannot hold them: {', '.join(left)}.")
    return told


def records(seen: "Round") -> tuple[RoundRecord, list[ClientEvaluation]]:
    """A round as lines of rounds.jsonl and clients.jsonl.

    Held-out loss and accuracy are the server's if it evaluates, else what the clients' come to.
    """
    held_out = _point(seen.number, seen.server or {})
    if held_out.loss is None and held_out.accuracy is None:
        held_out = _point(seen.number, seen.evaluate.metrics())
    failed = {client: f"evaluate: {why}" for client, why in seen.evaluate.failed.items()}
    failed |= {client: f"train: {why}" for client, why in seen.train.failed.items()}
    evaluations = [e for client, own in sorted(seen.evaluate.replies.items()) for e in _of_client(seen, client, own)]
    record = RoundRecord(
        round=seen.number,
        loss=held_out.loss,
        accuracy=held_out.accuracy,
        train_loss=_named(seen.train.metrics(), "loss"),
        clients=len(seen.train.replies),
        seconds=seen.ended - seen.began,
        bytes_up=seen.bytes_up,
        bytes_down=seen.bytes_down,
        cohort=tuple(sorted(seen.train.replies)),
        failed=dict(sorted(failed.items())),
    )
    return with_spread(record, np.array([e.accuracy for e in evaluations], dtype=np.float64)), evaluations


def _of_client(seen: "Round", client: int, own: Seen) -> list[ClientEvaluation]:
    found, examples = _point(seen.number, own), own.get("num-examples")
    if found.loss is None or found.accuracy is None or not isinstance(examples, int | float):
        return []
    return [ClientEvaluation(seen.number, client, int(examples), found.loss, found.accuracy)]


def _point(round: int, metrics: Seen) -> Metrics:
    return Metrics(round, _named(metrics, "loss"), _named(metrics, "accuracy", "acc"))


def _named(metrics: Seen, *words: str) -> float | None:
    """The metric of this name, or else the first whose name ends in it: eval_loss, test-accuracy, val_acc."""
    numbers = {name.lower().replace("-", "_"): v for name, v in metrics.items() if isinstance(v, int | float)}
    exact = [numbers[word] for word in words if word in numbers]
    ending = [v for word in words for name, v in numbers.items() if name.endswith(f"_{word}")]
    return next((float(v) for v in [*exact, *ending]), None)
