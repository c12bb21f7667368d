"""Models with some of their channels gone, and the check that they compute what the masked one does."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedsim import rng
from fedsim.pruning.channels import Group, groups, masked, shrunk

SHAPE = (2, 8, 8)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def scrambled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, (name, tensor) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if tensor.dim() == 1 and tensor.is_floating_point():
                drawn = rng.normal(100 + i, *tensor.shape)
                tensor.copy_(drawn.abs() + 0.3 if name.endswith("running_var") else drawn)
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def some(found: list[Group], seed: int = 0) -> dict[str, Tensor]:
    """An irregular part of the channels of each group, by index for one group and as flags for the next."""
    kept = {}
    for i, group in enumerate(found):
        most = group.out // group.multiple
        count = group.multiple * max(1, int(most * (0.3 + 0.2 * (i % 3))))
        chosen = rng.permutation(rng.fold(seed, group.layer), group.out)[:count].sort().values
        flags = torch.zeros(group.out, dtype=torch.bool)
        flags[chosen] = True
        kept[group.layer] = flags if i % 2 else chosen
    return kept


def inputs(n: int, shape=SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return rng.normal(9, n, *shape, dtype=dtype)


def check_equal(model: nn.Module, kept: dict[str, Tensor], shape=SHAPE, x: Tensor | None = None) -> nn.Module:
    """The small model returns what the large one does with the others at 0; returns the small one."""
    model.eval()
    dtype = next(model.parameters()).dtype
    x = inputs(5, shape, dtype) if x is None else x
    found = groups(model, shape)
    small = shrunk(model, kept, shape)
    expected = functional_call(model, masked(state_of(model), kept, found), (x,))
    tolerance = TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0)
    torch.testing.assert_close(small(x), expected, rtol=0, atol=tolerance)
    assert float((model(x) - expected).detach().abs().max()) > 1e-3  # what was removed mattered
    return small
