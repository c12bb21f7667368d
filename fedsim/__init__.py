"""fedsim: federated learning, simulated from one YAML file, exactly repeatable.

``run``, ``resume``, ``load``, ``sweep``, ``resume_sweep``, ``load_sweep``, ``verify``, ``split``, ``baseline`` and
``bench`` are described in :mod:`fedsim.api`.

>>> import fedsim
>>> run = fedsim.run("configs/quickstart.yaml", {"train.rounds": 5})  # doctest: +SKIP
>>> run.rounds[-1].accuracy, run.model(), run.folder  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.api import Run as Run
    from fedsim.api import Sweep as Sweep
    from fedsim.api import baseline as baseline
    from fedsim.api import bench as bench
    from fedsim.api import inspect as inspect
    from fedsim.api import load as load
    from fedsim.api import load_sweep as load_sweep
    from fedsim.api import prune as prune
    from fedsim.api import resume as resume
    from fedsim.api import resume_sweep as resume_sweep
    from fedsim.api import run as run
    from fedsim.api import split as split
    from fedsim.api import sweep as sweep
    from fedsim.api import verify as verify

__version__ = "0.1.0"
__all__ = [
    "Run",
    "Sweep",
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


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that ``import fedsim`` and ``fedsim --help`` are quick."""
    if name not in __all__:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    from fedsim import api  # noqa: PLC0415

    return getattr(api, name)


def __dir__() -> list[str]:
    """What there is, imported or not."""
    return sorted({*globals(), *__all__})
