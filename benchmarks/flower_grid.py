"""What a message between two Flower apps costs in one process: with lazy arrays, and as Flower encodes them.

Run: python benchmarks/flower_grid.py [messages]

A message holds 200,000 float32 parameters in 8 tensors. Its client makes tensors of them and puts tensors into its
reply, so every message is decoded once and encoded once. One thread.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedsim.engines.flower.arrays import lazy_arrays
from fedsim.engines.flower.grid import InProcessGrid
from fedsim.engines.flower.process import task_identity

SHAPES = ((200, 400), (400,), (250, 400), (250,), (70, 250), (70,), (25, 70), (30,))  # 200,000 in all


def client() -> ClientApp:
    """Decodes, encodes, and trains nothing."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        content = {"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1, "train_loss": 0.5})}
        return Message(RecordDict(content), reply_to=message)

    return app


def echo() -> ClientApp:
    """Sends back what it got: the cost of the grid alone."""
    app = ClientApp()
    app.train()(lambda message, context: Message(message.content, reply_to=message))
    return app


def seconds(app: ClientApp, messages: int) -> list[float]:
    """Of each message, from its making to its reply."""
    grid, found = InProcessGrid(app, 10), []
    arrays = ArrayRecord({f"layer{k}": torch.randn(shape) for k, shape in enumerate(SHAPES)})
    for k in range(messages):
        began = time.perf_counter()
        message = Message(RecordDict({"arrays": arrays}), grid.nodes[k % 10], "train")
        (reply,) = grid.send_and_receive([message])
        found.append(time.perf_counter() - began)
        assert reply.has_content(), reply.error
    return found[messages // 10 :]


def copies(messages: int) -> list[float]:
    """Of two copies of the parameters, which no encoding can do without."""
    tensors, found = [torch.randn(shape).numpy() for shape in SHAPES], []
    for _ in range(messages):
        began = time.perf_counter()
        _ = [[tensor.copy() for tensor in tensors] for _ in range(2)]
        found.append(time.perf_counter() - began)
    return found


def main(messages: int) -> None:
    """Measure in turn, so that what else the machine does meets all alike."""
    assert sum(torch.Size(shape).numel() for shape in SHAPES) == 200_000
    torch.set_num_threads(1)
    ways: dict[str, tuple[Callable[[int], list[float]], bool]] = {
        "lazy arrays": (lambda n: seconds(client(), n), True),
        "Flower's own": (lambda n: seconds(client(), n), False),
        "lazy arrays, nothing decoded": (lambda n: seconds(echo(), n), True),
        "Flower's own, nothing decoded": (lambda n: seconds(echo(), n), False),
        "two bare copies": (copies, False),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, (measure, lazy) in ways.items():
            with task_identity(), lazy_arrays() if lazy else nullcontext():
                found[name] += measure(messages // 5)
    print(f"milliseconds a message, {messages} messages, 200,000 float32 in 8 tensors")
    for name, each in found.items():
        each.sort()
        print(f"  {name:<32} median {1e3 * median(each):.3f}   fastest tenth {1e3 * each[len(each) // 10]:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5000)
