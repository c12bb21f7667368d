"""What an engine is, and what it is given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fedsim.data.federated import FederatedData
from fedsim.records import Broadcast, CohortUpdate, Examples, Params
from fedsim.rng import fold
from fedsim.strategies.strategy import Strategy
from fedsim.training.client import LocalWork
from fedsim.training.evaluate import Scores
from fedsim.transforms.transform import Compression

OnNan = Literal["fail", "skip"]

REMEDY = "lower train.optimizer.lr, or set train.on_nan: skip, and run again"


@dataclass(frozen=True)
class Job:
    """All an engine needs to train any cohort of one federation.

    cohort: clients of a round, or their expectation. rounds: of the whole run.
    pooled: names of running means and variances, in pairs, of which the variances are pooled.
    compression: of what clients send; None: it is sent as it is.
    """

    work: LocalWork
    data: FederatedData
    strategy: Strategy
    on_nan: OnNan
    cohort: int
    rounds: int
    pooled: tuple[tuple[str, str], ...] = ()
    compression: Compression | None = None


class Cohorts(Protocol):
    """What the round loop asks of a running engine."""

    def run_cohort(
        self, broadcast: Broadcast, clients: Sequence[int], states: Mapping[int, Params], key: int
    ) -> CohortUpdate:
        """Train the clients from the broadcast and aggregate what they return.

        states: of the clients that have one. key: of the round; client k trains with ``fold(key, "client", k)``.
        """

    def evaluate(self, broadcast: Broadcast, examples: Examples) -> Scores:
        """Score the broadcast model on every example."""


class Engine(Protocol):
    """Where cohorts run. An engine may wrap the whole loop, as Flower's server does."""

    def prepared(self, job: Job, recorded: Mapping[str, Any]) -> "Engine":
        """The engine with all its choices made for this job.

        recorded: what :meth:`describe` said when the run was started, {} for a new run. A choice that can change a
            bit of a result is made as it was then.
        """

    def drive(self, job: Job, loop: Callable[[Cohorts], None]) -> None:
        """Get ready, call ``loop`` once with running cohorts, clean up whatever happens."""

    def describe(self) -> dict[str, Any]:
        """What environment.json says of this engine; of a prepared one, its choices too."""


def client_key(round_key: int, client: int) -> int:
    """Key of a client in a round."""
    return fold(round_key, "client", client)
