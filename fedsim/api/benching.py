"""What this machine does with a config: speeds by path, what a run would choose and why, how long it would take."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedsim import params as p
from fedsim import rng
from fedsim.api import folders
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.engines.engine import Job
from fedsim.engines.local import measuring
from fedsim.engines.local.engine import LONG_S, Local, OneProcess, automatic, cores, expected_examples
from fedsim.engines.local.plan import Plan
from fedsim.engines.local.sharing import ranges, tasks_of_a_round
from fedsim.engines.local.trainer import trainer
from fedsim.environment import cpu
from fedsim.errors import ConfigError
from fedsim.federation import Federation, job
from fedsim.records import Broadcast, Examples
from fedsim.training.client import gradient, layer_inputs
from fedsim.training.evaluate import BATCH

SIDE = 1024  # of the square matrices whose product is the machine's peak
SPENT_S = 0.5  # on the peak, and on the speed of evaluation; the best try counts
_COMPILED = "speeds are those before compiling"
_WORKER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import fedsim.engines.local.worker"


@dataclass(frozen=True)
class Paths:
    """Ways to train a client, by plan such as "fused, 16 clients".

    speeds: examples per second of one process. left_out: plans not tried, as a smaller chunk was hopeless.
    refused: why a path does not apply, by path.
    chosen, why: by these speeds. remembered: what runs take, from an earlier measurement; None if there is none.
    """

    speeds: dict[str, float]
    left_out: tuple[str, ...]
    refused: dict[str, str]
    chosen: str
    why: str
    remembered: str | None


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations, of which only matrix products and convolutions are counted.

    peak: per second, of a float32 product of square matrices in one thread. per_example: of a training step.
    share: of the peak that training on the chosen path reaches; None if nothing is counted.
    """

    peak: float
    per_example: int
    share: float | None


@dataclass(frozen=True)
class Estimate:
    """Of the whole run, in seconds of processor time: a machine that does other things as well takes longer.

    What the server does between rounds is not in it.

    trained, tested: examples, expected. speed, test_speed: examples per second of one process.
    at_once: processes that are busy, on average, in training. start_s: of the workers.
    """

    trained: float
    speed: float
    at_once: float
    training_s: float
    tested: int
    test_speed: float
    evaluation_s: float
    start_s: float
    total_s: float


@dataclass(frozen=True)
class Bench:
    """What was found. ``engine`` is that of the config; of another than ``local``, all the rest is of ``local``."""

    name: str
    engine: str
    cpu: str
    cores: int
    torch: str
    paths: Paths
    workers: int
    workers_why: str
    arithmetic: Arithmetic
    estimate: Estimate


def bench(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    progress: build.Progress = build.silent,
) -> Bench:
    """Measure what this machine does with a config. There is no run, and nothing is written.

    Speeds are measured anew, whatever earlier runs remember, in one process of one thread.

    Args:
        config, overrides, progress: as in :func:`run`.

    Raises:
        ConfigError, DataError: as in :func:`run`.
    """
    with importable(folders.folder_of(config)), folders.one_thread():
        checked = config_files.load(config, overrides)
        federation, engine = build.federation(checked, progress)
        local = engine if isinstance(engine, Local) else Local("auto", "auto")
        work = local.placed(job(federation))
        paths, plan, speed = _paths(work, local)
        workers, why = _workers(work, local, plan, speed)
        arithmetic = _arithmetic(job(federation), local.device, speed)
        return Bench(
            name=checked.name,
            engine=checked.engine.name,
            cpu=cpu(),
            cores=cores(),
            torch=torch.__version__,
            paths=paths,
            workers=workers,
            workers_why=why,
            arithmetic=arithmetic,
            estimate=_estimate(federation, work, plan, speed, workers),
        )


def _paths(work: Job, local: Local) -> tuple[Paths, Plan, float]:
    """All paths, and the plan that this engine would choose among its own, with its speed."""
    name = measuring.name
    try:
        own = measuring.candidates(work, local.mode, compiled=local.compile)
    except ValueError as error:
        raise ConfigError(f"engine: {error}") from error
    others = [plan for plan in measuring.candidates(work, "auto", compiled=local.compile) if plan not in own]
    mine = measuring.measure(work, own)
    speeds = {**mine, **measuring.measure(work, others)}
    plan, best = measuring.fastest(mine), max(mine, key=lambda one: mine[one])
    known = measuring.remembered(work, local.mode, compiled=local.compile)
    why = "the fastest" if plan == best else f"plainer than {name(best)}, and about as fast"
    paths = Paths(
        speeds={name(one): speed for one, speed in speeds.items()},
        left_out=tuple(name(one) for one in [*own, *others] if one not in speeds),
        refused=_refusals(work, local, [*own, *others]),
        chosen=name(plan),
        why="; ".join([f"engine.mode is {local.mode}"] * (local.mode != "auto") + [why] + [_COMPILED] * local.compile),
        remembered=None if known is None else name(known.plan),
    )
    return paths, plan, mine[plan]


def _refusals(work: Job, local: Local, plans: list[Plan]) -> dict[str, str]:
    """Why a path is not among the plans."""
    refused = {}
    if (why := measuring.not_fused(work, compiled=local.compile)) is not None:
        refused["fused"] = why
    if all(plan.path != "vectorised" for plan in plans):
        refused["vectorised"] = measuring.not_mappable(work) or "there is only one client in a round"
    return refused


def _workers(work: Job, local: Local, plan: Plan, speed: float) -> tuple[int, str]:
    """Processes of a run, and why."""
    if local.workers != "auto":
        return local.workers, "engine.workers"
    found = automatic(work, measuring.Choice(plan, "", {measuring.name(plan): speed}))
    alone = expected_examples(work) / speed
    if work.data.train.labels.device.type != "cpu":
        return found, "the device is no cpu"
    many = "one for each core" if found == cores() else "one for each part of a round"
    rule = many if alone > LONG_S else f"from {LONG_S:g} s on there would be several"
    return found, f"one process would train for {alone:.1f} s; {rule}"


def _arithmetic(work: Job, device: str, speed: float) -> Arithmetic:
    peak, each = peak_flops(device), step_flops(work)
    return Arithmetic(peak, each, speed * each / peak if each else None)


def peak_flops(device: str) -> float:
    """Floating-point operations per second of a large float32 matrix product in one thread, here and now."""
    a, b = (rng.uniform(rng.fold(0, side), SIDE * SIDE).view(SIDE, SIDE).to(device) for side in ("left", "right"))
    return 2 * SIDE**3 / _best_s(lambda: float(torch.mm(a, b)[0, 0]))  # a float waits for the device


def step_flops(work: Job) -> int:
    """Floating-point operations per example of the matrix products and convolutions in a step by autograd.

    work: on the CPU.
    """
    own, data = work.work, work.data.client(int(work.data.partition.sizes().argmax()))
    batch = data.take(torch.arange(min(len(data), own.batch_size or len(data))))
    params, buffers = p.of(own.model)
    own.model.train()
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment] # of oneDNN's LSTM the counter sees nothing
    try:
        with FlopCounterMode(display=False) as counter, rng.torch_seeded(0):
            gradient(own, params, buffers, batch, layer_inputs(own, 0, 1))
    finally:
        torch.backends.mkldnn.enabled = before
    return round(int(counter.get_total_flops()) / len(batch))


def _estimate(federation: Federation, work: Job, plan: Plan, speed: float, workers: int) -> Estimate:
    trained, tested, test_speed = expected_examples(work), _tested(federation), _test_speed(work, plan)
    busy = min(workers, cores())
    at_once = _at_once(work, plan, busy)
    training_s = trained / speed / at_once
    evaluation_s = tested / test_speed / (busy if workers > 1 and ranges(work.data, work.data.test, workers) else 1)
    start_s = _start_s() if workers > 1 else 0.0
    total_s = training_s + evaluation_s + start_s
    return Estimate(trained, speed, at_once, training_s, tested, test_speed, evaluation_s, start_s, total_s)


def _at_once(work: Job, plan: Plan, busy: int) -> float:
    """A round is over with its last task: with 5 tasks of one length, 4 processes are as good as 2.5."""
    count = tasks_of_a_round(work, plan)
    return count / math.ceil(count / busy)


def _tested(federation: Federation) -> int:
    """Examples that the whole run scores: the test set, and the clients' own where that is another."""
    f, data = federation, federation.data
    each = len(data.test) + (0 if data.client_test is data.test else len(data.client_test))
    return each * (1 + f.rounds // f.eval_every + (f.rounds % f.eval_every > 0))


def _test_speed(work: Job, plan: Plan) -> float:
    """Examples per second of an evaluation, by a batch of the test set."""
    some = Examples(work.data.test.inputs[:BATCH], work.data.test.labels[:BATCH])
    params, buffers = p.of(work.work.model)
    alone, broadcast = OneProcess(trainer(work, plan, mixes=False)), Broadcast(params, buffers, {}, 0)
    return len(some) / _best_s(lambda: alone.evaluate(broadcast, some))


def _start_s() -> float:
    """What a worker takes to import what it needs; all of them start at the same time."""
    before = os.times()
    subprocess.run([sys.executable, "-c", _WORKER, json.dumps(sys.path)], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _best_s(work: Callable[[], object]) -> float:
    return measuring.best_of(work, SPENT_S, tries=2)[0]
