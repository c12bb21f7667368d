"""Maxout: units that are the largest of several affine maps."""

import torch
from torch import Tensor, nn


class Maxout(nn.Module):
    """``h_i = max_j x_(i m + j)`` over the m pieces of each unit, which lie side by side.

    Where pieces are equal, each gets its share of the gradient.

    Args:
        pieces: m, >= 1.
        axis: of the units, negative: -1 behind linear layers, -3 behind convolutions.

    Source: Goodfellow et al. 2013, "Maxout Networks", ICML, eq. for h_i in section 2. Differs: none.
    """

    def __init__(self, pieces: int, axis: int) -> None:
        super().__init__()
        self.pieces, self.axis = pieces, axis

    def forward(self, x: Tensor) -> Tensor:
        """(..., units * pieces, ...) to (..., units, ...)."""
        units = x.shape[self.axis] // self.pieces
        pieces: Tensor = torch.unflatten(x, self.axis, (units, self.pieces))
        return pieces.amax(self.axis)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"pieces={self.pieces}, axis={self.axis}"


def widen(layer: nn.Linear | nn.Conv2d, pieces: int) -> None:
    """Give ``layer`` ``pieces`` outputs for each it had, in place: its own, and new ones as torch draws them.

    Output i becomes output ``i * pieces``; so convolutions of several groups keep theirs.

    Args:
        layer: of torch's own class.
        pieces: >= 1. New weights come from torch's global generator.
    """
    drawn = [_anew(layer) for _ in range(pieces - 1)]
    for name, parameter in [*layer.named_parameters(recurse=False)]:
        stack = torch.stack([parameter.detach(), *(one.get_parameter(name).detach() for one in drawn)], dim=1)
        layer.register_parameter(name, nn.Parameter(stack.flatten(0, 1), requires_grad=parameter.requires_grad))
    if isinstance(layer, nn.Linear):
        layer.out_features *= pieces
    else:
        layer.out_channels *= pieces


def _anew(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias).to(layer.weight)
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    return nn.Conv2d(layer.in_channels, layer.out_channels, kernel, groups=layer.groups, bias=bias).to(layer.weight)
