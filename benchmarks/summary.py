"""From results.json to medians, ratios, Markdown tables and a plot.

Run: python summary.py results/results.json
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from peers import LIBRARIES, PEERS
from workloads import WORKLOADS

Results = Mapping[str, Any]


class Spread(NamedTuple):
    """Median, least and largest of several values."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return cls(median(values), min(values), max(values))

    def show(self, digits: str) -> str:
        """For a table."""
        return f"{self.middle:{digits}} ({self.low:{digits}}–{self.high:{digits}})"


def speed(run: Mapping[str, Any]) -> float:
    """Samples per second of one process: of its median round."""
    return float(run["samples_per_round"] / median(run["seconds"]))


def repeats(results: Results, workload: str, peer: str) -> dict[int, Mapping[str, Any]]:
    """The runs that count, by number of the repeat."""
    return {
        run["repeat"]: run
        for run in results["runs"]
        if run["workload"] == workload and run["peer"] == peer and run["repeat"] and "seconds" in run
    }


def speeds(results: Results, workload: str, peer: str) -> Spread | None:
    """Samples per second over the repeats; None if the peer did not run."""
    found = [speed(run) for run in repeats(results, workload, peer).values()]
    return Spread.of(found) if found else None


def ratio(results: Results, workload: str, peer: str, other: str) -> Spread | None:
    """How many times as fast as another a peer is; compared within each repeat, where both ran after each other."""
    ours, theirs = repeats(results, workload, peer), repeats(results, workload, other)
    found = [speed(ours[number]) / speed(theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
    return Spread.of(found) if found else None


def best_library(results: Results, workload: str) -> str | None:
    """The other library with the highest median speed; None if none ran."""
    found = {name: spread.middle for name in LIBRARIES if (spread := speeds(results, workload, name))}
    return max(found, key=lambda name: found[name]) if found else None


def peak(results: Results) -> float:
    """The machine's peak: the best of all measurements, floating-point operations a second."""
    return max(results["peaks"])


def summarise(results: Results) -> dict[str, Any]:
    """Every number of the tables, by workload."""
    done = [name for name in WORKLOADS if any(run["workload"] == name for run in results["runs"])]
    return {name: _of_workload(results, name) for name in done}


def _of_workload(results: Results, workload: str) -> dict[str, Any]:
    found = {peer: spread for peer in PEERS if (spread := speeds(results, workload, peer))}
    flops, best = WORKLOADS[workload].flops, best_library(results, workload)
    against = {"bare": "bare", "flower": "flower", "best_library": best}
    ratios = {name: ratio(results, workload, "fedsim", other) for name, other in against.items() if other}
    return {
        "flops_per_sample": flops,
        "samples_per_second": {peer: spread._asdict() for peer, spread in found.items()},
        "share_of_peak": {peer: spread.middle * flops / peak(results) for peer, spread in found.items()},
        "best_library": best,
        "fedsim_to": {name: spread._asdict() for name, spread in ratios.items() if spread},
    }


def write(results: dict[str, Any], folder: Path) -> None:
    """Write results.json with its summary, table.md and plot.png."""
    results["summary"] = summarise(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    (folder / "table.md").write_text("\n".join(markdown(results)) + "\n")
    from plot import draw  # noqa: PLC0415 -- the tables need no matplotlib

    draw(results["summary"], folder / "plot.png")
    print(f"{folder}/results.json, table.md, plot.png")


def markdown(results: Results) -> Iterator[str]:
    """The tables, line by line."""
    machine = results["machine"]
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {results['began']};"
    yield f"peak of float32 matrix products {peak(results) / 1e9:.0f} GFLOP/s on all cores together.\n"
    yield "Samples per second, median over repeats (least–largest):\n"
    yield from _speed_table(results)
    yield "\nfedsim's speed as a multiple of another's, median of pairs run after each other (least–largest):\n"
    yield from _ratio_table(results)
    yield "\nShare of the peak:\n"
    yield from _share_table(results)
    yield "\nHow each ran; accuracy on the test set after all rounds of a process (warm-up and timed)."
    yield f"{' and '.join(p.name for p in PEERS.values() if p.slow)}: fewer rounds and repeats, since so slow.\n"
    yield from _run_table(results)
    yield ""
    yield from _versions(results)
    failed = [run for run in results["runs"] if "problem" in run]
    yield from ("", "Failed:", "") if failed else ()
    yield from (f"- {r['peer']} ({r['variant']}) on {r['workload']}: {r['problem'].splitlines()[0]}" for r in failed)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*("---" for _ in cells))


def _speed_table(results: Results) -> Iterator[str]:
    yield from _head("workload", *PEERS)
    for name in results["summary"]:
        found = (speeds(results, name, peer) for peer in PEERS)
        yield _row(
            f"{name}: {WORKLOADS[name].describe()}", *(spread.show(",.0f") if spread else "" for spread in found)
        )


def _ratio_table(results: Results) -> Iterator[str]:
    yield from _head("workload", "best other library", "bare loop", "Flower")
    for name, found in results["summary"].items():
        cells = {against: Spread(**spread).show(".2f") for against, spread in found["fedsim_to"].items()}
        best = f"{cells['best_library']} {found['best_library']}" if "best_library" in cells else ""
        yield _row(name, best, cells.get("bare", ""), cells.get("flower", ""))


def _share_table(results: Results) -> Iterator[str]:
    yield from _head("workload", "MFLOP per sample", *PEERS)
    for name, found in results["summary"].items():
        shares = found["share_of_peak"]
        cells = (f"{shares[peer]:.1%}" if peer in shares else "" for peer in PEERS)
        yield _row(name, f"{found['flops_per_sample'] / 1e6:.3g}", *cells)


def _run_table(results: Results) -> Iterator[str]:
    yield from _head("workload", "", "variant", "processes x threads", "repeats x timed rounds", "accuracy")
    for name in results["summary"]:
        for peer in PEERS:
            runs = list(repeats(results, name, peer).values())
            if not runs:
                continue
            first = runs[0]
            yield _row(
                name,
                peer,
                first["variant"],
                f"{first['processes']} x {first['threads']}",
                f"{len(runs)} x {len(first['seconds'])}",
                f"{median(run['accuracy'] for run in runs):.3f} after {first['rounds_in_all']}",
            )


def _versions(results: Results) -> Iterator[str]:
    yield "Versions:\n"
    for peer in PEERS:
        found = {json.dumps(run["versions"]) for run in results["runs"] if run["peer"] == peer and "versions" in run}
        for versions in sorted(found):
            yield f"- {peer}: {', '.join(' '.join(pair) for pair in json.loads(versions).items())}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    write(json.loads(file.read_text()), file.parent)
