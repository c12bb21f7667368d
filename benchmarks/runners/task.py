"""What every runner is asked and what it answers: one command line in, one JSON file out."""

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from peers import PEERS
from workloads import WORKLOADS, Workload


class Task(NamedTuple):
    """warmup: rounds before the timed ones. variant: one of the ways in which the runner can use the machine."""

    workload: Workload
    rounds: int
    warmup: int
    variant: str
    out: Path

    @property
    def total(self) -> int:
        """Rounds to run."""
        return self.warmup + self.rounds


def parse(peer: str) -> Task:
    """Read the command line of a peer's runner."""
    variants = (*PEERS[peer].variants, *PEERS[peer].others)
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, required=True, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--variant", default=variants[0], choices=variants)
    given = parser.parse_args()
    return Task(WORKLOADS[given.workload], given.rounds, given.warmup, given.variant, given.out)


def answer(
    task: Task,
    seconds: Sequence[float],
    accuracy: float,
    *,
    processes: int,
    threads: int,
    packages: Sequence[str],
    **more: Any,
) -> None:
    """Write and print the result.

    Args:
        task: what was asked.
        seconds: wall time of every round, those of the warm-up included.
        accuracy: on the test set, after all rounds.
        processes: that train clients.
        threads: of each of them.
        packages: whose versions matter.
        more: whatever else is worth keeping.
    """
    if len(seconds) != task.total:
        raise RuntimeError(f"{task.total} rounds were asked for, {len(seconds)} were timed")
    result = {
        "workload": task.workload.name,
        "variant": task.variant,
        "seconds": list(seconds[task.warmup :]),
        "warmup_seconds": list(seconds[: task.warmup]),
        "samples_per_round": task.workload.samples,
        "accuracy": accuracy,
        "rounds_in_all": task.total,
        "processes": processes,
        "threads": threads,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        **more,
    }
    task.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
