"""One party's side of a dataset: some of the columns of every row."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Lt
from torch import Tensor

from fedsim.data import download
from fedsim.records import Dataset, Examples

Side = Literal["a", "b"]


def cut(inputs: Tensor, side: Side, share: float) -> Tensor:
    """The columns of one side: of the last axis, k long, the first ``round(share k)`` to a, the others to b.

    Args:
        inputs: (n, *shape); of a table (n, k), of images (n, C, H, W), which are cut into a left and a right part.
        side: a or b.
        share: of a, in (0, 1); halves are rounded to even numbers.

    Returns:
        Inputs with a shorter last axis, copied.

    Raises:
        ValueError: there is nothing to cut, or a side has no column.
    """
    if inputs.ndim < 2:
        raise ValueError(f"inputs must have columns, got shape {tuple(inputs.shape)}")
    width = inputs.shape[-1]
    count = round(share * width)
    if not 0 < count < width:
        raise ValueError(f"share must leave each side one of the {width} columns or more, got {share:g}")
    return (inputs[..., :count] if side == "a" else inputs[..., count:]).clone()


def columns(
    key: int,
    root: Path | None = None,
    progress: download.Progress = download.silent,
    *,
    of: str,
    side: Side = "a",
    share: Annotated[float, Gt(0), Lt(1)] = 0.5,
) -> Dataset:
    """One party's columns of another dataset: the first round(share * k) of k for side a, the others for b.

    Images are cut along their width. Rows, labels, test set and owners stay those of the other dataset.

    Args:
        key, root, progress: for the other dataset.
        of: its name. It must need no parameters; those it has keep their defaults.
        side: a or b.
        share: of a, in (0, 1).

    Raises:
        ValueError: of or share cannot be.
        DataError: the other dataset's files are missing or damaged.
    """
    factory = _factory(of)
    wanted = inspect.signature(factory).parameters
    context = {"key": key, "root": root, "progress": progress}
    whole: Dataset = factory(**{name: value for name, value in context.items() if name in wanted})
    if not whole.train.inputs.is_floating_point():
        raise ValueError(f"of must be a dataset of numbers, {of} has tokens")
    return replace(
        whole,
        name=f"columns of {whole.name}",
        train=_cut(whole.train, side, share),
        test=None if whole.test is None else _cut(whole.test, side, share),
    )


def _cut(examples: Examples, side: Side, share: float) -> Examples:
    return Examples(cut(examples.inputs, side, share), examples.labels)


def _factory(of: str) -> Callable[..., Dataset]:
    from fedsim.data.datasets import DATASETS  # noqa: PLC0415  (which names this one, too)

    others = {name: factory for name, factory in DATASETS.items() if factory is not columns}
    if of not in others:
        raise ValueError(f"of must be one of {', '.join(others)}, got {of}")
    given = inspect.signature(others[of]).parameters.values()
    needed = [one.name for one in given if one.kind is one.KEYWORD_ONLY and one.default is one.empty]
    if needed:
        raise ValueError(f"of must be a dataset that needs no parameters, {of} needs {needed[0]}")
    return others[of]
