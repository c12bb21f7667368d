"""The run folder: everything that is written during a run, and the one way to read it back.

``<output>/<name>-<date>-<n>/`` holds config.yaml, environment.json, split.json, rounds.jsonl, clients.jsonl,
summary.json, checkpoint/ and, at the end, model.safetensors and report.html. Whole files are replaced atomically;
the two ``.jsonl`` files only grow, and what they hold beyond the checkpoint is cut off on resume, so a run that is
killed at any moment goes on from its last whole round.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import filelock
import safetensors
import safetensors.torch
import yaml

from fedsim.errors import ConfigError, DataError, RunError
from fedsim.params import separate
from fedsim.records import ClientEvaluation, Params, RoundRecord, ServerState

FORMAT = 1  # of the run folder; raised when an older fedsim could not read the result

_STATE = "checkpoint/state.json"
_Record = TypeVar("_Record", RoundRecord, ClientEvaluation)


# ---------------------------------------------------------------- writing


def create(output: Path, name: str) -> Path:
    """Make a new, empty run folder ``output/name-YYYY-MM-DD-n`` with the first free n.

    Raises:
        ConfigError: the folder cannot be made.
    """
    today = datetime.date.today().isoformat()
    try:
        output.mkdir(parents=True, exist_ok=True)
        for n in range(1, 1_000_000):
            folder = output / f"{name}-{today}-{n}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise ConfigError(f"output: cannot make a run folder in {output}: {error.strerror or error}") from error
    raise ConfigError(f"output: no free run folder name left in {output}")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace ``path`` atomically: a reader, or a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically. Numbers that JSON cannot hold (NaN, infinity) become null."""
    write_bytes(path, (json.dumps(_finite(content), indent=2, allow_nan=False) + "\n").encode())


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the fully resolved config."""
    write_bytes(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())


class Lines:
    """rounds.jsonl and clients.jsonl, open to be added to.

    Readers see a round as soon as it is added, and so does a resume after ``kill -9``; the disk may lag behind until
    :meth:`sync`, which costs far more than adding.
    """

    def __init__(self, folder: Path) -> None:
        self._clients, self._rounds = ((folder / f"{name}.jsonl").open("ab") for name in ("clients", "rounds"))

    def add(self, record: RoundRecord, evaluations: Iterable[ClientEvaluation]) -> None:
        """One line per client, then the round's own: whoever finds a round finds its clients."""
        for file, records in ((self._clients, evaluations), (self._rounds, (record,))):
            file.write(b"".join(_line(one) for one in records))
            file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        for file in (self._clients, self._rounds):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Write what a failed :meth:`add` has left, and close both files, whether or not that can be done."""
        try:
            self._clients.close()
        finally:
            self._rounds.close()


_encode = json.JSONEncoder(allow_nan=False).encode


def _line(record: RoundRecord | ClientEvaluation) -> bytes:
    try:
        text = _encode(vars(record))
    except ValueError:  # a NaN or an infinity, which are rare; looking for them first would double the cost
        text = _encode(_finite(vars(record)))
    return f"{text}\n".encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_model(folder: Path, params: Params, buffers: Params) -> None:
    """Write the global model, parameters and buffers under their ``state_dict`` names."""
    save_tensors(folder / "model.safetensors", {**params, **buffers})


def save_tensors(path: Path, tensors: Params) -> None:
    """Write tensors by name, atomically."""
    write_bytes(path, safetensors.torch.save({name: separate(tensor) for name, tensor in tensors.items()}))


def save_checkpoint(folder: Path, state: ServerState) -> None:
    """Write the state of a whole round.

    The tensors go to a file named after the round; state.json, replaced last, says which file counts and its hash.
    """
    groups: dict[str, Params] = {"params": state.params, "buffers": state.buffers, "server": state.server}
    groups |= {"pruning": state.pruning}
    groups |= {f"clients/{client}": own for client, own in state.clients.items()}
    tensors = {f"{group}/{name}": separate(t) for group, own in groups.items() for name, t in own.items()}
    data = safetensors.torch.save(tensors)  # which sorts; the order of parameters is in state.json
    file = f"state-{state.round:06d}.safetensors"
    write_bytes(folder / "checkpoint" / file, data)
    facts = {"format": FORMAT, "round": state.round, "file": file, "bytes": len(data), "sha256": _digest(data)}
    write_json(folder / _STATE, {**facts, "order": list(tensors)})
    for old in (folder / "checkpoint").glob("state-*.safetensors"):
        if old.name != file:
            old.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A folder that cannot be written to any more is a RunError. For writes only: others have OSErrors of their own."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process from writing this run while this one does. A lock dies with its process.

    Raises:
        RunError: another process holds it.
    """
    with writing(folder):
        (folder / "checkpoint").mkdir(exist_ok=True)
    with exclusive(folder, "checkpoint/.lock", "another process is writing this run"):
        yield


@contextlib.contextmanager
def exclusive(folder: Path, name: str, otherwise: str) -> Iterator[None]:
    """Hold the lock in the file ``name`` of a folder.

    Raises:
        RunError: another process holds it; says ``otherwise``.
    """
    lock = filelock.FileLock(folder / name)
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunError(f"{folder}: {otherwise}") from error
    try:
        yield
    finally:
        lock.release()  # the file stays: whoever waits for it must not be left holding one that is gone


def forget_end(folder: Path) -> None:
    """Remove what a finished run wrote last, before it is made longer."""
    for name in ("model.safetensors", "report.html"):
        (folder / name).unlink(missing_ok=True)


def add_environment(folder: Path, resumed: Mapping[str, Any]) -> None:
    """Add to environment.json where and with what a run was resumed."""
    found = RunFolder(folder).environment()
    write_json(folder / "environment.json", {**found, "resumed": [*found.get("resumed", []), resumed]})


def trim(folder: Path, last_round: int) -> None:
    """Cut both ``.jsonl`` files after ``last_round``: lines of a later round, and a half-written last line.

    Raises:
        DataError: rounds.jsonl lacks a round up to ``last_round``.
    """
    for name in ("rounds.jsonl", "clients.jsonl"):
        path = folder / name
        if path.exists():
            kept = [line for line in read_bytes(path).split(b"\n")[:-1] if _round_of(line) <= last_round]
            write_bytes(path, b"".join(line + b"\n" for line in kept))
    found = len(RunFolder(folder).rounds())
    if found != last_round:
        raise DataError(f"{folder / 'rounds.jsonl'}: holds {found} rounds, the checkpoint is of round {last_round}")


def _round_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["round"])
    except (ValueError, KeyError, TypeError):
        return math.inf


# ---------------------------------------------------------------- reading


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run folder to read from. Made by :func:`open_run`, which checks that it is one."""

    path: Path

    def config(self) -> dict[str, Any]:
        """The fully resolved config."""
        path = self.path / "config.yaml"
        try:
            content = yaml.safe_load(read_bytes(path))
        except (yaml.YAMLError, ValueError) as error:
            raise DataError(f"{path}: not whole YAML ({error})") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}: expected a mapping, found {type(content).__name__}")
        return content

    def environment(self) -> dict[str, Any]:
        """Versions, host, device, threads and git state of the run."""
        return _json(self.path / "environment.json")

    def summary(self) -> dict[str, Any]:
        """Final and best metrics, totals, status; {} if the run broke off before it was written."""
        return self._optional("summary.json")

    def split(self) -> dict[str, Any]:
        """Sizes and label counts of the split; {} if there are too many clients to list."""
        return self._optional("split.json")

    def rounds(self) -> list[RoundRecord]:
        """Every whole round, in order."""
        return [_typed(record) for record in self._records("rounds.jsonl", RoundRecord)]

    def clients(self) -> list[ClientEvaluation]:
        """Every client evaluation, in order of round and client."""
        return self._records("clients.jsonl", ClientEvaluation)

    def model(self) -> Params:
        """The final global model under its ``state_dict`` names, or the last checkpoint's if the run is unfinished."""
        path = self.path / "model.safetensors"
        if path.exists():
            return _tensors(path, read_bytes(path))
        if self.summary().get("kind") == "alone":
            raise DataError(f"{self.path}: has no model, every client trained one of its own")
        if self.summary().get("kind") == "transfer":
            raise DataError(f"{self.path}: has no one model; party-a.safetensors and party-b.safetensors are its nets")
        if self.summary().get("kind") == "flower-app":
            raise DataError(f"{self.path}: has no model, the Flower app has not shown any arrays")
        state = load_checkpoint(self.path)
        return {**state.params, **state.buffers}

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return _json(path) if path.exists() else {}

    def _records(self, name: str, kind: type[_Record]) -> list[_Record]:
        path = self.path / name
        if not path.exists():
            return []
        lines = read_bytes(path).split(b"\n")[:-1]  # what follows the last line end was cut off when the run was killed
        try:
            return [kind(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: not one {kind.__name__} per line ({error})") from error


def _typed(record: RoundRecord) -> RoundRecord:
    """The record with what JSON has no word for: tuples, and keys that are numbers."""
    failed = {int(client): reason for client, reason in record.failed.items()}
    return dataclasses.replace(record, cohort=tuple(record.cohort), skipped=tuple(record.skipped), failed=failed)


def open_run(path: Path | str) -> RunFolder:
    """Check that ``path`` is a run folder that this version can read.

    Raises:
        DataError: it is not there, is not a run folder, or is from a newer format.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such run folder")
    for name in ("config.yaml", "environment.json"):
        if not (path / name).exists():
            raise DataError(f"{path}: not a run folder (it has no {name})")
    for name in ("summary.json", _STATE):
        found = _json(path / name).get("format", FORMAT) if (path / name).exists() else FORMAT
        if not isinstance(found, int) or found > FORMAT:
            raise DataError(f"{path / name}: run folder format {found} is newer than this fedsim reads ({FORMAT})")
    return RunFolder(path)


def load_checkpoint(folder: Path) -> ServerState:
    """The state that :func:`save_checkpoint` wrote last.

    Raises:
        DataError: no checkpoint, or a damaged one; names the file.
    """
    kind = RunFolder(folder).summary().get("kind", "federated")
    if kind != "federated":
        what = {"flower-app": "Flower app", "transfer": "transfer"}.get(kind, "baseline")
        raise DataError(f"{folder}: a {what} has no checkpoint and cannot be resumed")
    facts = _json(folder / _STATE)
    try:
        path, size, digest = folder / "checkpoint" / str(facts["file"]), int(facts["bytes"]), str(facts["sha256"])
        round, order = int(facts["round"]), list(facts["order"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / _STATE}: damaged checkpoint, field {error} is missing or wrong") from error
    data = read_bytes(path)
    if len(data) != size:
        raise DataError(f"{path}: truncated checkpoint, {len(data)} bytes where {size} were written")
    if _digest(data) != digest:
        raise DataError(f"{path}: damaged checkpoint, its sha256 is not the one in {_STATE}")
    tensors = _tensors(path, data)
    if tensors.keys() != set(order):
        raise DataError(f"{path}: does not hold the tensors that {_STATE} names")
    groups: dict[str, Params] = {"params": {}, "buffers": {}, "server": {}, "pruning": {}}
    clients: dict[int, Params] = {}
    for full in order:
        tensor = tensors[full]
        group, _, name = full.partition("/")
        if group == "clients":
            client, _, name = name.partition("/")
            clients.setdefault(int(client), {})[name] = tensor
        else:
            groups[group][name] = tensor
    return ServerState(round, groups["params"], groups["buffers"], groups["server"], clients, groups["pruning"])


def _tensors(path: Path, data: bytes) -> Params:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except ValueError as error:
        raise DataError(f"{path}: not whole JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: it is missing, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
