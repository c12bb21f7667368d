"""Run a transfer: both parties in this process, or one of them here and the other elsewhere."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim import runs
from fedsim.api.transfer_folder import TransferRecording, new_folder
from fedsim.config import build, parties
from fedsim.config.schema import Config
from fedsim.data.sides import Sides
from fedsim.models.drawing import UNTOLD, Draws
from fedsim.params import num_entries
from fedsim.records import Params, RoundRecord
from fedsim.summary import Metrics
from fedsim.transfer.agreement import Agreed, Party
from fedsim.transfer.channel import Channel
from fedsim.transfer.links import Link
from fedsim.transfer.multiplication import Multiplication
from fedsim.transfer.party import Outcome, take_part
from fedsim.transfer.protocols import multiplications
from fedsim.transfer.scoring import Score, Scorer, accuracy
from fedsim.transfer.terms import Role
from fedsim.transfer.together import Ends, Iteration, run_together

KIND = "transfer"
OnRound = Callable[[RoundRecord], None]


@dataclass(frozen=True)
class Pair:
    """What a display asks of a federation, of two parties about to begin."""

    rounds: int
    draws: Draws = UNTOLD


def run(
    config: Config,
    beside: Path,
    *,
    on_start: Callable[[Path, Pair], None],
    on_round: OnRound,
    progress: build.Progress,
    new: Callable[[Config, Path, str], Path] = new_folder,
) -> Path:
    """Run both parties of a checked config: the run folder.

    new: makes it, from the config, where that lies, and who runs what.

    Raises:
        ConfigError, DataError: nothing was written.
        TransferError: the run failed; the folder has no model.
    """
    found, agreed = parties.sides(config, progress), parties.agreed(config)
    a, b = parties.party(config, "a", found), parties.party(config, "b", found)
    scorer = Scorer(a, b, found.held_out, agreed.loss)
    every = config.train.eval_every
    with multiplications(agreed) as ends, _links(config) as links:
        folder = new(config, beside, "flower" if links else "both parties in one process")
        first = Metrics(0, *scorer(a.params, b.params))
        recorder = _recorder(config, agreed, folder, [a, b], first=first, on_round=on_round)
        with runs.locked(folder), recorder as recording:

            def take(it: Iteration) -> None:
                due = it.number % every == 0 or it.number == agreed.iterations
                score = scorer(it.a, it.b) if due else Score(None, None)
                recording.take(it.number, it.loss, score, (it.sent_a, it.sent_b))

            on_start(folder, Pair(agreed.iterations))
            done = run_together(a, b, agreed, ends, take, links=links)
            nets = {"a": done.a.params, "b": done.b.params}
            recording.finish(nets, _result(done, ends), _measured(done.b, found))
    return folder


@contextlib.contextmanager
def _links(config: Config) -> Iterator[tuple[Link, Link] | None]:
    """What carries the messages: Flower's, where the config names it as engine; None: queues."""
    if config.engine.name != "flower":
        yield None
        return
    from fedsim.transfer.relayed import in_process  # noqa: PLC0415 -- flwr takes half a second to import

    with in_process() as ends:
        yield ends


def run_party(
    config: Config,
    role: Role,
    channel: Channel,
    multiplication: Multiplication,
    *,
    beside: Path,
    on_start: Callable[[Path, Pair], None],
    on_round: OnRound,
    prepared: tuple[Sides, Party] | None = None,
) -> Path:
    """Be one party of a checked config: the folder with this party's part of the run.

    Args:
        config: checked, with a ``transfer`` section.
        role: of this party.
        channel: to the other party.
        multiplication: this party's end.
        beside: folder of the config.
        on_start, on_round: hooks.
        prepared: what :func:`prepare` returned, if it was called before there was a channel.

    Raises:
        ConfigError, DataError: nothing was written.
        TransferError: the run failed; the folder has no model.
    """
    agreed = parties.agreed(config)
    found, party = prepared or prepare(config, role)
    folder = new_folder(config, beside, f"party {role}")
    recorder = _recorder(config, agreed, folder, [party], first=None, on_round=on_round)
    with runs.locked(folder), recorder as recording:

        def take(number: int, params: Params, loss: float | None) -> None:
            mine, theirs = sum(channel.sent.values()), sum(channel.received.values())
            recording.take(number, loss, Score(None, None), (mine, theirs) if role == "a" else (theirs, mine))

        on_start(folder, Pair(agreed.iterations))
        done = take_part(party, agreed, channel, multiplication, take)
        result = {"role": role, **_of_party(role, done, channel.sent, multiplication)}
        recording.finish({role: done.params}, result, _measured(done, found))
    return folder


def prepare(config: Config, role: Role, progress: build.Progress = build.silent) -> tuple[Sides, Party]:
    """Load a party's data and make its net, before anybody is met.

    Raises:
        ConfigError, DataError: see :mod:`fedsim.config.parties`.
    """
    found = parties.sides(config, progress)
    return found, parties.party(config, role, found)


def _recorder(
    config: Config, agreed: Agreed, folder: Path, here: list[Party], *, first: Metrics | None, on_round: OnRound
) -> TransferRecording:
    facts = {
        "name": config.name,
        "kind": KIND,
        "model": {
            "name": config.model.name,
            "parameters": sum(num_entries(party.params) for party in here),
            "input_shape": list(here[-1].inputs.shape[1:]),
            "num_classes": 2,
        },
        "transfer": {"protocol": agreed.protocol, "hidden": agreed.hidden},
    }
    return TransferRecording(folder, facts, agreed.iterations, config.train.target_accuracy, first, on_round)


def _measured(b: Outcome, found: Sides) -> float | None:
    """Accuracy of what B was told, where the right labels are known here."""
    held_out = found.held_out
    if b.predicted is None or held_out is None or held_out.labels is None or not len(b.predicted):
        return None
    return accuracy(b.predicted, held_out.labels)


def _result(done: Ends, ends: tuple[Multiplication, Multiplication]) -> dict[str, Any]:
    return {
        **_of_party("a", done.a, done.sent_a, ends[0]),
        **_of_party("b", done.b, done.sent_b, ends[1]),
    }


def _of_party(role: str, done: Outcome, sent: Mapping[str, int], counted: Multiplication) -> dict[str, Any]:
    """What summary.json says of a party."""
    told: dict[str, Any] = {
        "overlap": done.overlap,
        f"sent_by_{role}": dict(sent),
        f"counted_by_{role}": counted.describe(),
    }
    told[f"exposed_{role}"] = done.exposed
    if done.predicted is not None:
        told["predictions"] = len(done.predicted)
    return told
