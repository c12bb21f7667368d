"""Scoring examples in several processes: which ranges of them, and how their scores become one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedsim.data.federated import FederatedData
from fedsim.records import Examples
from fedsim.training.evaluate import BATCH, Scores

RANGES = 4  # of examples to score, for each process


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


def joined(found: Sequence[Scores]) -> Scores:
    """Scores of ranges, in order, as one."""
    return Scores(*(torch.cat([getattr(one, name) for one in found]) for name in ("loss", "correct", "labels")))
