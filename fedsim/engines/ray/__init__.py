"""Ray as an engine: the local engine's trainer in Ray actors, on this machine or on all nodes of a cluster.

``engine`` makes the choices, ``cluster`` attaches to Ray, ``crew`` hands out the work and survives losses, ``shell``
and ``actor`` are what runs on the nodes. All but ``engine`` import ``ray``, and are imported when a run starts, so that
a table of engines needs no Ray.
"""

import os
from typing import Annotated, Literal

from annotated_types import Ge

from fedsim.engines.local.measuring import Mode
from fedsim.engines.ray.engine import OnRay

# Ray reads these when it starts. A run reports to nobody; a value the user has set stays.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # without it Ray warns of what it will do in future

Actors = Annotated[int, Ge(1)] | Literal["auto"]


def ray(
    *,
    address: str | None = None,
    mode: Mode = "auto",
    actors: Actors = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> OnRay:
    """Clients spread over the machines of a Ray cluster, or over the cores of this one.

    Args:
        address: None starts a Ray of its own on this machine, for this run. ``auto`` attaches to the cluster that runs
            here (or at ``RAY_ADDRESS``), ``host:port`` to the one at that address, ``ray://host:port`` through Ray's
            client server, from a machine that is no part of the cluster.
        mode, precision: how a client is trained; see the engine ``local``.
        actors: processes of one CPU and one thread each. ``auto``: one for each CPU of the cluster, but no more than a
            round has tasks. Results are bit-equal for any number.

    Returns:
        The engine. Its results are bit-equal to those of ``local`` with the same plan.
    """
    return OnRay(address, mode, actors, precision == "bf16")
