"""The plain loop: one client after another. It defines what every other engine must return."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim import wire
from fedsim.engines.engine import Cohorts, Job, client_key
from fedsim.engines.folding import alone, blocks, fold, join
from fedsim.errors import ClientError
from fedsim.records import Broadcast, ClientUpdate, CohortUpdate, Examples, Params, StackedUpdate
from fedsim.training.client import train_client
from fedsim.training.evaluate import Scores, score
from fedsim.transforms.outgoing import outgoing


@dataclass(frozen=True)
class Loop:
    """Cohorts that run in this process, client by client."""

    job: Job

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """See ``Cohorts.run_cohort``."""

        def train(client: int) -> StackedUpdate:
            state = states.get(client) or self.job.strategy.local.init(broadcast.params)
            own = client_key(key, client)
            trained = self._train(broadcast, client, state, own)
            update = outgoing(self.job.compression, broadcast, trained, state, own)
            return alone(update, wire.sent_up(update, broadcast))

        cohort = blocks(self.job.data.partition.offsets, clients)
        parts = (fold(self.job, broadcast, (train(client) for client in block)) for block in cohort)
        return join(self.job, broadcast, parts, bytes_down=wire.sent_down(broadcast, clients))

    def _train(self, broadcast: Broadcast, client: int, state: Params, key: int) -> ClientUpdate:
        data = self.job.data.client(client)
        try:
            return train_client(self.job.work, broadcast, client, data, state=state, key=key)
        except Exception as error:
            raise ClientError(broadcast.round, client, f"{type(error).__name__}: {error}") from error

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """See ``Cohorts.evaluate``."""
        return score(self.job.work.model, broadcast.params, broadcast.buffers, examples)


@dataclass(frozen=True)
class Reference:
    """The engine of plain loops."""

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "Reference":
        """See ``Engine.prepared``; there is nothing to choose."""
        return self

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``."""
        loop(Loop(job))

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        return {"name": "reference", "processes": 1}


def reference() -> Reference:
    """The plain loop: one client after another in one process; the definition of correct."""
    return Reference()
