"""The Python API, as ``import fedsim`` offers it. The command line stands on it."""

from fedsim.api.baselining import Baselines, baseline
from fedsim.api.running import Run, load, resume, run
from fedsim.api.splitting import Split, split

__all__ = ["Baselines", "Run", "Split", "baseline", "load", "resume", "run", "split"]
