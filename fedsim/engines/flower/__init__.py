"""Flower as an engine: a Flower ServerApp and ClientApp exchange real Flower messages.

``grid`` runs any Flower app in this process, ``messages`` is the codec, ``apps`` holds fedsim's two apps, and
``process`` borrows what Flower keeps once per process. Only modules of this package import ``flwr``, and this file
imports none of them before a run starts, so that a table of engines costs nothing.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from fedsim.engines.engine import Cohorts, Engine, Job

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


def flower(*, runtime: Literal["in-process"] = "in-process") -> Engine:
    """Flower's Message API: a ServerApp and ClientApps exchange messages, client after client, in one process.

    Args:
        runtime: "in-process" needs neither Ray nor a SuperLink.

    Returns:
        The engine. Its results are bit-equal to those of ``reference``.
    """
    return InProcess()
