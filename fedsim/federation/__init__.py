"""A federation and its round loop."""

from fedsim.federation.loop import run
from fedsim.federation.pruning import Probing, RunCohort, pruned, since
from fedsim.federation.scoring import LISTED_CLIENTS, evaluates, unevaluated, with_spread, with_tickets
from fedsim.federation.server import INFORMED, broadcast, step
from fedsim.federation.setup import Federation, RoundResult, Sampling, cohort, fitted, job, round_key, start

__all__ = [
    "INFORMED",
    "LISTED_CLIENTS",
    "Federation",
    "Probing",
    "RoundResult",
    "RunCohort",
    "Sampling",
    "broadcast",
    "cohort",
    "evaluates",
    "fitted",
    "job",
    "pruned",
    "round_key",
    "run",
    "since",
    "start",
    "step",
    "unevaluated",
    "with_spread",
    "with_tickets",
]
