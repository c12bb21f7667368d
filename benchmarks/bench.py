"""Time fedsim, a bare torch loop and other libraries in turn, on the same work. See README.md.

Every run is a process of its own and is written to results.json as soon as it ends; the tables and the plot are made
from that file. Run: python bench.py --help
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peak
import prepared
import summary
from peers import CORES, HERE, PEERS, Peer
from workloads import WORKLOADS, Workload

WARMUP = 1  # rounds of a process that do not count: compilation, caches, processes that start
TRIAL_ROUNDS = 2  # timed in each variant to choose one
SLOW_REPEATS = 2
LIMIT_S = 1800  # of one process
TRIAL = 0  # the trial's number among the repeats, which count from 1


class Options(NamedTuple):
    """What the command line says."""

    peers: list[Peer]
    workloads: list[Workload]
    repeats: int
    quick: bool
    engine: str
    out: Path

    def variants(self, peer: Peer) -> tuple[str, ...]:
        """Those that the trial compares."""
        if peer.name == "fedsim":
            return (self.engine,)
        return peer.variants[:1] if self.quick else peer.variants


def main() -> None:
    """Run everything, then summarise."""
    options = _options()
    prepared.write()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": machine(),
        "began": time.strftime("%Y-%m-%d %H:%M"),
        "quick": options.quick,
        "peaks": [],
        "runs": [],
    }
    for run in _runs(options, results):
        results["runs"].append(run)
        _save(options.out, results)
    summary.write(results, options.out)


def _options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="WORKLOAD")
    parser.add_argument("--repeats", type=int, default=5, help="of everything, in turn")
    parser.add_argument("--quick", action="store_true", help="one timed round, no trial: shows that everything runs")
    parser.add_argument("--engine", choices=("local", "reference"), default="local", help="of fedsim")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    given = parser.parse_args()
    peers, workloads = [PEERS[name] for name in given.peers], [WORKLOADS[name] for name in given.workloads]
    repeats = 1 if given.quick else given.repeats
    return Options(peers, workloads, repeats, given.quick, given.engine, given.out.resolve())


def _runs(options: Options, results: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The trial of each peer with a choice of variants, then the repeats: within one, peer after peer on a workload.

    Peers that are compared on a workload so run within minutes of each other.
    """
    chosen: dict[tuple[str, str], str] = {}
    for workload in options.workloads:
        for peer in options.peers:
            variants = options.variants(peer)
            trials = [_run(peer, v, workload, TRIAL, TRIAL_ROUNDS) for v in variants] if len(variants) > 1 else []
            chosen[workload.name, peer.name] = fastest(trials) or variants[0]
            yield from trials
    for repeat in range(1, options.repeats + 1):
        results["peaks"].append(peak.measure())
        for workload in options.workloads:
            for peer in options.peers:
                if peer.slow and repeat > SLOW_REPEATS:
                    continue
                rounds = 1 if options.quick else workload.slow_rounds if peer.slow else workload.rounds
                yield _run(peer, chosen[workload.name, peer.name], workload, repeat, rounds)


def fastest(trials: Sequence[dict[str, Any]]) -> str | None:
    """Variant with the fastest single round, which noise can only hide, not make; None if nothing ran."""
    times = {trial["variant"]: min(trial["seconds"]) for trial in trials if "seconds" in trial}
    return min(times, key=lambda variant: times[variant]) if times else None


def _run(peer: Peer, variant: str, workload: Workload, repeat: int, rounds: int) -> dict[str, Any]:
    """One process; what it answers, or why it did not."""
    known = {"peer": peer.name, "variant": variant, "workload": workload.name, "repeat": repeat}
    print(
        f"{workload.name:15} {'trial' if repeat == TRIAL else repeat!s:6}{peer.name:8}{variant:12}", end="", flush=True
    )
    load, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        asked = ["--workload", workload.name, "--rounds", str(rounds), "--warmup", str(WARMUP), "--out", str(out)]
        problem = _process([*peer.command(variant), *asked], Path(folder))
        found = json.loads(out.read_text()) if problem is None else {"problem": problem}
    took = time.perf_counter() - began
    said = f"{summary.speed(found):12,.0f} samples/s" if problem is None else f"FAILED: {problem.splitlines()[-1]}"
    print(f"{said}   ({took:.0f} s in all)", flush=True)
    return {**known, "load_before": load, "process_seconds": took, **found}


def _process(command: Sequence[str], cache: Path) -> str | None:
    """Run a command in a group of its own, so that nothing it started outlives it. Returns what went wrong, or None.

    What it chooses by measuring is not remembered beyond ``cache``, so that a noisy moment spoils one repeat only.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        process = subprocess.Popen(command, cwd=HERE, env=environment, start_new_session=True, **streams)
    except OSError as error:  # its environment is not there
        return str(error)
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"no answer within {LIMIT_S} s"
    finally:
        _end_group(process.pid)
    return None if process.returncode == 0 else f"exit code {process.returncode}\n{output[-4000:]}"


def _end_group(group: int) -> None:
    """End what is left of a process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def machine() -> dict[str, Any]:
    """What it runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": CORES, "memory_gib": round(memory), "system": platform.platform()}


def _save(folder: Path, results: dict[str, Any]) -> None:
    unfinished = folder / "results.json.part"
    unfinished.write_text(json.dumps(results, indent=1))
    unfinished.replace(folder / "results.json")


if __name__ == "__main__":
    sys.exit(main())
