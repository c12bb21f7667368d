"""What feature boosting and suppression costs for one example: multiply-accumulates that skipping leaves."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsim import rng
from fedsim.models.cost import example
from fedsim.models.layers.fbs import GatedConv2d, count
from fedsim.pruning.fbs import set_density

Counts = dict[str, int]


def fbs_macs(model: nn.Module, input_shape: tuple[int, ...], density: float | None = None) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer, skipping what gates suppress; sum them for the model.

    A gated convolution takes ``k^2 * in' * ceil(d out) * H' W'``, its predictor ``in * out`` and the means of its
    input ``in * H W``; another layer takes ``k^2 * in' * out * H' W'``, a linear one ``in' * out``. in' are input
    channels (features) that are not 0 when all gates before them are closed but for d of each layer's: found in a
    forward pass of random numbers.

    Args:
        model: with gated convolutions; not changed.
        input_shape: of one example.
        density: d in (0, 1]; None: that of each layer.

    Raises:
        ValueError: the model has no gated convolution.

    Source: Gao et al. 2019, arXiv:1810.05331, section 3.3. Differs: a ReLU's further zeros do not count.
    """
    copied = copy.deepcopy(model).eval()
    if density is not None:
        set_density(copied, density)
    if not any(isinstance(module, GatedConv2d) for module in copied.modules()):
        raise ValueError("the model has no gated convolutions; see bind_fbs")
    found: Counts = {}
    for path, module in copied.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(partial(_count, found, path))
    x = example(copied, input_shape, 1)
    with torch.no_grad():
        copied(1.0 + rng.uniform(rng.fold(0, "macs"), *x.shape).to(x))
    return found


def _count(found: Counts, path: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """A forward hook that counts, and lets the first of a gated layer's channels pass, all of them above 0."""
    x: Tensor = args[0]
    if isinstance(module, nn.Linear):
        found[path] = int(x.count_nonzero()) * module.out_features
        return None
    assert isinstance(module, nn.Conv2d)  # as fbs_macs has hooked
    used = int(x.flatten(2).any(-1).sum())
    window = module.kernel_size[0] * module.kernel_size[1] * output[0, 0].numel()
    if not isinstance(module, GatedConv2d):
        found[path] = window * used * module.out_channels // module.groups
        return None
    k = int(count(module.density, module.out_channels))
    overhead = module.in_channels * (module.out_channels + x[0, 0].numel())
    found[path] = window * used * k + overhead
    passed = torch.zeros_like(output)
    passed[:, :k] = 1.0 + output[:, :k].abs()
    return passed
