"""Run the first rounds of a run again and hold them against what its folder says."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from fedsim import environment, runs
from fedsim.api import differences, folders
from fedsim.api.differences import TOLERANCE, Difference
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.engines.engine import Engine
from fedsim.errors import ConfigError, DataError
from fedsim.federation import Federation, RoundResult, start
from fedsim.federation import run as run_rounds
from fedsim.recording import OnRound
from fedsim.records import Params, RoundRecord

Status = Literal["equal", "within tolerance", "differs"]
OnStart = Callable[[str, int], None]

ALLOWED = ("engine", "data.root", "data.dataset")  # what may be changed without making it another run


@dataclass(frozen=True)
class Verification:
    """What came of it.

    rounds: the last one compared. recorded: whole rounds in the folder. tensors: whether final tensors were compared.
    first: where it differs first, beyond rounding; None if it does not.
    largest: largest relative difference within rounding; None if all is equal bit for bit.
    reasons: what is different here from where the run ran; empty if all is equal bit for bit.
    """

    folder: Path
    status: Status
    rounds: int
    recorded: int
    tensors: bool
    first: Difference | None
    largest: Difference | None
    reasons: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether all is equal bit for bit, or within rounding."""
        return self.status != "differs"

    def told(self) -> list[str]:
        """In words, a line for each thing."""
        what = f"{self.rounds} of {self.recorded} rounds{' and the final tensors' * self.tensors}"
        if self.status == "equal":
            return [f"equal, bit for bit: {what}"]
        near = self.largest
        furthest = "" if near is None else f"{near.relative:.1e} in {near.field} of round {near.round}"
        if self.first is None:
            head = f"equal within {TOLERANCE:g} a round (largest difference {furthest}): {what}"
            return [head, *(f"different here: {reason}" for reason in self.reasons)]
        unexplained = "nothing that environment.json tells is different here: the folder or fedsim itself was changed"
        why = [f"perhaps because: {reason}" for reason in self.reasons] or [unexplained]
        amplified = "rounding differs before that or beside it, which training amplifies"
        return [str(self.first), *why, *([f"{amplified} (largest difference {furthest})"] if near else [])]


class _Parted(Exception):  # noqa: N818 -- no error: the quickest way out of an engine
    """The run goes another way from here on."""


@dataclass
class _Comparison:
    """What has been found so far; told of every round as it is done."""

    federation: Federation
    config: Config
    recorded: Sequence[RoundRecord]
    initial: Mapping[str, Any]
    finals: Sequence[tuple[str, int, Params]]
    same_engine: bool
    apart: bool
    on_round: OnRound
    found: list[Difference] = field(default_factory=list)
    last: int = 0

    def take(self, result: RoundResult) -> None:
        """Compare a round, and the tensors of which the folder has them.

        Raises:
            _Parted: it differs.
        """
        now, flips = result.record, differences.one_flip(self.federation.data)
        self.last = now.round
        if now.round == 0:  # the initial model, which stands in summary.json
            if self.initial and not self._by_others:
                recorded = replace(now, loss=self.initial["loss"], accuracy=self.initial["accuracy"])
                self._add(differences.of_rounds(recorded, now, ("loss", "accuracy"), flips))
            return
        self._add(differences.of_rounds(self.recorded[now.round - 1], now, self._fields(now.round), flips))
        for where, round, tensors in self.finals:
            if round == now.round:
                here = {**result.state.params, **result.state.buffers}
                self._add(differences.of_tensors(round, where, tensors, here))
        self.on_round(now)

    def _fields(self, round: int) -> list[str]:
        """What is compared. Where a run was cut off, or made longer, a round has an evaluation out of its turn."""
        total, left_out = self.config.train.rounds, {"round", "seconds"}
        if round % self.federation.eval_every and round != total:
            left_out |= set(differences.HELD_OUT)
        if self._by_others:
            left_out |= set(differences.HELD_OUT)
        if not self.same_engine:
            left_out |= {*differences.SENT, *differences.BY_CLIENTS} if self.apart else set(differences.SENT)
        return [f.name for f in fields(RoundRecord) if f.name not in left_out]

    @property
    def _by_others(self) -> bool:
        """Whether held-out loss and accuracy are of those clients that answered, on machines of their own."""
        return self.apart and self.federation.work.personal

    def _add(self, found: list[Difference]) -> None:
        self.found += found
        if not all(one.within for one in found):
            raise _Parted


def verify(
    folder: str | Path,
    rounds: int | Literal["all"] = 3,
    overrides: Mapping[str, Any] | None = None,
    *,
    on_start: OnStart | None = None,
    on_round: OnRound | None = None,
    progress: build.Progress = build.silent,
) -> Verification:
    """Run the first rounds of a run again and compare; nothing is written into its folder.

    Compared are the initial model's evaluation, each round's line of rounds.jsonl but for ``seconds`` (and for bytes,
    if the engine is another one), and, if all rounds are run again, the final tensors. After
    round r losses and tensors may differ by ``r * 1e-5`` relative, an accuracy by one example, all else by nothing.
    A deep network, or a large step size, may amplify the rounding of another plan to more than that within some
    rounds; the first rounds then agree and later ones do not.

    Args:
        folder: the run folder, of a run that is finished or not.
        rounds: how many, >= 1; as many as there are, if there are fewer.
        overrides: as in :func:`run`, of ``engine``, ``data.root`` and ``data.dataset`` only: to run it elsewhere.
        on_start: called before the first round, with the engine's name and the number of rounds.
        on_round: called after every round.
        progress: as in :func:`run`.

    Returns:
        Whether it is the same, or where it first differs; nothing is run beyond that round.

    Raises:
        DataError: not a run folder, no whole round in it, a baseline, or the data is no longer the same.
        ConfigError: ``rounds`` is below 1, or an override would make it another run.
    """
    _check(rounds, overrides or {})
    opened = runs.open_run(folder)
    recorded = _recorded(opened)
    count = len(recorded) if rounds == "all" else min(rounds, len(recorded))
    with importable(folders.config_folder(opened)), folders.one_thread():
        config = config_files.load(opened.config(), {**_here(opened), **(overrides or {})})
        federation, engine = build.federation(config, progress)
        folders.check_same_data(federation, opened)
        federation = replace(federation, rounds=count)  # schedules are made already, and follow the whole run
        before = opened.environment().get("engine", {})
        engine = folders.prepared(engine, federation, before)
        comparison = _Comparison(
            federation,
            config,
            recorded,
            opened.summary().get("initial") or {},
            _finals(opened) if count == len(recorded) else (),
            engine.describe().get("name") == before.get("name"),
            before.get("runtime") == "deployment",
            on_round or folders.ignore,
        )
        (on_start or folders.ignore)(engine.describe().get("name", config.engine.name), count)
        with contextlib.suppress(_Parted):
            run_rounds(federation, start(federation), engine, comparison.take)
        return _result(opened, comparison, engine)


def _here(folder: runs.RunFolder) -> dict[str, Any]:
    """Changes to the config without which the run cannot run here: other machines are not at hand."""
    engine = folder.environment().get("engine", {})
    return {"engine": "reference"} if engine.get("runtime") == "deployment" else {}


def _check(rounds: int | Literal["all"], overrides: Mapping[str, Any]) -> None:
    problems = []
    if rounds != "all" and (type(rounds) is not int or rounds < 1):
        problems.append(f"rounds: must be a whole number >= 1, or all, got {rounds}")
    for key in overrides:
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in ALLOWED):
            problems.append(f"{key}: must be of {', '.join(ALLOWED)}; with another value it would be another run")
    if problems:
        raise ConfigError(problems)


def _recorded(folder: runs.RunFolder) -> list[RoundRecord]:
    kind = folder.summary().get("kind", "federated")
    if kind != "federated":
        what = {"flower-app": "a Flower app", "transfer": "a transfer"}.get(kind, f"a baseline ({kind})")
        raise DataError(f"{folder.path}: {what} cannot be verified, only a federated run")
    recorded, path = folder.rounds(), folder.path / "rounds.jsonl"
    if not recorded:
        raise DataError(f"{path}: no whole round to verify")
    for expected, record in enumerate(recorded, 1):
        if record.round != expected:
            raise DataError(f"{path}: line {expected} must be of round {expected}, but is of {record.round}")
    return recorded


def _finals(folder: runs.RunFolder) -> list[tuple[str, int, Params]]:
    """Tensors that the folder holds, with the file and the round they are of."""
    found = []
    if (folder.path / "model.safetensors").exists():
        found.append(("model.safetensors", int(folder.summary()["rounds_done"]), folder.model()))
    if (folder.path / "checkpoint" / "state.json").exists():
        state = runs.load_checkpoint(folder.path)
        found.append(("the checkpoint", state.round, {**state.params, **state.buffers}))
    return found


def _result(opened: runs.RunFolder, comparison: _Comparison, engine: Engine) -> Verification:
    found, last = comparison.found, comparison.last
    first = next((one for one in found if not one.within), None)
    status: Status = "equal" if not found else "within tolerance" if first is None else "differs"
    return Verification(
        folder=opened.path,
        status=status,
        rounds=last,
        recorded=len(comparison.recorded),
        tensors=any(round <= last for _, round, _ in comparison.finals),
        first=first,
        largest=max((one for one in found if one.within), key=lambda one: one.relative, default=None),
        reasons=tuple(_reasons(opened, comparison.config, engine, last)) if found else (),
    )


def _reasons(opened: runs.RunFolder, config: Config, engine: Engine, last: int) -> list[str]:
    """What is different here from where the rounds ran, and what else may make another run of it."""
    recorded, now = opened.environment(), environment.describe(engine.describe())
    reasons = differences.of_environments(recorded, now)
    reasons += [f"the code of {module} has changed" for module in folders.other_code(config, opened)]
    for record in opened.rounds()[:last]:
        reasons += [f"round {record.round} was without client {k}: {why}" for k, why in record.failed.items()]
    for resumed in recorded.get("resumed", []):
        if resumed.get("round", 0) < last:
            other = differences.of_environments(resumed, now)
            reasons += [f"{line} (after round {resumed['round']})" for line in other if line not in reasons]
        if config.train.schedule.name != "constant":
            reasons.append(f"resumed after round {resumed['round']}: the schedule may have had another end until then")
    return reasons
