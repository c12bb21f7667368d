"""The floor: FedAvg as a loop that anybody would write with torch alone, one client after another.

No DataLoader, no copies of modules, nothing between a batch and the optimizer. Run: python -m runners.bare ...
"""

import time

import prepared
import torch
from peers import CORES
from torch.nn.functional import cross_entropy
from workloads import BATCH, LR, Workload

from runners import torch_models
from runners.task import answer, parse


class Loop:
    """The model, its optimizer and the clients' examples."""

    def __init__(self, workload: Workload, data: prepared.Data) -> None:
        self.workload = workload
        self.x, self.y = torch.from_numpy(data.x), torch.from_numpy(data.y)
        self.model = torch_models.build(workload.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)

    def round(self, number: int) -> None:
        """Train a cohort, each client from the same parameters, and move to the average weighted by examples."""
        parameters = [parameter.data for parameter in self.model.parameters()]
        before = [parameter.clone() for parameter in parameters]
        mean = [torch.zeros_like(parameter) for parameter in parameters]
        cohort = prepared.cohort(self.workload, number)
        blocks = [prepared.block(self.workload, client) for client in cohort]
        examples = sum(len(self.y[block]) for block in blocks)
        self.model.train()
        for block in blocks:
            torch._foreach_copy_(parameters, before)
            self.train(self.x[block], self.y[block])
            torch._foreach_add_(mean, parameters, alpha=len(self.y[block]) / examples)
        torch._foreach_copy_(parameters, mean)

    def train(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One epoch over one client's examples, in a new order."""
        order = torch.randperm(len(y))
        for inputs, labels in zip(x[order].split(BATCH), y[order].split(BATCH), strict=True):
            self.optimizer.zero_grad()
            cross_entropy(self.model(inputs), labels).backward()
            self.optimizer.step()


def main() -> None:
    """Time the rounds."""
    task = parse("bare")
    torch.set_num_threads(1 if task.variant == "one-thread" else CORES)
    data = prepared.load(task.workload)
    loop = Loop(task.workload, data)
    seconds = [timed(loop, number) for number in range(task.total)]
    accuracy = torch_models.accuracy(loop.model, data)
    answer(task, seconds, accuracy, processes=1, threads=torch.get_num_threads(), packages=("torch", "numpy"))


def timed(loop: Loop, number: int) -> float:
    """Wall seconds of one round."""
    began = time.perf_counter()
    loop.round(number)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
