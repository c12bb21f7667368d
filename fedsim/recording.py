"""Writing a run folder while a run goes on, and how the run ended, however it ends."""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from fedsim import runs
from fedsim.data import heterogeneity
from fedsim.data.federated import FederatedData
from fedsim.errors import FedsimError, RunError
from fedsim.federation import RoundResult
from fedsim.records import ClientEvaluation, Params, RoundRecord, ServerState
from fedsim.summary import Metrics, Status, last_pruned, summarize

SPLIT_DETAIL_CLIENTS = 2000  # split.json lists every client up to here
FINGERPRINT_ENTRIES = 4_000_000  # of the inputs that are hashed; keeps it well under a second
PAUSE_S = 1.0  # between checkpoints, at least,
PAUSE_WRITES = 20  # and at least so many times as long as the last one took

OnRound = Callable[[RoundRecord], None]
Kind = Literal["federated", "centralised", "alone"]


@dataclass(frozen=True)
class Weight:
    """A parameter that can be pruned, as it is before anything is.

    uses: multiply-accumulates of each of its entries for one example; None if that is not known.
    """

    shape: tuple[int, ...]
    uses: int | None


@dataclass(frozen=True)
class Facts:
    """What summary.json says of a run beside its results. ``rounds`` is the planned number.

    kind: of training; the last two are the baselines.
    parameters: before any pruning. weights: what can be pruned, by parameter name; {} of a run that does not prune.
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
    weights: Mapping[str, Weight] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """When a checkpoint was begun and done, in seconds of the recording's clock."""

    began: float
    ended: float


def due(last: Written, now: float) -> bool:
    """Whether to write another checkpoint while a run goes on.

    Syncing with the disk can take longer than a round, and writing the states of many clients longer still. Spaced
    like this, checkpoints take about a twentieth of a run at most. A run that is killed (``kill -9``, a power cut) has
    to repeat no more than a second, or twenty times a write, and the round under way; a run that ends in any other way
    saves its last whole round, whatever this says.
    """
    return now - last.ended >= max(PAUSE_S, PAUSE_WRITES * (last.ended - last.began))


class Recording:
    """A context in which a run writes its folder; on leaving, summary.json says finished, failed or interrupted.

    Lines are written every round, checkpoints when they are :func:`due` and on leaving. A folder with rounds in it is
    continued.
    """

    def __init__(
        self,
        folder: Path,
        facts: Facts,
        state: ServerState,
        on_round: OnRound,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.facts, self.on_round, self.clock = folder, facts, on_round, clock
        reader = runs.RunFolder(folder)
        found = reader.summary().get("initial")
        self.initial = Metrics(**found) if found else None
        self.rounds = [_slim(record) for record in reader.rounds()]
        self.state = state  # of the last whole round
        self.saved: int | None = None  # round of the last checkpoint written here

    def __enter__(self) -> "Recording":
        now = self.clock()
        self.written = Written(now, now)
        with runs.writing(self.folder):
            self._write("running")
            self.lines = runs.Lines(self.folder)
        return self

    def save(self) -> None:
        """Write a checkpoint of the last whole round, unless that is the last one written."""
        if self.saved == self.state.round:
            return
        began = self.clock()
        with runs.writing(self.folder):
            self.lines.sync()  # a checkpoint must not reach the disk before the lines that it makes count
            runs.save_checkpoint(self.folder, self.state)
        self.saved, self.written = self.state.round, Written(began, self.clock())

    def take(self, result: RoundResult) -> None:
        """Write one round's lines, and perhaps a checkpoint."""
        record = result.record
        with runs.writing(self.folder):
            if record.round == 0:  # its state was saved before it was evaluated
                self.initial = Metrics(0, record.loss, record.accuracy)
                self._write("running")
                return
            self.lines.add(record, result.evaluations)
        self.rounds.append(_slim(record))
        self.state = result.state  # from here on the round is whole, and is what a signal or an error leaves
        if due(self.written, self.clock()):
            self.save()
        self.on_round(record)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Save the last whole round and say how it ended."""
        try:
            if error is None:
                self._finish()
            else:
                self._break_off(error)
        finally:
            with contextlib.suppress(OSError):  # what could not be written was an error when it was tried first
                self.lines.close()

    def _finish(self) -> None:
        self.save()
        with runs.writing(self.folder):
            runs.save_model(self.folder, self.state.params, self.state.buffers)
            self._write("finished")

    def _break_off(self, error: BaseException) -> None:
        with contextlib.suppress(RunError):  # the disk is full, most likely; the last checkpoint stands
            self.save()
        with contextlib.suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                self._write("interrupted")
            else:
                what = str(error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
                self._write("failed", what)

    def _write(self, status: Status, error: str | None = None) -> None:
        whole = self.rounds[: self.state.round]  # a signal may have come between a record and its state
        content = _summary(self.facts, whole, self.initial, status, error=error, params=self.state.params)
        runs.write_json(self.folder / "summary.json", content)


def _slim(record: RoundRecord) -> RoundRecord:
    """The record without its cohort, which no summary needs: memory must not grow with rounds times clients."""
    return replace(record, cohort=())


def _summary(
    facts: Facts,
    rounds: Sequence[RoundRecord],
    initial: Metrics | None,
    status: Status,
    *,
    error: str | None = None,
    params: Params | None = None,
) -> dict[str, Any]:
    """Everything in summary.json. params: of the last round, for a run that prunes."""
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
            **_of_pruning(facts, rounds, params or {}),
        },
    }


def _of_pruning(facts: Facts, rounds: Sequence[RoundRecord], params: Params) -> dict[str, Any]:
    """What is left of the model, and what could be pruned; nothing for a run that does not prune.

    Masks leave a parameter its shape, the removal of channels does not, so entries are counted as the parameters are
    now, and of each that can be pruned as many as remain of what it was.
    """
    if not facts.weights:
        return {}
    record = last_pruned(rounds)
    remaining = {} if record is None else record.remaining
    left = {name: share * math.prod(facts.weights[name].shape) for name, share in remaining.items()}
    whole = sum(tensor.numel() for name, tensor in params.items() if name not in left)
    weights = {name: asdict(weight) for name, weight in facts.weights.items()}
    return {"parameters_left": round(whole + sum(left.values())), "weights": weights}


def record_rounds(
    folder: Path,
    facts: Facts,
    lines: Iterable[tuple[RoundRecord, tuple[ClientEvaluation, ...]]],
    final: ServerState | None,
) -> None:
    """Write rounds that are all there already, the final model if there is one, and a summary; no checkpoint."""
    records = []
    with runs.writing(folder), contextlib.closing(runs.Lines(folder)) as file:
        for record, evaluations in lines:
            file.add(record, evaluations)
            records.append(record)
        file.sync()
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
