"""Writing a run folder while a run goes on, and how the run ended, however it ends."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from fedsim import runs
from fedsim.data import heterogeneity
from fedsim.data.federated import FederatedData
from fedsim.errors import FedsimError
from fedsim.federation import RoundResult
from fedsim.records import ClientEvaluation, RoundRecord, ServerState
from fedsim.summary import Metrics, Status, summarize

SPLIT_DETAIL_CLIENTS = 2000  # split.json lists every client up to here
FINGERPRINT_ENTRIES = 4_000_000  # of the inputs that are hashed; keeps it well under a second

OnRound = Callable[[RoundRecord], None]
Kind = Literal["federated", "centralised", "alone"]


@dataclass(frozen=True)
class Facts:
    """What summary.json says of a run beside its results. ``rounds`` is the planned number.

    kind: of training; the last two are the baselines.
    """

    name: str
    kind: Kind
    model: str
    parameters: int
    clients: int
    input_shape: tuple[int, ...]
    num_classes: int
    rounds: int
    target_accuracy: float | None


class Recording:
    """A context in which a run writes its folder; on leaving, summary.json says finished, failed or interrupted.

    A folder with rounds in it is continued.
    """

    def __init__(self, folder: Path, facts: Facts, on_round: OnRound) -> None:
        self.folder, self.facts, self.on_round = folder, facts, on_round
        reader = runs.RunFolder(folder)
        found = reader.summary().get("initial")
        self.initial = Metrics(**found) if found else None
        self.rounds = reader.rounds()

    def __enter__(self) -> "Recording":
        with runs.writing(self.folder):
            self._write("running")
        return self

    def save(self, state: ServerState) -> None:
        """Write a checkpoint."""
        with runs.writing(self.folder):
            runs.save_checkpoint(self.folder, state)

    def take(self, result: RoundResult) -> None:
        """Write one round: its lines first, then the checkpoint that makes them count."""
        record = result.record
        with runs.writing(self.folder):
            if record.round == 0:  # its state was saved before it was evaluated
                self.initial = Metrics(0, record.loss, record.accuracy)
                self._write("running")
                return
            runs.append_round(self.folder, record, result.evaluations)
            self.rounds.append(record)
            runs.save_checkpoint(self.folder, result.state)
        self.on_round(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say how it ended."""
        if error is None:
            with runs.writing(self.folder):
                self._finish()
            return
        with contextlib.suppress(OSError):  # the disk is full, most likely; the last checkpoint stands
            if isinstance(error, KeyboardInterrupt):
                self._write("interrupted")
            else:
                what = str(error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
                self._write("failed", what)

    def _finish(self) -> None:
        state = runs.load_checkpoint(self.folder)
        runs.save_model(self.folder, state.params, state.buffers)
        self._write("finished")

    def _write(self, status: Status, error: str | None = None) -> None:
        content = _summary(self.facts, self.rounds, self.initial, status, error)
        runs.write_json(self.folder / "summary.json", content)


def _summary(
    facts: Facts, rounds: Sequence[RoundRecord], initial: Metrics | None, status: Status, error: str | None = None
) -> dict[str, Any]:
    """Everything in summary.json."""
    return {
        "format": runs.FORMAT,
        "name": facts.name,
        "kind": facts.kind,
        "status": status,
        "error": error,
        **summarize(rounds, initial, planned=facts.rounds, target=facts.target_accuracy),
        "clients": facts.clients,
        "model": {
            "name": facts.model,
            "parameters": facts.parameters,
            "input_shape": list(facts.input_shape),
            "num_classes": facts.num_classes,
        },
    }


def record_rounds(
    folder: Path,
    facts: Facts,
    lines: Iterable[tuple[RoundRecord, tuple[ClientEvaluation, ...]]],
    final: ServerState | None,
) -> None:
    """Write rounds that are all there already, the final model if there is one, and a summary; no checkpoint."""
    records = []
    with runs.writing(folder):
        for record, evaluations in lines:
            runs.append_round(folder, record, evaluations)
            records.append(record)
        if final is not None:
            runs.save_model(folder, final.params, final.buffers)
        runs.write_json(folder / "summary.json", _summary(facts, records, None, "finished"))


def fingerprint(data: FederatedData) -> str:
    """A hash of who holds which examples: all labels and the split, and of the inputs a few million even picks."""
    found = hashlib.sha256()
    for array in (data.partition.offsets, data.partition.indices):
        found.update(np.ascontiguousarray(array).tobytes())
    for examples in (data.train, data.test):
        inputs = examples.inputs.reshape(-1)
        picked = inputs[:: max(1, len(inputs) // FINGERPRINT_ENTRIES)]
        found.update(str((tuple(examples.inputs.shape), examples.inputs.dtype)).encode())
        found.update(picked.contiguous().numpy().tobytes())
        found.update(examples.labels.contiguous().numpy().tobytes())
    return found.hexdigest()


def split_facts(data: FederatedData, list_up_to: float = math.inf) -> dict[str, Any]:
    """Sizes, label counts and heterogeneity of the split; the content of split.json.

    With more clients than ``list_up_to`` the lists by client are None and the summary remains.
    """
    counts = heterogeneity.label_counts(data.train.labels, data.partition, data.num_classes)
    detailed = data.num_clients <= list_up_to
    lists = {
        "sizes": data.partition.sizes(),
        "counts": counts,
        "test_sizes": data.test_partition.sizes(),
        "effective_classes": heterogeneity.effective_classes(counts),
        "earth_movers_distance": heterogeneity.earth_movers_distance(counts),
    }
    return {
        "num_clients": data.num_clients,
        "num_examples": len(data.partition.indices),
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
        "fingerprint": fingerprint(data),
        **{name: array.tolist() if detailed else None for name, array in lists.items()},
        "summary": heterogeneity.summary(counts),
    }
