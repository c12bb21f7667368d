"""The Python API, as ``import fedsim`` offers it. The command line stands on it."""

from fedsim.api.baselining import Baselines, baseline
from fedsim.api.benching import Bench, bench
from fedsim.api.running import Run, load, resume, run
from fedsim.api.splitting import Split, split
from fedsim.api.verifying import Verification, verify

__all__ = [
    "Baselines",
    "Bench",
    "Run",
    "Split",
    "Verification",
    "baseline",
    "bench",
    "load",
    "resume",
    "run",
    "split",
    "verify",
]
