"""Flower as an engine: a Flower ServerApp and ClientApp exchange real Flower messages.

``grid`` runs any Flower app in this process, ``arrays`` spares it encodings, ``messages`` is the codec, ``apps`` holds
fedsim's two apps, ``simulation`` puts them on Flower's own simulation, and ``process`` borrows what Flower keeps once
per process. ``foreign``, ``watching`` and ``seeding`` run somebody else's app. Only modules of this package import
``flwr``, and this file imports none of them before a run starts, so that a table of engines costs nothing.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from fedsim.engines.engine import Cohorts, Engine, Job
from fedsim.errors import MissingDependencyError

# Flower reads these once, when it is imported. A run reports to nobody; a value the user has set stays.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


@dataclass(frozen=True)
class InProcess:
    """The engine of Flower messages inside one process."""

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "InProcess":
        """See ``Engine.prepared``; there is nothing to choose."""
        return self

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``. The loop runs inside a ServerApp; what it raises comes out unchanged."""
        from fedsim.engines.flower.apps import run_in_process  # noqa: PLC0415 -- flwr takes half a second to import

        run_in_process(job, loop)

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        return {"name": "flower", "runtime": "in-process", "processes": 1, "flwr": version("flwr")}


@dataclass(frozen=True)
class Simulation:
    """The engine of Flower's Simulation Runtime: clients in Ray actors, one CPU for each."""

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "Simulation":
        """See ``Engine.prepared``; there is nothing to choose.

        Raises:
            MissingDependencyError: Ray is not installed; to read a run or its config, it need not be.
        """
        if importlib.util.find_spec("ray") is None:
            told = "runtime: simulation needs the package ray, which pip install 'fedsim-flower[ray]' brings"
            raise MissingDependencyError(f"engine: {told}")
        return self

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``. The loop runs inside a ServerApp, in a thread of its own."""
        self.prepared(job, {})
        from fedsim.engines.flower.simulation import run_simulated  # noqa: PLC0415 -- flwr and ray take seconds

        run_simulated(job, loop)

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        return {"name": "flower", "runtime": "simulation", "flwr": version("flwr"), "ray": version("ray")}


@dataclass(frozen=True)
class Deployment:
    """Separate machines: ``fedsim server`` has a loop of its own for them, and needs this engine's name only."""

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "Deployment":
        """See ``Engine.prepared``. Refused: clients have to be there first."""
        commands = "start it with fedsim server CONFIG, go on with it with fedsim server --resume RUN"
        raise ValueError(f"runtime: deployment is for separate machines; {commands}")

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``. Refused like :meth:`prepared`."""
        self.prepared(job, {})

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        return {"name": "flower", "runtime": "deployment", "flwr": version("flwr")}


def flower(*, runtime: Literal["in-process", "simulation", "deployment"] = "in-process") -> Engine:
    """Flower's Message API: a ServerApp and ClientApps exchange messages.

    Args:
        runtime: "in-process" needs neither Ray nor a SuperLink: one client after another, in one process.
            "simulation" is Flower's own Simulation Runtime, on Ray: as many at once as this machine has cores.
            "deployment" is written into the config of a run by ``fedsim server``: clients on machines of their own.

    Returns:
        The engine. Its results are bit-equal to those of ``reference``.
    """
    engines: dict[str, Callable[[], Engine]] = {"simulation": Simulation, "deployment": Deployment}
    return engines.get(runtime, InProcess)()
