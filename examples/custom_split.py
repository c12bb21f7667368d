"""Your own split in a federation: a function that says who holds what. Run: python examples/custom_split.py"""

import sys
from pathlib import Path

import numpy as np
from torch import Tensor

import fedsim
from fedsim import rng


def odd_and_even(labels: Tensor, num_clients: int, key: int, *, mixed: float = 0.1) -> list[np.ndarray]:
    """Half of the clients hold odd digits, half even ones, but for a share ``mixed`` dealt to anybody.

    ``labels``, ``num_clients`` and ``key`` come from fedsim; every draw is made from the key, so a run can be repeated.
    """
    order = rng.permutation(rng.fold(key, "order"), len(labels)).numpy()
    anybody = rng.bernoulli(rng.fold(key, "mixed"), mixed, len(labels)).numpy()
    side = np.where(anybody, rng.bernoulli(rng.fold(key, "side"), 0.5, len(labels)).numpy(), labels.numpy() % 2)
    halves = [np.array_split(order[side[order] == parity], num_clients // 2) for parity in (0, 1)]
    return [*halves[0], *halves[1]]


def main() -> None:
    base = {
        "data": {"dataset": "digits", "clients": 10, "split": {"name": "custom_split:odd_and_even", "mixed": 0.05}},
        "model": {"name": "mlp", "hidden": [64]},
        "train": {"rounds": 20, "clients_per_round": 4, "optimizer": {"name": "sgd", "lr": 0.2}},
    }
    for mixed in (0.0, 1.0):
        run = fedsim.run(base, {"name": f"odd-and-even-{mixed:g}", "data.split.mixed": mixed})
        print(f"mixed {mixed:g}: accuracy {run.summary['accuracy']:.3f}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))  # so that "custom_split" can be imported by its name
    main()
