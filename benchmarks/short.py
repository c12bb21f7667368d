"""The short comparison, for CI: fedsim's local engine must be at least about as fast as a bare torch loop.

Both train the same rounds of one workload in turn, a round here, a round there, so that both meet the same noise.
The fastest round of each counts. Exits with 1 if fedsim is slower than FLOOR times the bare loop.
Run: python benchmarks/short.py
"""

import argparse
import os
import sys
import tempfile

import prepared
import torch
from runners import bare
from runners.fedsim import ENGINES, config
from workloads import WORKLOADS

from fedsim.config.build import federation
from fedsim.config.load import load
from fedsim.federation import RoundResult, job, run, start

WORKLOAD = WORKLOADS["2nn-devices"]
WARMUP, ROUNDS = 3, 15
FLOOR = 0.9  # loose: it should tell a broken engine, not a busy machine
TRIES = 3  # before it is believed


def main() -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="local")
    engine = parser.parse_args().engine
    for _ in range(TRIES):
        pairs = compare(engine)[WARMUP:]
        ours, theirs = (WORKLOAD.samples / min(seconds) for seconds in zip(*pairs, strict=True))  # noise slows down
        ratio = ours / theirs
        print(
            f"{WORKLOAD.name}: fedsim {ours:,.0f} samples/s, bare torch loop {theirs:,.0f}: {ratio:.2f} times as fast"
        )
        if ratio >= FLOOR:
            return 0
    print(f"benchmarks/short.py: the ratio must be at least {FLOOR}, got {ratio:.2f}", file=sys.stderr)
    return 1


def compare(engine: str) -> list[tuple[float, float]]:
    """Seconds of fedsim's and of the bare loop's rounds, pair by pair; one torch thread in every process."""
    torch.set_num_threads(1)
    prepared.write()
    loop = bare.Loop(WORKLOAD, prepared.load(WORKLOAD))
    rounds = WARMUP + ROUNDS
    federated, made = federation(load(config(WORKLOAD, rounds, ENGINES[engine])))
    pairs: list[tuple[float, float]] = []

    def after_round(result: RoundResult) -> None:
        if 1 <= result.record.round <= rounds:
            pairs.append((result.record.seconds, bare.timed(loop, result.record.round)))

    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # choose how to train here and now, not as once on a busy day
        run(federated, start(federated), made.prepared(job(federated), {}), after_round)
    return pairs


if __name__ == "__main__":
    sys.exit(main())
