"""What the two parties of a place have, and what either could learn of it alone."""

import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from fedsim import rng
from fedsim.config import build, parties
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.config.schema import Config
from fedsim.data.columns import cut
from fedsim.data.sides import Sides, overlap_tables
from fedsim.records import Dataset
from fedsim.transfer.alignment import disclosed
from fedsim.transfer.channel import Channel
from fedsim.transfer.links import pair

HERE = Path(__file__).parent
MOST = 200  # common rows of every place, of which the first ones are used
_DRAWN = {"rows_a": 500, "rows_b": 500, "overlap": MOST, "held_out": 1000}
DATA: dict[str, Any] = {
    "breast-cancer": "breast-cancer",
    "digits": "digits",
    "synthetic": {"name": "overlap-tables", **_DRAWN},
    "fashion": {"name": "small_pictures:fashion", "train": 2000, "test": 2000},
}


class Place(NamedTuple):
    """Where an experiment is run. changes: to every config, for a short version of it. out: where run folders go."""

    data: str
    seed: int
    changes: Mapping[str, Any]
    out: Path

    def config(self, **changes: Any) -> Config:
        """``base.yaml``, changed; keys have ``__`` for their dots."""
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        where = {"data.dataset": DATA[self.data], "seed": self.seed}
        with importable(HERE):
            return config_files.load(HERE / "base.yaml", {**where, **dotted, **self.changes})


class Tables(NamedTuple):
    """The parties' tables, and what neither of them has.

    common: rows of A's and of B's table, (MOST,) each, of the same people in the order in which they train.
    held_out_a: A's columns of the people who are held out, (n, *shape).
    """

    sides: Sides
    common: tuple[Tensor, Tensor]
    held_out_a: Tensor


def tables(place: Place) -> Tables:
    """The same for every arm: how many common rows train is another matter."""
    config = place.config(transfer__overlap=MOST)
    with importable(HERE):
        found = parties.sides(config)
        whole = build.dataset_or_sides(config)
    held_out = cut(whole.test.inputs, "a", 0.5) if isinstance(whole, Dataset) and whole.test else _drawn(config, found)
    return Tables(found, _common(found), held_out)


def _drawn(config: Config, found: Sides) -> Tensor:
    """A's columns of the drawn people who are held out: of as many people, A is given all."""
    assert found.held_out is not None
    key = rng.fold(build.data_seed(config), "dataset")
    people = _DRAWN["rows_a"] + _DRAWN["rows_b"] - MOST + _DRAWN["held_out"]
    everybody = overlap_tables(key, rows_a=people, rows_b=1, overlap=1, held_out=0).a
    assert everybody is not None and found.a is not None
    where = {one: row for row, one in enumerate(everybody.ids)}
    known = everybody.inputs[[where[one] for one in found.a.ids]]
    if not torch.equal(known, found.a.inputs):
        raise ValueError("these are other people")
    return everybody.inputs[[where[one] for one in found.held_out.ids]]


def _common(found: Sides) -> tuple[Tensor, Tensor]:
    """Rows of both tables in the order that both parties find."""
    assert found.a is not None and found.b is not None
    ends = [Channel(link, "the other") for link in pair()]
    with ThreadPoolExecutor(2) as pool:
        asked = [
            pool.submit(disclosed, end, table.ids, first=first)
            for end, table, first in zip(ends, (found.a, found.b), (True, False), strict=True)
        ]
        a, b = (torch.tensor(one.result()) for one in asked)
    return a, b


# ---------------------------------------------------------------- what either could do alone


def alone(found: Tables, labelled: int, *, net_of_seed: int | None = None) -> float:
    """Accuracy of B's columns alone, were the labels of so many common people given to B.

    net_of_seed: of a net of the size and training of a party's, in place of a logistic regression.
    """
    assert found.sides.a is not None and found.sides.b is not None and found.sides.held_out is not None
    a, b = (rows[:labelled] for rows in found.common)
    labels = found.sides.a.labels
    assert labels is not None
    return _fitted(found.sides.b.inputs[b], labels[a], found.sides.held_out.inputs, _truth(found), net_of_seed)


def reference(found: Tables) -> float:
    """A regression of A's columns and all of A's labels, asked about A's columns of the held-out people."""
    assert found.sides.a is not None and found.sides.a.labels is not None
    return _fitted(found.sides.a.inputs, found.sides.a.labels, found.held_out_a, _truth(found))


def majority(found: Tables) -> float:
    """Of one answer for everybody, the better one."""
    share = float((_truth(found) > 0).double().mean())
    return max(share, 1 - share)


def _truth(found: Tables) -> Tensor:
    assert found.sides.held_out is not None and found.sides.held_out.labels is not None
    return found.sides.held_out.labels


def _fitted(inputs: Tensor, labels: Tensor, asked: Tensor, truth: Tensor, net_of_seed: int | None = None) -> float:
    """scikit-learn's regression with its defaults, or its net; of one class only, that class for everybody."""
    x, y = inputs.flatten(1).double().numpy(), labels.numpy()
    if len(np.unique(y)) == 1:
        return float((truth.numpy() == y[0]).mean())
    learner: Any = LogisticRegression(max_iter=5000)  # type: ignore[no-untyped-call]
    if net_of_seed is not None:
        steps = {"learning_rate_init": 0.02, "max_iter": 100, "batch_size": len(y), "n_iter_no_change": 100}
        steps |= {"alpha": 0.001 * len(y), "random_state": net_of_seed}  # alpha is divided by n
        learner = MLPClassifier((32,), **steps)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # of 100 steps, as a party's net
        learner.fit(x, y)
    return float(learner.score(asked.flatten(1).double().numpy(), truth.numpy()))
