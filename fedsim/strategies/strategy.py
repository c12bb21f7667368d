"""A strategy is data made of pure functions: a local rule, an aggregator and a server rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt

from fedsim.strategies.aggregators import Aggregator, weighted_mean
from fedsim.strategies.local_rules import plain
from fedsim.strategies.server_rules import ServerRule, sgd
from fedsim.training.local_rule import LocalRule

Weighting = Literal["examples", "uniform"]


@dataclass(frozen=True)
class Strategy:
    """local: what clients do differently. aggregator: how updates become one. server: how the global model moves.

    weighting: a client counts by its number of examples, or all count the same.
    """

    local: LocalRule
    aggregator: Aggregator
    server: ServerRule
    weighting: Weighting


def weight(weighting: Weighting, num_examples: int) -> float:
    """Weight of a client in the aggregate: its examples, or 1."""
    return float(num_examples) if weighting == "examples" else 1.0


def fedavg(*, weighting: Weighting = "examples", server_lr: Annotated[float, Gt(0)] = 1.0) -> Strategy:
    """Federated averaging: the mean of the clients' models, weighted by their numbers of examples.

    ``w <- w + server_lr * sum_k (n_k / n) (w_k - w)`` over the clients k of the round, n their examples together.
    FedSGD is FedAvg with ``train.batch_size: all`` and one local epoch.

    Args:
        weighting: "examples" for n_k, "uniform" for the same weight for all.
        server_lr: > 0; 1 replaces the global model by the mean.

    Returns:
        The strategy.

    Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        algorithm 1 (with its erratum: n is over the clients of the round). Differs: ``server_lr`` and ``uniform``.
    """
    return Strategy(plain(), weighted_mean(), sgd(lr=server_lr), weighting)


STRATEGIES: dict[str, Callable[..., Strategy]] = {"fedavg": fedavg}
