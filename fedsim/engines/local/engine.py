"""The local engine: makes its choices, then trains cohorts in this process or in workers of its own."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fedsim import params as p
from fedsim.engines.engine import Cohorts, Job
from fedsim.engines.local.measuring import Choice, Mode, choose, described, mixes_examples, name
from fedsim.engines.local.pool import Pool
from fedsim.engines.local.sharing import tasks_of_a_round, trained
from fedsim.engines.local.trainer import Trainer, trainer
from fedsim.records import Broadcast, CohortUpdate, Examples, Params
from fedsim.training.evaluate import Scores, score

LONG_S = 10.0  # training expected to take longer in one process is given to workers, which take 2 to 3 s to start


@dataclass(frozen=True)
class OneProcess:
    """Cohorts trained in this process, task by task."""

    trainer: Trainer

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """See ``Cohorts.run_cohort``."""
        job, device = self.trainer.job, self.trainer.job.data.train.labels.device
        here = on(broadcast, device)
        own = {client: p.to(state, device) for client, state in states.items()}
        plan, train = self.trainer.plan, self.trainer.train_all
        return back(trained(job, plan, here, clients, lambda asked: train(here, asked, own, key)))

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """See ``Cohorts.evaluate``."""
        device = self.trainer.job.data.train.labels.device
        here, there = on(broadcast, device), Examples(examples.inputs.to(device), examples.labels.to(device))
        scores = score(self.trainer.job.work.model, here.params, here.buffers, there)
        return Scores(scores.loss.cpu(), scores.correct.cpu(), scores.labels.cpu())


@dataclass(frozen=True)
class Choices:
    """What a local engine decided for a job: a plan, the number of processes, and why."""

    plan: Choice
    processes: int
    mixes: bool


@dataclass(frozen=True)
class Local:
    """The engine of one machine; ``choices`` are made by :meth:`prepared`."""

    mode: Mode
    workers: int | Literal["auto"]
    device: str = "cpu"
    compile: bool = False
    autocast: bool = False
    choices: Choices | None = None

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "Local":
        """See ``Engine.prepared``. The number of processes changes no result, so it is chosen afresh."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch finds no cuda here")
        if job.work.seeded and self.device != "cpu":
            raise ValueError("device: a model that draws from torch's global generator trains on the cpu only")
        if job.work.stopping is not None and self.device != "cpu":
            raise ValueError("device: with train.early_stopping clients train on the cpu only")
        placed = self.placed(job)
        plan = choose(placed, self.mode, recorded, compiled=self.compile)
        asked = 1 if job.cohort == 1 else self.workers  # one client has nothing to share out
        processes = automatic(placed, plan) if asked == "auto" else asked
        return replace(self, choices=Choices(plan, processes, mixes_examples(placed.work, placed.data.train)))

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``."""
        made = (self if self.choices else self.prepared(job, {})).choices
        assert made is not None  # as prepared makes them
        placed = self.placed(job)
        if made.processes == 1:
            loop(OneProcess(trainer(placed, made.plan.plan, mixes=made.mixes)))
            return
        with Pool(placed, made.plan.plan, mixes=made.mixes, workers=made.processes) as pool:
            loop(pool)

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        said: dict[str, Any] = {"name": "local", "mode": self.mode, "workers": self.workers, "device": self.device}
        said |= {"precision": "bf16" if self.autocast else "fp32"}
        if self.choices is None:
            return said
        return {**said, "processes": self.choices.processes, **described(self.choices.plan)}

    def placed(self, job: Job) -> Job:
        """The job where it is to be trained, and in which precision. On the CPU nothing is copied."""
        work, data, device = replace(job.work, autocast=self.autocast), job.data, torch.device(self.device)
        if device.type != "cpu":
            work = replace(work, model=copy.deepcopy(work.model).to(device))
            train = Examples(data.train.inputs.to(device), data.train.labels.to(device))
            data = replace(data, train=train)
        return replace(job, work=work, data=data)


def on(broadcast: Broadcast, device: torch.device) -> Broadcast:
    """The broadcast on a device."""
    params, buffers, extra = (p.to(own, device) for own in (broadcast.params, broadcast.buffers, broadcast.extra))
    masks = broadcast.masks
    if masks is not None:
        masks = replace(masks, kept=p.to(masks.kept, device))
    return replace(broadcast, params=params, buffers=buffers, extra=extra, masks=masks)


def back(update: CohortUpdate) -> CohortUpdate:
    """What a cohort came to, on the CPU, where the server is."""
    cpu = torch.device("cpu")
    return replace(
        update,
        update=None if update.update is None else p.to(update.update, cpu),
        buffers=None if update.buffers is None else p.to(update.buffers, cpu),
        states={client: p.to(state, cpu) for client, state in update.states.items()},
    )


def automatic(job: Job, choice: Choice) -> int:
    """Processes for a run: one for each core if it is long, one alone otherwise or where the speed is not known."""
    speed = choice.speeds.get(name(choice.plan))
    if speed is None or os.name != "posix" or job.data.train.labels.device.type != "cpu":
        return 1
    return min(cores(), tasks_of_a_round(job, choice.plan)) if expected_examples(job) / speed > LONG_S else 1


def expected_examples(job: Job) -> float:
    """How many examples the whole run is expected to train on, each time it sees one."""
    partition = job.data.partition
    return len(partition.indices) / partition.num_clients * job.cohort * job.work.local_epochs * job.rounds


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
