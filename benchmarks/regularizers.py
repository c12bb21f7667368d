"""What each regulariser costs: the time of a training step with it, over that of the plain model, on one thread.

Every method has its defaults and stands on the first of MODELS that has a place for it; the step is one batch of 16 by
autograd, forward and backward, as ``mode: sequential`` takes it. Plain and regularised steps take turns, and the best
time of each counts. The second table is what drawing masks from keys costs, over torch's own dropout.

Run in the project's own environment: python benchmarks/regularizers.py [--quick] [--out FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fedsim import params as p
from fedsim import rng
from fedsim.models.layers.dropouts import Dropout
from fedsim.models.layers.keyed import key_names, progress_names
from fedsim.models.zoo import MODELS as ZOO
from fedsim.records import Examples
from fedsim.strategies.strategy import fedavg
from fedsim.training import regularizers as r
from fedsim.training.client import LocalWork, gradient, layer_inputs
from fedsim.training.optimizers import sgd

LIMIT, MASK_LIMIT = 1.6, 2.0
SEVERAL = {"multi-sample-dropout", "ensemblenet", "collaborative"}  # several samples or heads: more work by design
BATCH, CLASSES = 16, 10


class Model(NamedTuple):
    """A model of the zoo, its keys, and the shape of an example; a shape of one axis is of tokens."""

    name: str
    keys: dict[str, Any]
    shape: tuple[int, ...]

    def build(self) -> nn.Module:
        """The same one each time."""
        with rng.torch_seeded(0):
            return ZOO[self.name](input_shape=self.shape, num_classes=CLASSES, **self.keys)

    def batch(self) -> Examples:
        """BATCH examples of noise."""
        labels = (rng.uniform(2, BATCH, *self.shape[:1] * self.tokens) * CLASSES).long()
        if self.tokens:
            return Examples((rng.uniform(1, BATCH, *self.shape) * CLASSES).long(), labels)
        return Examples(rng.normal(1, BATCH, *self.shape), labels)

    @property
    def tokens(self) -> bool:
        """Whether it takes token sequences."""
        return len(self.shape) == 1


THREE = {"channels": [32, 64, 64], "kernel": 3, "hidden": 128}
MODELS = {
    "3-conv CNN": Model("cnn", THREE, (1, 28, 28)),
    "3-conv CNN, batch norm": Model("cnn", {**THREE, "norm": "batch"}, (1, 28, 28)),
    "resnet-8": Model("resnet-8", {}, (1, 28, 28)),
    "fractal": Model("fractal", {}, (1, 28, 28)),
    "char-lstm": Model("char-lstm", {}, (80,)),
}


def work_of(model: Model, name: str | None) -> LocalWork | None:
    """A client's work, with one regulariser or none; None if the model has no place for it."""
    built = model.build()
    try:
        objective = r.bind(built, [r.REGULARIZERS[name]()] if name else [])
    except ValueError:
        return None
    names = key_names(built), progress_names(built)
    return LocalWork(
        built, names[0], sgd(), fedavg().local, 1, BATCH, objective=objective, progress_names=names[1], rounds=2
    )


def step(work: LocalWork, batch: Examples) -> Callable[[], object]:
    """One gradient."""
    params, buffers = p.of(work.model)
    work.model.train()
    return lambda: gradient(work, params, buffers, batch, layer_inputs(work, 1, 1))


def ratio(plain: Callable[[], object], other: Callable[[], object], spent_s: float) -> tuple[float, float]:
    """Best seconds of plain, and other's over it; they take turns for ``spent_s`` each, eight times at least."""
    best, turns, began = [float("inf")] * 2, 0, time.perf_counter()
    while turns < 8 or time.perf_counter() - began < 2 * spent_s:
        for i, one in enumerate((plain, other)):
            start = time.thread_time()
            one()
            best[i] = min(best[i], time.thread_time() - start)
        turns += 1
    return best[0], best[1] / best[0]


def costs(spent_s: float) -> list[dict[str, Any]]:
    """A row for each regulariser."""
    rows = []
    for name in r.REGULARIZERS:
        for told, model in MODELS.items():
            work = work_of(model, name)
            if work is None:
                continue
            batch = model.batch()
            plain = work_of(model, None)
            assert plain is not None
            plain_s, times = ratio(step(plain, batch), step(work, batch), spent_s)
            rows.append({"name": name, "model": told, "plain_ms": 1e3 * plain_s, "ratio": times})
            print(f"{name:22} {told:24} {1e3 * plain_s:8.2f} ms  x {times:.2f}", flush=True)
            break
    return rows


def masks(spent_s: float) -> list[dict[str, Any]]:
    """Keyed dropout over torch's, by shape."""
    rows = []
    for shape in ((16, 512), (64, 256), (16, 32, 28, 28)):
        x = rng.normal(1, *shape)
        torchs, keyed = nn.Dropout(0.5), Dropout(0.5)
        plain_s, times = ratio(lambda x=x, f=torchs: f(x), lambda x=x, f=keyed: f(x), spent_s)  # type: ignore[misc]
        rows.append({"shape": list(shape), "torch_ms": 1e3 * plain_s, "ratio": times})
        print(f"masks {shape!s:22} {1e3 * plain_s:8.3f} ms  x {times:.2f}", flush=True)
    return rows


def main() -> None:
    """Print both tables; exit 1 if something is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="eight steps each: does everything run?")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spent_s = 0.0 if options.quick else 1.5
    found = {"steps": costs(spent_s), "masks": masks(spent_s)}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    gated = [row for row in found["steps"] if row["name"] not in SEVERAL and row["model"] != "char-lstm"]
    over = [row["name"] for row in gated if row["ratio"] > LIMIT]
    over += [f"masks {row['shape']}" for row in found["masks"] if row["ratio"] > MASK_LIMIT]
    if over and not options.quick:
        sys.exit(f"over the limit ({LIMIT} a step, {MASK_LIMIT} for masks): {', '.join(over)}")


if __name__ == "__main__":
    main()
