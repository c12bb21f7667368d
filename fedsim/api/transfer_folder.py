"""Writing the run folder of a transfer: by whoever runs both parties, or by one party of its own part."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsim import environment, runs
from fedsim.config import load as config_files
from fedsim.config.schema import Config
from fedsim.errors import FedsimError
from fedsim.records import Params, RoundRecord
from fedsim.summary import Metrics, Status, summarize
from fedsim.transfer.scoring import Score


def new_folder(config: Config, beside: Path, engine: str) -> Path:
    """A run folder with what is known before the first iteration.

    engine: who runs what, in a word or two.
    """
    folder = runs.create(Path(config.output).expanduser(), config.name)
    facts = {**environment.describe({"name": engine}), "config_folder": str(beside.resolve())}
    with runs.writing(folder):
        runs.write_config(folder, config_files.resolved(config))
        runs.write_json(folder / "environment.json", facts)
    return folder


@dataclass
class TransferRecording:
    """A context in which a transfer writes its folder; on leaving, summary.json says how it ended.

    facts: what summary.json says beside results. planned: iterations. initial: accuracy before any training.
    """

    folder: Path
    facts: Mapping[str, Any]
    planned: int
    target: float | None
    initial: Metrics | None
    on_round: Callable[[RoundRecord], None]
    rounds: list[RoundRecord] = field(default_factory=list)

    def __enter__(self) -> "TransferRecording":
        self._before, self._sent = time.monotonic(), (0, 0)
        self._result: dict[str, Any] = {}
        with runs.writing(self.folder):
            self._write("running")
            self._lines = runs.Lines(self.folder)
        return self

    def take(self, number: int, loss: float | None, score: Score, sent: tuple[int, int]) -> None:
        """Write one iteration's line.

        loss: that is minimised, before the iteration. score: of both nets after it.
        sent: bytes so far, from A to B and from B to A.
        """
        now = time.monotonic()
        record = RoundRecord(
            round=number,
            loss=score.loss,
            accuracy=score.accuracy,
            train_loss=loss,
            clients=2,
            seconds=now - self._before,
            bytes_up=sent[0] - self._sent[0],
            bytes_down=sent[1] - self._sent[1],
        )
        self._before, self._sent = now, sent
        with runs.writing(self.folder):
            self._lines.add(record, ())
        self.rounds.append(record)
        self.on_round(record)

    def finish(self, nets: Mapping[str, Params], result: Mapping[str, Any], accuracy: float | None) -> None:
        """Write the nets, and keep what came out for the summary.

        accuracy: of the labels that party B got by the protocol itself.
        """
        self._result = dict(result)
        if accuracy is not None:
            self._result["accuracy"] = accuracy
        with runs.writing(self.folder):
            for role, params in nets.items():
                runs.save_tensors(self.folder / f"party-{role}.safetensors", params)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Say how it ended."""
        with contextlib.suppress(OSError):
            self._lines.sync()
            self._lines.close()
        if error is None:
            with runs.writing(self.folder):
                self._write("finished")
            return
        with contextlib.suppress(OSError):
            if isinstance(error, KeyboardInterrupt):
                self._write("interrupted")
            else:
                self._write(
                    "failed", str(error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
                )

    def _write(self, status: Status, error: str | None = None) -> None:
        found = summarize(self.rounds, self.initial, planned=self.planned, target=self.target)
        result = dict(self._result)
        if "accuracy" in result:
            last = Metrics(len(self.rounds), found["loss"], result.pop("accuracy"))
            found |= {"accuracy": last.accuracy, "final": vars(last), "best": found["best"] or vars(last)}
        content = {
            "format": runs.FORMAT,
            **{key: self.facts[key] for key in ("name", "kind")},
            "status": status,
            "error": error,
            **found,
            "clients": 2,
            "model": self.facts["model"],
            "transfer": {**self.facts["transfer"], **result},
        }
        runs.write_json(self.folder / "summary.json", content)
