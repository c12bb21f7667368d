"""One federation, its first state, and who takes part in a round."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from fedsim import rng
from fedsim.data.federated import FederatedData
from fedsim.engines.engine import Job, OnNan
from fedsim.models.drawing import UNTOLD, Draws
from fedsim.params import of
from fedsim.pruning import fitting
from fedsim.pruning.pruning import Fresh, Pruning
from fedsim.records import ClientEvaluation, Indices, Params, RoundRecord, ServerState
from fedsim.strategies.strategy import Strategy
from fedsim.training import kept
from fedsim.training.client import LocalWork
from fedsim.transforms.transform import Compression

Sampling = Literal["fixed", "poisson"]


@dataclass(frozen=True)
class Federation:
    """One federation, ready to run. Everything but the server's state, which changes from round to round.

    clients_per_round: cohort size (fixed), or its expectation (poisson).
    eval_every: evaluate after every so many rounds, and after the last.
    draws: of the model, to be told.
    pooled: names of running means and variances, in pairs, of which the variances are pooled and not averaged.
    compression: of what clients send; None: it is sent as it is.
    pruning: what the server prunes between rounds. fresh: draws other first parameters and buffers, for it.
    """

    seed: int
    data: FederatedData
    work: LocalWork
    strategy: Strategy
    rounds: int
    clients_per_round: int
    sampling: Sampling
    eval_every: int
    on_nan: OnNan
    draws: Draws = UNTOLD
    pooled: tuple[tuple[str, str], ...] = ()
    pruning: Pruning | None = None
    fresh: Fresh | None = None
    compression: Compression | None = None


@dataclass(frozen=True)
class RoundResult:
    """What one round leaves behind."""

    state: ServerState
    record: RoundRecord
    evaluations: tuple[ClientEvaluation, ...]


def job(federation: Federation) -> Job:
    """What an engine needs of a federation."""
    f = federation
    return Job(f.work, f.data, f.strategy, f.on_nan, f.clients_per_round, f.rounds, f.pooled, f.compression)


def start(federation: Federation) -> ServerState:
    """State before the first round: the model's own parameters and buffers, and the server rule's first state.

    Tensors that stay with clients are among them, and never change here.
    """
    params, buffers = of(federation.work.model)
    sent = kept.shared(params, federation.work.kept)
    memory = {} if federation.pruning is None else federation.pruning.start(params, buffers)
    return ServerState(0, params, buffers, federation.strategy.server.init(sent), {}, memory)


def cohort(federation: Federation, round: int) -> Indices:
    """Clients of a round, ascending: int64 (m,). A function of the seed and the round alone.

    fixed: exactly ``clients_per_round``, without replacement, all sets equally likely.
    poisson: each client by itself with probability ``clients_per_round / clients``; may be empty.
    """
    key, n = rng.fold(federation.seed, "round", round, "cohort"), federation.data.num_clients
    if federation.sampling == "fixed":
        return rng.choice(key, n, federation.clients_per_round).numpy()
    draws = rng.uniform(key, n, dtype=torch.float64)  # float32 is too coarse for one client out of a million
    return np.flatnonzero((draws < federation.clients_per_round / n).numpy())


def fitted(federation: Federation, params: Params) -> Federation:
    """The federation with the model that the parameters belong to, once pruning has removed channels."""
    model = federation.work.model
    smaller = fitting.fitted(model, params, input_shape(federation))
    return federation if smaller is model else replace(federation, work=replace(federation.work, model=smaller))


def input_shape(federation: Federation) -> tuple[int, ...]:
    """Of one example."""
    return tuple(federation.data.train.inputs.shape[1:])


def round_key(federation: Federation, round: int) -> int:
    """Key of a round, below which all its clients draw."""
    return rng.fold(federation.seed, "round", round)
