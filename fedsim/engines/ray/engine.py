"""The engine of Ray actors: chooses a plan on the driver, then lets a crew of actors follow it."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, Literal

from fedsim.engines.engine import Cohorts, Job
from fedsim.engines.local.engine import cores
from fedsim.engines.local.measuring import Choice, Mode, choose, described, mixes_examples
from fedsim.engines.local.sharing import tasks_of_a_round
from fedsim.errors import MissingDependencyError


@dataclass(frozen=True)
class OnRay:
    """The engine of a Ray cluster; ``choice`` is made by :meth:`prepared`."""

    address: str | None
    mode: Mode
    actors: int | Literal["auto"]
    autocast: bool = False
    choice: Choice | None = None

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "OnRay":
        """See ``Engine.prepared``. The number of actors changes no result, so it is left to :meth:`drive`.

        Raises:
            MissingDependencyError: Ray is not installed; to read a run or its config, it need not be.
        """
        if importlib.util.find_spec("ray") is None:
            told = "engine: ray needs the package ray, which pip install 'fedsim-flower[ray]' brings"
            raise MissingDependencyError(told)
        return replace(self, choice=choose(self._precise(job), self.mode, recorded))

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``."""
        from fedsim.engines.ray.cluster import attached, cpus  # noqa: PLC0415 -- ray takes a second to import
        from fedsim.engines.ray.crew import Crew  # noqa: PLC0415

        choice = (self if self.choice else self.prepared(job, {})).choice
        assert choice is not None  # as prepared makes it
        precise = self._precise(job)
        mixes = mixes_examples(precise.work, precise.data.train)
        with attached(self.address, cores() if self.actors == "auto" else self.actors):
            actors = min(cpus(), tasks_of_a_round(job, choice.plan)) if self.actors == "auto" else self.actors
            with Crew(precise, choice.plan, mixes=mixes, actors=max(actors, 1)) as crew:
                loop(crew)

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        said = {"name": "ray", "ray": version("ray"), "address": self.address, "mode": self.mode, "actors": self.actors}
        said |= {"precision": "bf16" if self.autocast else "fp32"}
        return said if self.choice is None else {**said, **described(self.choice)}

    def _precise(self, job: Job) -> Job:
        return replace(job, work=replace(job.work, autocast=self.autocast))
