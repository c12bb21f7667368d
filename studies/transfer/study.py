"""Run the study of transfer between two parties.

python study.py [--fast] [--seeds 5] [--jobs 2] [--costs] [--out FOLDER] [--page FOLDER]

Every experiment is run on every data set with every seed, and then costs are measured, one run at a time; each of
these is a file of rows in the folder, and what is there is not done again. At the end results.json has them all;
page.py makes docs/studies/transfer.md of it.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import claims
import costs
import page
import torch
from experiments import EXPERIMENTS
from tables import DATA, HERE, Place
from threadpoolctl import threadpool_limits

SEEDS = 5
SHORT = {"transfer.iterations": 4}
Row = dict[str, Any]


def done(experiment: str, data: str, seed: int, fast: bool, out: Path) -> tuple[list[Row], float]:
    """The rows of one experiment at one place, run now if they are not there, and the processor time they took."""
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's; several experiments run at a time
    name = f"{experiment}-{data}-{seed}"
    known = {"experiment": experiment, "data": data, "seed": seed}

    def rows() -> list[Row]:
        place = Place(data, seed, SHORT if fast else {}, out / name)
        return [{**known, **row} for row in EXPERIMENTS[experiment](place)]

    return _kept(out / f"{name}.json", rows, out / name)


def cost(cell: costs.Cell, again: bool, out: Path) -> tuple[list[Row], float]:
    """The row of one cell, likewise; measured again, the faster numbers of both times."""
    torch.set_num_threads(1)
    name = "costs-" + "-".join(map(str, cell))
    file = out / f"{name}.json"
    before = json.loads(file.read_text()) if again and file.exists() else None
    if before is not None:
        file.unlink()
    rows, spent = _kept(file, lambda: [costs.measured(cell, out / name)], out / name)
    if before is not None:
        rows, spent = [costs.faster(before["rows"][0], rows[0])], spent + before["cpu_s"]
        file.write_text(json.dumps({"rows": rows, "cpu_s": spent}, indent=1))
    return rows, spent


def _kept(file: Path, rows: Callable[[], list[Row]], runs: Path) -> tuple[list[Row], float]:
    if not file.exists():
        shutil.rmtree(runs, ignore_errors=True)
        began = _spent()
        found = {"rows": rows(), "cpu_s": _spent() - began}
        file.write_text(json.dumps(found, indent=1))
        shutil.rmtree(runs, ignore_errors=True)
    found = json.loads(file.read_text())
    return found["rows"], found["cpu_s"]


def _spent() -> float:
    """Processor seconds of this process and of the ended ones that it started."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))


def main() -> None:
    """Run everything, then write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="two data sets, two seeds, few iterations: a test")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each experiment")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time; costs are measured alone")
    parser.add_argument(
        "--costs", action="store_true", help="measure costs again, and keep what was faster: machines are busy"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the rows and of results.json")
    parser.add_argument("--page", type=Path, help="folder of the page and its plots; none is written without")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    places = ("digits", "synthetic") if options.fast else tuple(DATA)
    seeds = (1, 2) if options.fast else range(1, options.seeds + 1)
    began, found = time.perf_counter(), list[tuple[list[Row], float]]()

    def took(what: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {what}", flush=True)

    with ProcessPoolExecutor(options.jobs) as pool:
        running = {
            f"{name} {data} {seed}": pool.submit(done, name, data, seed, options.fast, out)
            for name in EXPERIMENTS
            for data in places
            for seed in seeds
        }
        for what, future in running.items():
            found.append(future.result())
            took(what)
    for cell in costs.FAST if options.fast else costs.CELLS:
        found.append(cost(cell, options.costs, out))
        took(str(cell))
    rows = [row for some, _ in found for row in some]
    results = {"rows": rows, "minutes": sum(spent for _, spent in found) / 60, "seeds": len(seeds)}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for finding in claims.findings(rows):
        print(f"{finding.verdict:20} {finding.data:14} {finding.mean:+8.3f} {finding.claim.statement}")
    if options.page:
        page.write(results, options.page)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
