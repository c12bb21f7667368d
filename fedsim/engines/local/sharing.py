"""A cohort, or an evaluation, in parts that somebody does: this process, workers of its own, or actors elsewhere.

Engines hand in the function that does them, and differ in nothing else.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fedsim import wire
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Job
from fedsim.engines.folding import Part, blocks, join
from fedsim.engines.local.plan import Plan, tasks
from fedsim.engines.local.trainer import Task
from fedsim.records import Broadcast, CohortUpdate, Examples
from fedsim.training.evaluate import BATCH, Scores, score

RANGES = 4  # of examples to score, for each process


def tasks_of(job: Job, plan: Plan, clients: Sequence[int]) -> list[tuple[tuple[int, ...], ...]]:
    """The tasks of a cohort."""
    return tasks(blocks(job.data.partition.offsets, clients), plan.chunk)


def tasks_of_a_round(job: Job, plan: Plan) -> int:
    """How many tasks a cohort of the expected size has: more processes than that would stand idle."""
    return len(tasks_of(job, plan, range(job.cohort)))


def trained(
    job: Job,
    plan: Plan,
    broadcast: Broadcast,
    clients: Sequence[int],
    train: Callable[[Sequence[Task]], Iterable[Part]],
) -> CohortUpdate:
    """What a cohort comes to. ``train`` gives the parts of all tasks, in the order of their blocks."""
    parts = train(tasks_of(job, plan, clients))
    return join(job, broadcast, parts, bytes_down=wire.sent_down(broadcast, clients))


@dataclass(frozen=True)
class Range:
    """Examples [start, end) of the test set, or of the clients' own test examples."""

    start: int
    end: int
    own: bool

    def of(self, data: FederatedData) -> Examples:
        """These examples (views)."""
        examples, span = data.client_test if self.own else data.test, slice(self.start, self.end)
        return Examples(examples.inputs[span], examples.labels[span])


def ranges(data: FederatedData, examples: Examples, processes: int) -> list[Range]:
    """Ranges of whole batches, so that no score depends on who computed it; [] if it is not worth while to share out.

    Args:
        data: which every process has.
        examples: to score, the very object; other processes have no others than the data's.
        processes: to share them out to.
    """
    batches = math.ceil(len(examples) / BATCH)
    if batches < 2 or not (examples is data.test or examples is data.client_test):
        return []
    length = math.ceil(batches / (RANGES * processes)) * BATCH
    own = examples is not data.test
    return [Range(start, start + length, own) for start in range(0, len(examples), length)]


def scored(
    job: Job,
    broadcast: Broadcast,
    examples: Examples,
    processes: int,
    score_ranges: Callable[[Sequence[Range]], Iterable[Scores]],
) -> Scores:
    """Scores of examples. ``score_ranges`` gives those of each range; here is done what is not worth sharing out."""
    asked = ranges(job.data, examples, processes)
    if not asked:
        return score(job.work.model, broadcast.params, broadcast.buffers, examples)
    return joined(list(score_ranges(asked)))


def joined(found: Sequence[Scores]) -> Scores:
    """Scores of ranges, in order, as one."""
    return Scores(*(torch.cat([getattr(one, name) for one in found]) for name in ("loss", "correct", "labels")))
