"""Where two tellings of the same run part: records of rounds, tensors, environments."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim.data.federated import FederatedData
from fedsim.engines.local.measuring import name as plan_name
from fedsim.engines.local.plan import read
from fedsim.params import same_bits
from fedsim.records import IGNORED, Params, RoundRecord

TOLERANCE = 1e-5  # relative, of losses and of tensors, for each round so far: a hundred roundings of float32 or so
FLOOR = 0.01  # nats; a loss below it is compared as if it were so large, for its own rounding does not shrink with it

SENT = ("bytes_up", "bytes_down")
_ON_CLIENTS = ("client_accuracy_mean", "client_accuracy_std", "client_accuracy_worst_tenth")
HELD_OUT = ("loss", "accuracy", *_ON_CLIENTS)
BY_CLIENTS = (*_ON_CLIENTS, "failed")  # what clients on separate machines say, or fail to
_TOLD = ("fedsim", "python", "torch", "numpy", "flwr", "cpu", "platform", "git")
_PLACED = {"device": "cpu", "precision": "fp32", "compiled": False}  # of engines that do not tell


@dataclass(frozen=True)
class Difference:
    """One number that is not the same bit for bit.

    field: of rounds.jsonl, or an entry of a tensor and the file that holds it.
    relative: |now - recorded| as a part of the larger one, for a tensor of its largest entry; infinite where that
        means nothing.
    within: whether rounding explains it, see :func:`allowed`.
    """

    round: int
    field: str
    recorded: Any
    now: Any
    relative: float
    within: bool

    def __str__(self) -> str:
        """In one line."""
        line = f"round {self.round}, {self.field}: recorded {_shown(self.recorded)}, now {_shown(self.now)}"
        if self.within or not math.isfinite(self.relative):
            return line
        return f"{line} ({self.relative:.1e} apart, {allowed(self.round):.0e} is allowed)"


def allowed(round: int) -> float:
    """The relative difference that rounding may make up to a round, for it adds up; the initial model counts as one."""
    return TOLERANCE * max(round, 1)


def of_rounds(
    recorded: RoundRecord, now: RoundRecord, fields: Iterable[str], flips: Mapping[str, float]
) -> list[Difference]:
    """Fields of two records of a round that differ.

    flips: from :func:`one_flip`.
    """
    pairs = ((field, _written(getattr(recorded, field)), _written(getattr(now, field))) for field in fields)
    return [_of_numbers(now.round, field, a, b, flips.get(field, 0.0)) for field, a, b in pairs if a != b]


def _written(value: Any) -> Any:
    """As rounds.jsonl can hold it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _of_numbers(round: int, field: str, recorded: Any, now: Any, flip: float) -> Difference:
    if not isinstance(recorded, float) or not isinstance(now, float):
        return Difference(round, field, recorded, now, math.inf, False)
    apart = abs(now - recorded)
    relative = apart / max(abs(recorded), abs(now), FLOOR)
    return Difference(round, field, recorded, now, relative, relative <= allowed(round) or apart <= flip * (1 + 1e-9))


def one_flip(data: FederatedData) -> dict[str, float]:
    """By how much each accuracy moves at most when one held-out label is guessed otherwise.

    An accuracy is a count: rounding either leaves it alone or, where two logits are as good as equal, moves it by one.
    """
    counts = (data.client_test.labels != IGNORED).reshape(len(data.client_test), -1).sum(1).numpy()
    part = data.test_partition
    owned = np.bincount(part.owners(), weights=counts[part.indices], minlength=part.num_clients)
    owned = owned[owned > 0]
    found = {"accuracy": 1 / max(int((data.test.labels != IGNORED).sum()), 1)}
    if not len(owned):
        return found
    clients, most = len(owned), 1 / float(owned.min())
    return {
        **found,
        "client_accuracy_mean": most / clients,
        "client_accuracy_std": most / math.sqrt(clients),  # a deviation is a distance over sqrt(clients)
        "client_accuracy_worst_tenth": most / math.ceil(clients / 10),
    }


def of_tensors(round: int, where: str, recorded: Params, now: Params) -> list[Difference]:
    """Tensors that differ, each by the entry that differs most."""
    found = []
    for name in sorted(recorded.keys() | now.keys()):
        a, b = recorded.get(name), now.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found.append(Difference(round, f"{name} in {where}", _kind(a), _kind(b), math.inf, False))
        elif not same_bits({name: a}, {name: b}):
            found.append(_of_entries(round, name, where, a, b))
    return found


def _of_entries(round: int, name: str, where: str, recorded: Tensor, now: Tensor) -> Difference:
    a, b = recorded.double().reshape(-1), now.double().reshape(-1)
    apart = (b - a).abs().nan_to_num(nan=math.inf)
    at = int(apart.argmax())
    largest = max(float(a.abs().max()), float(b.abs().max()))
    relative = float(apart[at]) / largest if math.isfinite(largest) and largest > 0 else math.inf
    relative = relative if float(apart[at]) > 0 else 0.0  # 0 and -0
    within = relative <= allowed(round) and recorded.is_floating_point()
    entry = [int(i) for i in np.unravel_index(at, tuple(recorded.shape))] or ""
    return Difference(round, f"{name}{entry} in {where}", float(a[at]), float(b[at]), relative, within)


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def of_environments(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different here from where the run ran, of what can change a bit of its result; a line for each."""
    pairs = [(key, recorded.get(key), now.get(key)) for key in _TOLD]
    before, here = recorded.get("engine", {}), now.get("engine", {})
    pairs += [("engine", before.get("name"), here.get("name")), ("plan", _plan(before), _plan(here))]
    pairs += [(key, before.get(key, usual), here.get(key, usual)) for key, usual in _PLACED.items()]
    return [f"{key}: recorded {_said(a)}, now {_said(b)}" for key, a, b in pairs if a != b]


def _plan(engine: Any) -> str | None:
    plan = read(engine)
    return None if plan is None else plan_name(plan)


def _said(value: Any) -> str:
    if isinstance(value, Mapping) and "commit" in value:
        return f"{value['commit'][:12]}{' and uncommitted changes' * bool(value.get('dirty'))}"
    return "none" if value is None else str(value)


def _shown(value: Any) -> str:
    """Enough digits to tell two floats apart that are close, no more than there are."""
    if isinstance(value, tuple) and len(value) > 8:
        return f"{', '.join(map(str, value[:8]))}, ... ({len(value)})"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "null" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)
