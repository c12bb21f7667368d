"""The plain loop: one client after another. It defines what every other engine must return."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim import wire
from fedsim.engines.engine import Cohorts, Job, client_key, collect
from fedsim.errors import ClientError
from fedsim.records import Broadcast, ClientUpdate, CohortUpdate, Examples, Params
from fedsim.training.client import train_client
from fedsim.training.evaluate import Scores, score


@dataclass(frozen=True)
class Loop:
    """Cohorts that run in this process, client by client."""

    job: Job

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """See ``Cohorts.run_cohort``."""
        sent = [0]

        def results() -> Iterator[ClientUpdate]:
            for client in sorted(clients):
                state = states.get(client) or self.job.strategy.local.init(broadcast.params)
                result = self._train(broadcast, client, state, client_key(key, client))
                sent[0] += len(wire.encode_update(result))
                yield result

        down = len(wire.encode_broadcast(broadcast)) * len(clients)
        return collect(self.job, broadcast, results(), bytes_up=lambda: sent[0], bytes_down=down)

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

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """See ``Engine.drive``."""
        loop(Loop(job))

    def describe(self) -> dict[str, Any]:
        """See ``Engine.describe``."""
        return {"name": "reference", "processes": 1}


def reference() -> Reference:
    """The plain loop: one client after another in one process; the definition of correct."""
    return Reference()
