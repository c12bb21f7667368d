"""Run the study of pruning.

python study.py [--fast] [--seeds 3] [--jobs 2] [--out FOLDER] [--page FOLDER]

Every experiment is run on every data set and split with every seed; each of these is a file of rows in the folder, and
what is there is not done again. At the end results.json has them all; page.py makes docs/studies/pruning.md of it.
"""

import argparse
import json
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import claims
import page
import torch
from experiments import DATA, EXPERIMENTS, HERE, SPLITS, Place

SEEDS = 3
SHORT = {"train.rounds": 2, "train.eval_every": 1, "train.local_epochs": 1}  # of the fast version, but for levels,
LONGER = {"train.rounds": 7}  # and for a ticket among what is sent, whose first level ends after six rounds
LONG = ("tickets", "sent", "arms")  # first, so that none is left over for one core


class Done(NamedTuple):
    """Rows of an experiment at a place, and the processor time that they took."""

    rows: list[dict[str, Any]]
    cpu_s: float


def done(experiment: str, place: tuple[str, str, int], fast: bool, out: Path) -> Done:
    """The rows of one experiment at one place, run now if they are not there. Its run folders are removed."""
    torch.set_num_threads(1)
    data, split, seed = place
    name = f"{experiment}-{data}-{split}-{seed}"
    file, runs = out / f"{name}.json", out / name
    if file.exists():
        return Done(**json.loads(file.read_text()))
    shutil.rmtree(runs, ignore_errors=True)
    changes = {key: value for key, value in SHORT.items() if experiment != "tickets" or "epochs" in key} if fast else {}
    changes |= LONGER if fast and experiment == "sent" else {}
    began, known = time.process_time(), {"experiment": experiment, "data": data, "split": split, "seed": seed}
    rows = [{**known, **row} for row in EXPERIMENTS[experiment](Place(data, split, seed, changes, runs))]
    found = Done(rows, time.process_time() - began)
    file.write_text(json.dumps(found._asdict(), indent=1))
    shutil.rmtree(runs, ignore_errors=True)
    return found


def main() -> None:
    """Run everything, then write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="digits, IID, two seeds, two rounds: a test")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each experiment")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, help="experiments to run; all if not given")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the rows and of results.json")
    parser.add_argument("--page", type=Path, help="folder of the page and its plots; none is written without")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    order = sorted(options.only or EXPERIMENTS, key=lambda name: (*LONG, name).index(name))
    where = [("digits", "IID")] if options.fast else [(data, split) for data in DATA for split in SPLITS]
    seeds = (1, 2) if options.fast else range(1, options.seeds + 1)
    began, rows, spent = time.perf_counter(), list[dict[str, Any]](), 0.0
    with ProcessPoolExecutor(options.jobs) as pool:
        running = {
            (name, *place, seed): pool.submit(done, name, (*place, seed), options.fast, out)
            for name in order
            for place in where
            for seed in seeds
        }
        for what, future in running.items():
            own = future.result()
            rows, spent = rows + own.rows, spent + own.cpu_s
            print(f"{time.perf_counter() - began:6.0f} s  {' '.join(map(str, what))}", flush=True)
    found = {"rows": rows, "minutes": spent / 60, "seeds": len({row["seed"] for row in rows})}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    for finding in claims.findings(rows):
        print(f"{finding.verdict:20} {finding.place:18} {finding.mean:+8.3f} {finding.claim.statement}")
    if options.page:
        page.write(found, options.page)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
