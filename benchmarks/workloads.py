"""The workloads: who trains what, in which numbers; and how much arithmetic one example costs, by formula."""

from math import prod
from typing import NamedTuple

LR = 0.05
BATCH = 10  # every client's number of examples is a multiple of it

# Multiply-adds of one example's forward pass, layer by layer, the first layer first.
# A dense layer: inputs * outputs. A convolution: output pixels * output channels * kernel area * input channels.
FORWARD = {
    "2nn": (784 * 200, 200 * 200, 200 * 10),
    "linear": (784 * 10,),
    "cnn": (28 * 28 * 32 * 25 * 1, 14 * 14 * 64 * 25 * 32, 7 * 7 * 64 * 512, 512 * 10),
    "pfl-cnn": (30 * 30 * 32 * 9 * 3, 28 * 28 * 64 * 9 * 32, 14 * 14 * 64 * 128, 128 * 10),
}
INPUT_SHAPE = {"2nn": (784,), "linear": (784,), "cnn": (1, 28, 28), "pfl-cnn": (3, 32, 32)}
CLASSES = 10


class Workload(NamedTuple):
    """One federation to be timed: FedAvg, one local epoch, plain SGD, clients weighted by examples.

    clients: each holds ``examples`` examples. cohort: how many of them train in a round.
    rounds: timed in one process. slow_rounds: the same for a peer so slow that it gets fewer.
    """

    name: str
    model: str
    clients: int
    examples: int
    cohort: int
    rounds: int
    slow_rounds: int = 1

    @property
    def samples(self) -> int:
        """Examples trained on in one round."""
        return self.cohort * self.examples

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return INPUT_SHAPE[self.model]

    @property
    def flops(self) -> int:
        """Floating-point operations to train on one example once; a multiply-add counts as two.

        Forward, gradient of the weights and gradient of the inputs cost the same in each layer, but nobody needs the
        gradient of the first layer's inputs. Biases, activations, pooling, loss and the step are left out.
        """
        layers = FORWARD[self.model]
        return 2 * (3 * sum(layers) - layers[0])

    def describe(self) -> str:
        """In words, for tables."""
        return (
            f"{self.model}, inputs {prod(self.input_shape)}; {self.clients:,} clients x {self.examples}, "
            f"cohort {self.cohort}"
        )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("2nn-silo", "2nn", clients=100, examples=600, cohort=10, rounds=12, slow_rounds=3),
        Workload("2nn-devices", "2nn", clients=3000, examples=20, cohort=100, rounds=20),
        Workload("linear-devices", "linear", clients=3000, examples=20, cohort=200, rounds=20),
        Workload("cnn-silo", "cnn", clients=100, examples=600, cohort=10, rounds=2),
        Workload("pfl-shape", "pfl-cnn", clients=1000, examples=50, cohort=50, rounds=3),
    )
}
