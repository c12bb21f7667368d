"""Which way clients are trained: the path, and how many at once. Changes results by no more than rounding."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fedsim.training.steps import Path

LARGEST_CHUNK = 64
PATHS: tuple[Path, ...] = get_args(Path)


@dataclass(frozen=True)
class Plan:
    """path: see :mod:`fedsim.training.steps`. chunk: clients side by side in one step, >= 1.

    compiled: whether ``torch.compile`` makes the gradient's code; not for the fused path.
    """

    path: Path
    chunk: int
    compiled: bool = False


def read(found: Any) -> Plan | None:
    """The plan in what somebody wrote down; None if there is none."""
    if not isinstance(found, Mapping):
        return None
    chunk = found.get("chunk")
    path = next((path for path in PATHS if path == found.get("path")), None)
    if path is None or type(chunk) is not int or not 1 <= chunk <= LARGEST_CHUNK:
        return None
    return Plan(path, chunk, found.get("compiled") is True)


def chunks(cohort: int) -> list[int]:
    """Sizes of chunks worth a try with so many clients in a round: 4, 16 and 64, but no more than a quarter of them.

    A quarter, so that there are at least four tasks to share out over processes, however many there are.
    """
    largest = min(math.ceil(cohort / 4), LARGEST_CHUNK)
    return [size for size in (4, 16) if size < largest] + ([largest] if largest > 1 else [])


def tasks(blocks: Sequence[tuple[int, ...]], chunk: int) -> list[tuple[tuple[int, ...], ...]]:
    """Blocks of a cohort in the portions that are trained at one go: one block, or as many as a chunk can hold.

    As even as they can be, so that processes have about as much to do. A function of cohort and plan alone: who trains
    next to whom must not depend on the number of processes.
    """
    if not blocks:
        return []
    count = math.ceil(len(blocks) / max(chunk // len(blocks[0]), 1))
    bounds = [math.ceil(len(blocks) * i / count) for i in range(count + 1)]
    return [tuple(blocks[start:end]) for start, end in itertools.pairwise(bounds)]
