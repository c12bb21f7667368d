"""The round loop: choose a cohort, train it, move the global model, evaluate, tell whoever listens."""

import time
from collections.abc import Callable

from fedsim.engines.engine import Cohorts, Engine
from fedsim.federation.pruning import Probing, pruned
from fedsim.federation.scoring import evaluated
from fedsim.federation.server import broadcast, step
from fedsim.federation.setup import Federation, RoundResult, fitted, job, round_key
from fedsim.pruning.fitting import fits
from fedsim.records import CohortUpdate, ServerState


def run(
    federation: Federation, state: ServerState, engine: Engine, on_round: Callable[[RoundResult], None]
) -> ServerState:
    """Run the rounds after ``state.round`` up to ``federation.rounds``.

    Args:
        federation: what to run.
        state: from :func:`start`, or of the last whole round of an earlier run.
        engine: where clients run.
        on_round: called with every finished round, in order; a fresh run first reports round 0, the initial model.

    Returns:
        State after the last round.

    Raises:
        ClientError: a client diverged and ``on_nan`` is "fail".
        RunError: the global model is no longer finite.
    """
    final, told = [state], [state.round > 0]

    def loop(cohorts: Cohorts) -> None:
        stage = fitted(federation, final[0].params)
        if not told[0]:
            on_round(_initial(stage, cohorts, final[0]))
            told[0] = True
        for round in range(final[0].round + 1, federation.rounds + 1):
            began, probing = time.perf_counter(), Probing(stage, cohorts.run_cohort, final[0], round)
            changed = pruned(stage, final[0], round, probing.gradient, probing.product)
            if changed is not final[0]:
                final[0] = changed
                if not fits(stage.work.model, changed.params):
                    return  # to be driven again, with a model that has fewer channels
            result = _round(stage, cohorts, final[0], probing, began)
            final[0] = result.state
            on_round(result)

    while True:
        before = final[0]
        engine.drive(job(fitted(federation, before.params)), loop)
        if final[0].round == federation.rounds or final[0] is before:
            return final[0]


def _initial(federation: Federation, cohorts: Cohorts, state: ServerState) -> RoundResult:
    began = time.perf_counter()
    nothing = CohortUpdate(None, None, (), (), (), {}, {}, 0, 0)
    return evaluated(federation, cohorts, state, nothing, began)


def _round(federation: Federation, cohorts: Cohorts, state: ServerState, probing: Probing, began: float) -> RoundResult:
    round, chosen = probing.round, probing.chosen
    states = {client: state.clients[client] for client in chosen if client in state.clients}
    sent = broadcast(federation, state, round, chosen)
    result = probing.counted(cohorts.run_cohort(sent, chosen, states, round_key(federation, round)))
    return evaluated(federation, cohorts, step(federation, state, result, round), result, began)
