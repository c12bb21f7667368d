"""Time per round and memory against cohort and population, on fedsim alone: a round costs its cohort, nothing else.

Softmax regression over 20 features, 4 examples a client, one local epoch of one step, one process, no evaluation.
Run in the project's own environment: python benchmarks/scale.py [--out FOLDER]
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.local import local
from fedsim.federation import Federation, RoundResult, cohort, run, start
from fedsim.records import Examples, Partition
from fedsim.strategies.strategy import fedavg
from fedsim.training.client import LocalWork
from fedsim.training.optimizers import sgd

FEATURES, EXAMPLES, CLASSES = 20, 4, 10
COHORTS, POPULATIONS = (10, 100, 1_000, 10_000), (1_000, 10_000, 100_000, 1_000_000)
POPULATION, COHORT = 100_000, 1_000  # what stays as it is while the other varies
ROUNDS, SOAK = 12, 300


def federation(population: int, clients_per_round: int, rounds: int) -> Federation:
    """Clients of four examples each, drawn anew."""
    n = population * EXAMPLES
    inputs = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0))
    examples = Examples(inputs, rng.bits(1, n) % CLASSES)
    owners = Partition(np.arange(0, n + 1, EXAMPLES), np.arange(n))
    nobody = Partition(np.zeros(population + 1, dtype=np.int64), np.zeros(0, dtype=np.int64))
    few = Examples(inputs[:10], examples.labels[:10])
    data = FederatedData(examples, few, owners, nobody, few, CLASSES, ())
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES))
    work = LocalWork(model, (), sgd(lr=0.01), fedavg().local, 1, 10)
    return Federation(7, data, work, fedavg(), rounds, clients_per_round, "fixed", rounds + 1, "fail")


def resident_mb() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measured(population: int, clients_per_round: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Median milliseconds of a round and of choosing its cohort, and memory."""
    began = time.perf_counter()
    made = federation(population, clients_per_round, rounds)
    memory: list[float] = []
    results: list[RoundResult] = []

    def keep(result: RoundResult) -> None:
        results.append(RoundResult(start(made), result.record, ()))
        memory.append(resident_mb())

    set_up_s = time.perf_counter() - began
    run(made, start(made), local(workers=1, mode="fused"), keep)
    rounds_ms = [1e3 * result.record.seconds for result in results[2:-1]]  # the first warms up, the last evaluates
    choosing = []
    for round in range(5):
        began = time.perf_counter()
        cohort(made, round)
        choosing.append(1e3 * (time.perf_counter() - began))
    return {
        "population": population,
        "cohort": clients_per_round,
        "set_up_s": round_to(set_up_s),
        "round_ms": round_to(statistics.median(rounds_ms)),
        "fastest_ms": round_to(min(rounds_ms)),
        "choose_ms": round_to(min(choosing)),
        "memory_mb": [round_to(memory[1]), round_to(memory[-1])],
    }


def round_to(value: float) -> float:
    """Three decimals."""
    return round(value, 3)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    by_cohort = [measured(POPULATION, size) for size in COHORTS]
    by_population = [measured(size, COHORT) for size in POPULATIONS]
    soak = measured(10_000, 100, SOAK)
    out.mkdir(parents=True, exist_ok=True)
    found = {"by_cohort": by_cohort, "by_population": by_population, "soak": soak}
    (out / "scale.json").write_text(json.dumps(found, indent=1))
    for title, rows in (("cohort", by_cohort), ("population", by_population), (f"{SOAK} rounds", [soak])):
        print(f"\nby {title}:")
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for axis, key, rows in zip(axes, ("cohort", "population"), (by_cohort, by_population), strict=True):
        axis.loglog([row[key] for row in rows], [row["round_ms"] for row in rows], "o-")
        axis.set(xlabel=f"clients in the {key}", title=f"time of a round against {key}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    figure.tight_layout()
    figure.savefig(out / "scale.png", dpi=120)


if __name__ == "__main__":
    main()
