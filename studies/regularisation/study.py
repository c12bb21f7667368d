"""Run the study of the regularisers.

python study.py [--fast] [--seeds 3] [--jobs 2] [--out FOLDER] [--page FOLDER]

Every experiment is a sweep over seeds. What is done already is found in the folder and not done again. At the end
results.json has a row for each run; page.py makes docs/studies/regularisation.md and its plots of it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import claims
import page
import torch
from experiments import EXPERIMENTS, FEDERATIONS, HERE, Experiment
from measures import measure

import fedsim

SEEDS = 3
FAST = ("base", "dropout", "multi-sample-dropout")  # enough to see that everything works
SHORT = {"train.rounds": 2, "train.eval_every": 2, "train.local_epochs": 1}


def rows_of(experiment: Experiment, seeds: Sequence[int], changes: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Run an experiment, or go on with it, and measure its runs."""
    os.chdir(HERE)  # where its configs and small_data are
    torch.set_num_threads(1)
    done = out / experiment.name / "rows.json"
    if done.exists():
        return list(json.loads(done.read_text()))
    begun = sorted(done.parent.glob("*-sweep-*"))
    changes = {**changes, **experiment.axes, "seed": [*seeds], "output": str(done.parent)}
    made = fedsim.resume_sweep(begun[-1]) if begun else fedsim.sweep(experiment.config, changes)
    rows = [_row(experiment, made.folder, row) for row in made.rows()]
    done.write_text(json.dumps(rows, indent=1))
    return rows


def _row(experiment: Experiment, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(experiment.axes))
    variant = ""
    if experiment.variants:
        variant = experiment.variants[[*map(str, experiment.axes[first])].index(str(row[first]))]
    federation = next((n for n, split in FEDERATIONS.items() if str(split) == str(row.get("data.split", "iid"))))
    known = {"experiment": {"base": "plain"}.get(experiment.name, experiment.name), "variant": variant}
    known |= {"federation": federation, "seed": row["seed"], "status": row["status"]}
    return {**known, **(measure(folder / row["run"], HERE) if row["status"] == "finished" else {})}


def all_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of all experiments, several at a time, those that take longest first."""
    wanted = [e for e in EXPERIMENTS if not options.fast or e.name in FAST]
    seeds, changes = ((1, 2), SHORT) if options.fast else (range(1, options.seeds + 1), {})
    heavy = (
        "depth",
        "deep-residual",
        "shakedrop",
        "stochastic-depth",
        "plain-resnet",
        "noisy-labels",
        "ensemblenet",
        "droppath",
    )
    wanted.sort(key=lambda e: e.name not in heavy)
    began = time.perf_counter()
    with ProcessPoolExecutor(options.jobs) as pool:
        running = {e.name: pool.submit(rows_of, e, seeds, changes, options.out) for e in wanted}
        for name, future in running.items():
            rows = future.result()
            print(f"{time.perf_counter() - began:6.0f} s  {name}: {len(rows)} runs", flush=True)
            yield from rows


def main() -> None:
    """Run everything, then write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="three experiments, two seeds, two rounds: a test")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of each experiment")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the runs and of results.json")
    parser.add_argument("--page", type=Path, help="folder of the page and its plots; none is written without")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rows = list(all_rows(options))
    found = {"rows": rows, "minutes": (time.perf_counter() - began) / 60, "seeds": len({row["seed"] for row in rows})}
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    for finding in claims.findings(rows):
        print(f"{finding.verdict:20} {finding.federation:14} {finding.mean:+8.3f} {finding.claim.statement}")
    if options.page:
        page.write(found, options.page)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
