"""Which plan is fastest here: measured once for a model, a batch and a machine, then remembered."""

import contextlib
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from fedsim import params as p
from fedsim import rng
from fedsim.data.locations import cache_folder
from fedsim.engines.engine import Job
from fedsim.engines.local.plan import Plan, chunks, read
from fedsim.engines.local.trainer import rows_of, sizes_of
from fedsim.environment import cpu
from fedsim.models.layers.keyed import mixes_examples as layers_mix
from fedsim.records import Broadcast, Examples
from fedsim.training import kept
from fedsim.training.chain import chain_of
from fedsim.training.client import LocalWork, batch_loss, layer_inputs
from fedsim.training.stacked import group_of, train_stacked
from fedsim.training.steps import step_of

T = TypeVar("T")
Mode = Literal["auto", "sequential", "vectorised", "fused"]

STEPS = 4  # a measurement trains so many
SPENT_S = 0.1  # and is repeated, the best counting, until it took so long
BETTER = 1.1  # a plan must be so much faster than those before it, so that noise seldom decides
HOPELESS = 0.5  # larger chunks are not tried on a path that reaches no more than this part of the best
STOPPING = "with train.early_stopping each client trains by itself, in the plain loop"


@dataclass(frozen=True)
class Choice:
    """plan: what was chosen. why: in words. speeds: examples per second of one process, by candidate; {} if unknown."""

    plan: Plan
    why: str
    speeds: dict[str, float]


def choose(job: Job, mode: Mode, recorded: Mapping[str, Any], *, compiled: bool = False) -> Choice:
    """The plan for a job.

    Args:
        job: whose first clients are trained for a few steps, from a copy of its model.
        mode: a path, or auto for the fastest.
        recorded: the plan that the run began with, {} for a new run.
        compiled: the plan is to be compiled, which rules out the fused path. It is chosen by uncompiled speeds, since
            a compiler takes longer than most runs.

    Raises:
        ValueError: the model cannot be trained in this mode; says why.
    """
    plan = read(recorded)
    if plan is not None and mode in ("auto", plan.path):
        return Choice(plan, "as when the run began", _speeds(recorded))
    found = remembered(job, mode, compiled=compiled)  # before anything is tried: that takes a second in a new process
    if found is None:
        speeds = measure(job, candidates(job, mode, compiled=compiled))
        found = Choice(fastest(speeds), "measured", {name(plan): round(speed, 1) for plan, speed in speeds.items()})
        _remember(_file(job, mode, compiled), found)
    return replace(found, plan=replace(found.plan, compiled=compiled))


def remembered(job: Job, mode: Mode, *, compiled: bool = False) -> Choice | None:
    """What was chosen here the first time; None if nothing was, or the file is damaged."""
    try:
        found = json.loads(_file(job, mode, compiled).read_text())
    except (OSError, ValueError):
        return None
    plan = read(found)
    if plan is None or plan.chunk not in (1, *chunks(job.cohort)) or mode not in ("auto", plan.path):
        return None
    return Choice(plan, "measured", _speeds(found))


def described(choice: Choice) -> dict[str, Any]:
    """The choice as environment.json tells it, and as :func:`choose` reads it again."""
    return {**asdict(choice.plan), "chosen": choice.why, "speeds": choice.speeds}


def name(plan: Plan) -> str:
    """The plan in words: "vectorised, 16 clients"."""
    return f"{plan.path}, {plan.chunk} client{'s' * (plan.chunk > 1)}"


def candidates(job: Job, mode: Mode, *, compiled: bool = False) -> list[Plan]:
    """Plans that can take this job, the plainest first.

    Raises:
        ValueError: none can, in this mode; says why.
    """
    several, plans = chunks(job.cohort), []
    if compiled and job.work.stopping is not None:
        raise ValueError(f"compile: {STOPPING}")
    if mode in ("auto", "sequential"):
        plans.append(Plan("sequential", 1))
    if mode in ("auto", "fused"):
        refusal = not_fused(job, compiled=compiled)
        if refusal is None:
            plans += [Plan("fused", chunk) for chunk in (1, *several)]
        elif mode == "fused":
            raise ValueError(refusal)
    if mode in ("auto", "vectorised"):
        refusal = not_mappable(job)
        if refusal is None:
            plans += [Plan("vectorised", chunk) for chunk in (several or [1])]
        elif mode == "vectorised":
            raise ValueError(f"the model cannot be vectorised over clients: {refusal}")
    return plans


def not_fused(job: Job, *, compiled: bool = False) -> str | None:
    """Why clients of this job cannot be trained by hand-written steps; None if they can."""
    if job.work.stopping is not None:
        return f"mode fused: {STOPPING}"
    if compiled or job.work.autocast:
        return f"fused steps are written by hand, {'for float32' if job.work.autocast else 'not compiled'}"
    if not job.work.objective.plain:
        return "fused steps are written by hand, for the plain cross-entropy"
    if job.work.kept:
        return "fused steps start all clients from the same parameters, and batch norm is not the same for all"
    if chain_of(job.work.model) is None:
        return "fused needs a chain of standard layers, as the model is not"
    return None


def not_mappable(job: Job) -> str | None:
    """Why clients of this job cannot be trained under ``torch.func.vmap``; None if they can."""
    if job.work.stopping is not None:
        return STOPPING
    if job.work.seeded:
        return "it draws from torch's global generator"
    try:
        with warnings.catch_warnings():
            # torch would loop over the clients where it has no rule for an operation, and say so in a warning
            warnings.filterwarnings("error", message="There is a performance drop")
            _train(job, Plan("vectorised", 2), steps=1)
    except Exception as error:  # torch raises many kinds
        return str(error).partition("\n")[0].partition(". ")[0]
    return None


def measure(job: Job, plans: Sequence[Plan]) -> dict[Plan, float]:
    """Examples per second of each plan in this process; hopeless ones are left out."""
    speeds: dict[Plan, float] = {}
    for plan in plans:
        smaller = [speed for other, speed in speeds.items() if other.path == plan.path]
        if smaller and max(smaller) < HOPELESS * max(speeds.values()):
            continue
        speeds[plan] = _speed(job, plan)
    return speeds


def fastest(speeds: Mapping[Plan, float]) -> Plan:
    """The fastest plan; the earlier one where two are about as fast."""
    best = next(iter(speeds))
    for plan, speed in speeds.items():
        best = plan if speed > BETTER * speeds[best] else best
    return best


def mixes_examples(work: LocalWork, pool: Examples) -> bool:
    """Whether what the model makes of one example depends on the rest of the batch, as with batch norm.

    Where no layer says so of itself, the first example is scored twice, beside two different others.
    """
    if layers_mix(work.model):
        return True
    params, buffers = p.of(work.model)
    first, second = pool.inputs[0], pool.inputs[-1]
    other = second.flip(-1) if not second.is_floating_point() else 0.3 - 1.7 * second
    work.model.train()
    losses = []
    for beside in (second, other):
        labels = torch.stack([pool.labels[0], torch.full_like(pool.labels[0], -100)])
        batch, own = Examples(torch.stack([first, beside]), labels), {n: b.clone() for n, b in buffers.items()}
        with torch.no_grad(), rng.torch_seeded(0):
            losses.append(batch_loss(work, params, own, batch, layer_inputs(work, 0, 1)))
    return not torch.equal(losses[0], losses[1])


def _speed(job: Job, plan: Plan) -> float:
    seconds, examples = best_of(lambda: _train(job, plan, STEPS), SPENT_S)
    return examples / seconds


def best_of(work: Callable[[], T], spent_s: float, tries: int = 1) -> tuple[float, T]:
    """Do something until ``spent_s`` have passed, at least ``tries`` times.

    Returns:
        Seconds of the best try, in time of this thread, which other processes cannot take; and its result.
    """
    began, seconds = time.perf_counter(), list[float]()
    while True:
        start = time.thread_time()
        result = work()
        seconds.append(time.thread_time() - start)
        if len(seconds) >= tries and time.perf_counter() - began > spent_s:
            return min(seconds), result


def _train(job: Job, plan: Plan, steps: int) -> int:
    """Train the first clients for a few steps; how many examples they saw."""
    partition, batch, device = job.data.partition, job.work.batch_size, job.data.train.labels.device
    known = min(plan.chunk, partition.num_clients)
    most = int(partition.offsets[known]) if batch is None else steps * batch
    held = sizes_of(partition, range(known))

    def most_first(client: int) -> int:
        return -held[client]

    ids = sorted((sorted(range(known), key=most_first) * plan.chunk)[: plan.chunk], key=most_first)
    sizes = tuple(min(held[client], most) for client in ids)
    params, buffers = (kept.shared(tensors, job.work.kept) for tensors in p.of(job.work.model))
    broadcast = Broadcast(params, buffers, job.strategy.server.extra(job.strategy.server.init(params)), 1)
    rows = torch.from_numpy(rows_of(partition, ids, sizes)).to(device)
    keys = rng.fold_tensor(rng.as_tensor(0), torch.arange(len(ids))).to(device)
    work, fresh = replace(job.work, local_epochs=1), job.strategy.local.init(broadcast.params)
    group = group_of(work, rows, sizes, keys, (fresh,) * len(ids))
    train_stacked(work, step_of(work, plan.path), broadcast, job.data.train, group)
    return sum(sizes)


def _file(job: Job, mode: Mode, compiled: bool) -> Path:
    return cache_folder("plans") / f"{_fingerprint(job, mode, compiled)}.json"


def _fingerprint(job: Job, mode: Mode, compiled: bool) -> str:
    """What the candidates and their speeds depend on, hashed."""
    work, offsets = job.work, job.data.partition.offsets
    facts = [
        str(work.model),
        [(n, tuple(t.shape), str(t.dtype)) for n, t in work.model.state_dict().items()],
        list(job.data.train.inputs.shape[1:]),
        [work.batch_size, int(offsets[1] - offsets[0]) if work.batch_size is None else None, work.autocast],
        [work.optimizer.folded is not None, work.rule.correct.__qualname__, work.max_grad_norm is not None],
        work.objective.told(),
        [mode, chunks(job.cohort), compiled, work.seeded, work.stopping is not None],
        [torch.__version__, cpu(), job.data.train.labels.device.type],
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _speeds(found: Mapping[str, Any]) -> dict[str, float]:
    speeds = found.get("speeds")
    known = speeds.items() if isinstance(speeds, Mapping) else ()
    return {str(plan): float(speed) for plan, speed in known if isinstance(speed, int | float)}


def _remember(file: Path, choice: Choice) -> None:
    content = described(choice)
    with contextlib.suppress(OSError):  # a home that cannot be written costs a measurement next time
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{time.time_ns()}")
        fresh.write_text(json.dumps(content))
        fresh.replace(file)
