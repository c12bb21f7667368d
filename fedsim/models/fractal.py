"""FractalNet: columns of convolutions of different depth, which are joined again and again, without residuals."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge, MinLen
from torch import Tensor, nn

from fedsim.models.convolutional import image_shape
from fedsim.models.layers.norms import Norm, norm_2d
from fedsim.models.mlp import Count


class FractalBlock(nn.Module):
    """``f_1 = conv``, ``f_(C+1)(z) = join(f_C(f_C(z)), conv(z))``, drawn as C columns that go down side by side.

    Column c = 1, ..., C has 2^(c-1) convolutions, each with norm and ReLU: the first is the shortest. A join takes the
    mean of all columns that end there; joins that follow one another at once are one.
    """

    def __init__(self, channels_in: int, channels: int, *, columns: int, norm: Norm) -> None:
        super().__init__()
        self.columns = columns
        for c in range(columns):
            layers = [_layer(channels if i else channels_in, channels, norm) for i in range(2**c)]
            named = OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers, 1))
            self.add_module(f"column{c + 1}", nn.Sequential(named))

    def forward(self, x: Tensor, weights: Sequence[Tensor] = ()) -> Tensor:
        """(batch, channels_in, height, width) to (batch, channels, height, width).

        weights: for each join, as :class:`fedsim.models.layers.paths.DropPath` returns them; () for plain means.
        """
        given = iter(weights)
        reached = [x] * self.columns
        for row in range(1, 2 ** (self.columns - 1) + 1):
            ending = ending_at(row, self.columns)
            found = [self._layer(c, row)(reached[c]) for c in ending]
            joined = _join(found, next(given) if weights and len(ending) > 1 else None)
            for c in ending:
                reached[c] = joined
        return joined

    def column(self, x: Tensor, number: int) -> Tensor:
        """What column ``number`` = 1, ..., C makes of ``x`` without the others."""
        alone: Tensor = self.get_submodule(f"column{number}")(x)
        return alone

    def _layer(self, column: int, row: int) -> nn.Module:
        return self.get_submodule(f"column{column + 1}.layer{row // _rows(column, self.columns)}")


def _rows(column: int, columns: int) -> int:
    """How many rows a layer of a column is long, if those of the longest column are one."""
    return 1 << (columns - 1 - column)


def ending_at(row: int, columns: int) -> list[int]:
    """Columns 0, 1, ... of which a layer ends at row 1, ..., 2^(columns - 1).

    >>> [ending_at(row, 3) for row in (1, 2, 3, 4)]
    [[2], [1, 2], [2], [0, 1, 2]]
    """
    return [c for c in range(columns) if row % _rows(c, columns) == 0]


def _join(inputs: Sequence[Tensor], weights: Tensor | None) -> Tensor:
    """The mean of the inputs, or with ``weights`` (rows, inputs) a weighted one."""
    if weights is None:
        return sum(inputs[1:], inputs[0]) / len(inputs) if len(inputs) > 1 else inputs[0]
    parts = [x * weights[:, i, None, None, None] for i, x in enumerate(inputs)]
    return sum(parts[1:], parts[0])


class Fractal(nn.Module):
    """Fractal blocks with 2 x 2 max pools between them.

    depth: number of blocks.
    droppath: if there is one, it is asked in training for the weights of all joins of all blocks, once a pass.
    only: the one column, 1, 2, ..., that is computed; None for all.
    """

    droppath: nn.Module | None
    only: int | None

    def __init__(self, channels_in: int, channels: Sequence[int], *, columns: int, norm: Norm) -> None:
        super().__init__()
        self.columns, self.depth, self.only = columns, len(channels), None
        self.register_module("droppath", None)
        for i, width in enumerate(channels, 1):
            if i > 1:
                self.add_module(f"pool{i - 1}", nn.MaxPool2d(2, ceil_mode=True))
            self.add_module(f"block{i}", FractalBlock(channels_in, width, columns=columns, norm=norm))
            channels_in = width

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) to (batch, last of the channels, ...)."""
        droppath = self.droppath if self.training and self.only is None else None
        weights = droppath(x) if droppath is not None else []
        each = len(weights) // self.depth
        for i in range(self.depth):
            x = self.get_submodule(f"pool{i}")(x) if i else x
            block = self.get_submodule(f"block{i + 1}")
            assert isinstance(block, FractalBlock)
            x = block(x, weights[i * each : (i + 1) * each]) if self.only is None else block.column(x, self.only)
        return x

    def joins(self) -> list[list[int]]:
        """For each join, in the order of the calls, the columns 0, 1, ... that come to it."""
        rows = [ending_at(row, self.columns) for row in range(1, 2 ** (self.columns - 1) + 1)]
        return [row for row in rows if len(row) > 1] * self.depth


def single_column(model: nn.Module, column: int) -> nn.Module:
    """A copy of a fractal network that computes one column only: the quick answer of a short one, or a deep one's.

    The copy has all parameters under their names, so what a federation has trained can be put into it.

    Args:
        model: with :class:`Fractal` in it. Not changed.
        column: 1, ..., columns; column c is 2^(c-1) convolutions deep in each block.

    Raises:
        ValueError: there is no such column, or the model has none.

    Source: Larsson, Maire, Shakhnarovich 2017, arXiv:1605.07648, section 3. Differs: none.
    """
    alone = copy.deepcopy(model)
    for fractal_ in fractals(alone):
        if not 1 <= column <= fractal_.columns:
            raise ValueError(f"column must be in [1, {fractal_.columns}], got {column}")
        fractal_.only = column
    return alone


def fractals(model: nn.Module) -> list[Fractal]:
    """The fractal parts of a model.

    Raises:
        ValueError: there are none.
    """
    found = [module for module in model.modules() if isinstance(module, Fractal)]
    if not found:
        raise ValueError("needs columns; fractal has them")
    return found


def _layer(channels_in: int, channels: int, norm: Norm) -> nn.Module:
    """3 x 3 convolution, norm, ReLU."""
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=norm == "none")
    return nn.Sequential(OrderedDict(conv=conv, norm=norm_2d(norm, channels), relu=nn.ReLU()))


def fractal(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    channels: Annotated[list[Count], MinLen(1)] = [16, 32, 64],  # noqa: B006 -- only read; shown as in YAML
    columns: Annotated[int, Ge(1)] = 3,
    norm: Norm = "group",
) -> nn.Module:
    """FractalNet for small images: columns of 1, 2, 4, ... convolutions per block, joined by means, pools between.

    Args:
        input_shape: (channels, height, width), any size from 1 x 1.
        num_classes: number of logits.
        channels: width of each block; a 2 x 2 max pool follows each but the last, and global mean pooling that.
        columns: C; the longest has 2^(C-1) convolutions in each block, and all together 2^C - 1.
        norm: after each convolution; ``none`` gives the convolutions biases instead.

    Raises:
        ValueError: not an image.

    Source: Larsson, Maire, Shakhnarovich 2017, "FractalNet", arXiv:1605.07648, section 2. Differs: three narrow blocks
        where the paper has five of up to 512 channels; group norm by default, since batch statistics differ between
        clients; no dropout between blocks; the mean over all pixels after the last block, where the paper pools on.
    """
    maps, _, _ = image_shape("fractal", input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        body=Fractal(maps, channels, columns=columns, norm=norm), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
    )
    layers["head"] = nn.Linear(channels[-1], num_classes)
    return nn.Sequential(layers)
