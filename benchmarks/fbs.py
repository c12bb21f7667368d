"""What skipping suppressed channels saves on a CPU: masked time over skipping time, on one thread.

Masked is the trained model in evaluation mode, which computes all channels; skipping is ``fedsim.pruning.skipping``.
They take turns; the ratio of each turn counts, and the table has the median, and the 10th and 90th percentile.
MACs are what could be saved: the cost of the plain model over that of the gated one.

Run in the project's own environment: python benchmarks/fbs.py [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.cost import macs
from fedsim.models.layers.fbs import GatedConv2d
from fedsim.models.zoo import MODELS
from fedsim.pruning.fbs import bind_fbs, set_density
from fedsim.pruning.fbs_cost import fbs_macs
from fedsim.pruning.skipping import skipping
from fedsim.training.objective import PLAIN

SIZES = [(64, 32), (64, 16), (64, 8), (128, 32), (128, 16), (128, 8), (256, 16), (256, 8)]
DENSITIES, BATCHES = (0.25, 0.5), (1, 32)


def layers(channels: int) -> nn.Module:
    """Two layers, of which the second meets the first's zeros; only the second is timed."""
    with rng.torch_seeded(0):
        parts = [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        model = nn.Sequential(*parts)
        bind_fbs(model, PLAIN)
    return varied(model)


def varied(model: nn.Module) -> nn.Module:
    """With gates that choose other channels for other examples, and are all above 0."""
    for i, module in enumerate(model.modules()):
        if isinstance(module, GatedConv2d):
            with torch.no_grad():
                module.gate.phi.copy_(rng.uniform(i, *module.gate.phi.shape) / len(module.gate.phi))
    return model.eval()


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def ratios(masked: nn.Module, skipped: nn.Module, x: Tensor, repeats: int) -> tuple[float, str]:
    """Median milliseconds of the masked path, and the ratio with its spread."""
    expected = masked(x)
    alike = (skipped(x) - expected).abs().flatten(1).amax(1) <= 1e-5 * expected.abs().max()
    assert float(alike.float().mean()) >= 0.9  # rounding decides between gates that are almost equal
    pairs = [(timed(lambda: masked(x)), timed(lambda: skipped(x))) for _ in range(repeats)]
    found = sorted(one / other for one, other in pairs)
    low, high = found[len(found) // 10], found[-1 - len(found) // 10]
    return 1e3 * statistics.median(a for a, _ in pairs), f"{statistics.median(found):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    repeats = 5 if parser.parse_args().quick else 31
    torch.set_num_threads(1)
    print("| what | batch | density | masked, ms | masked / skipping | MACs, dense / skipping |")
    print("|---|---|---|---|---|---|")
    for channels, size in SIZES:
        model = layers(channels)
        for density in DENSITIES:
            set_density(model, density)
            skipped = skipping(model)
            for batch in BATCHES:
                x = model[:3](rng.normal(1, batch, channels, size, size)).detach()  # type: ignore[index]
                once, ratio = ratios(model[3], skipped[3], x, repeats)  # type: ignore[index]
                saved = (
                    macs(nn.Conv2d(channels, channels, 3, padding=1), (channels, size, size))
                    / (fbs_macs(model, (channels, size, size))["3"])
                )
                print(f"| {channels} ch, {size} x {size} | {batch} | {density} | {once:.2f} | {ratio} | {saved:.2f} |")
    for name, shape in (("m-cifarnet", (3, 32, 32)), ("m-cifarnet-small", (1, 28, 28))):
        with rng.torch_seeded(0):
            model = MODELS[name](shape, 10)
        dense = macs(model, shape)
        bind_fbs(model, PLAIN)
        varied(model)
        for density in (*DENSITIES, 1.0):
            set_density(model, density)
            for batch in BATCHES:
                once, ratio = ratios(model, skipping(model), rng.normal(1, batch, *shape), repeats)
                saved = dense / sum(fbs_macs(model, shape).values())
                print(f"| {name} | {batch} | {density} | {once:.2f} | {ratio} | {saved:.2f} |", flush=True)


if __name__ == "__main__":
    main()
