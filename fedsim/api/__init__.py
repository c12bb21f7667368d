"""The Python API, as ``import fedsim`` offers it. The command line stands on it."""

from fedsim.api.baselining import Baselines, baseline
from fedsim.api.benching import Bench, bench
from fedsim.api.inspecting import Inspection, inspect
from fedsim.api.pruning import Pruned, prune
from fedsim.api.running import Run, load, resume, run
from fedsim.api.splitting import Split, split
from fedsim.api.sweep_folder import Sweep, load_sweep
from fedsim.api.sweeping import resume_sweep, sweep
from fedsim.api.verifying import Verification, verify

__all__ = [
    "Baselines",
    "Bench",
    "Inspection",
    "Pruned",
    "Run",
    "Split",
    "Sweep",
    "Verification",
    "baseline",
    "bench",
    "inspect",
    "load",
    "load_sweep",
    "prune",
    "resume",
    "resume_sweep",
    "run",
    "split",
    "sweep",
    "verify",
]
