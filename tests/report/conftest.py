"""Run folders made with the functions that a real run uses, whole and broken off at different moments."""

import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import rng, runs
from fedsim.records import ClientEvaluation, RoundRecord
from fedsim.summary import Metrics, Status, summarize


def config(name: str = "quickstart", **changes: Any) -> dict[str, Any]:
    """A resolved config; ``changes`` are dotted keys with ``__`` for the dot."""
    made: dict[str, Any] = {
        "name": name,
        "seed": 7,
        "data": {
            "dataset": "digits",
            "root": None,
            "clients": 20,
            "split": {"name": "dirichlet", "alpha": 0.3},
            "test_fraction": 0.2,
        },
        "model": {
            "name": "cnn",
            "norm": "group",
            "init": "default",
            "regularizers": [{"name": "dropblock", "block_size": 3, "drop": 0.1}],
        },
        "train": {
            "rounds": 20,
            "clients_per_round": 10,
            "local_epochs": 1,
            "batch_size": 16,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "eval_every": 1,
            "target_accuracy": 0.8,
        },
        "strategy": {"name": "fedavg"},
        "engine": {"name": "local", "workers": "auto"},
        "output": "runs",
    }
    for dotted, value in changes.items():
        *path, leaf = dotted.split("__")
        place = made
        for part in path:
            place = place[part]
        place[leaf] = value
    return made


def records(rounds: int, *, seed: int = 7, top: float = 0.93, eval_every: int = 1) -> list[RoundRecord]:
    noise = rng.normal(rng.fold(seed, "noise"), rounds).tolist()
    made = []
    for r in range(1, rounds + 1):
        accuracy = min(1.0, top - (top - 0.1) * math.exp(-4 * r / rounds) + 0.01 * noise[r - 1])
        loss = 2.3 * math.exp(-3.5 * r / rounds) + 0.25 + 0.02 * noise[r - 1]
        evaluated = r % eval_every == 0
        made.append(
            RoundRecord(
                round=r,
                loss=loss if evaluated else None,
                accuracy=accuracy if evaluated else None,
                train_loss=0.9 * loss,
                clients=10,
                seconds=0.41 + 0.01 * (r % 3),
                bytes_up=1_234_567 + r,
                bytes_down=1_300_001,
            )
        )
    return made


def evaluations(record: RoundRecord, clients: int, seed: int = 7) -> list[ClientEvaluation]:
    if record.accuracy is None or record.loss is None:
        return []
    draws = rng.normal(rng.fold(seed, "round", record.round), clients).tolist()
    return [
        ClientEvaluation(
            record.round, k, 5 + k % 7, record.loss * (1 - 0.1 * z), max(0, min(1, record.accuracy + 0.06 * z))
        )
        for k, z in enumerate(draws)
    ]


def split(clients: int = 20, classes: int = 10) -> dict[str, Any]:
    generator = np.random.default_rng(clients)
    counts = np.floor(generator.dirichlet([0.3] * classes, clients) * generator.integers(30, 140, (clients, 1)))
    mix = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    classes_held = np.exp(-(mix * np.log(np.where(mix > 0, mix, 1))).sum(1))
    distance = np.abs(mix - counts.sum(0) / counts.sum()).sum(1)
    return {
        "num_clients": clients,
        "num_examples": int(counts.sum()),
        "num_classes": classes,
        "class_names": [str(c) for c in range(classes)],
        "sizes": counts.sum(1).astype(int).tolist(),
        "counts": counts.astype(int).tolist(),
        "test_sizes": [5 + k % 7 for k in range(clients)],
        "effective_classes": classes_held.tolist(),
        "earth_movers_distance": distance.tolist(),
        "summary": {
            "clients": float(clients),
            "clients_without_labels": 0.0,
            "emd_mean": float(distance.mean()),
            "emd_min": float(distance.min()),
            "emd_max": float(distance.max()),
        },
    }


def summary(made: list[RoundRecord], status: Status = "finished", **more: Any) -> dict[str, Any]:
    initial = Metrics(0, 2.31, 0.097)
    return {
        "format": runs.FORMAT,
        "name": "quickstart",
        "status": status,
        "error": None,
        **summarize(made, initial, planned=20, target=0.8),
        "model": {"name": "cnn", "parameters": 38_922},
        **more,
    }


ENVIRONMENT = {
    "fedsim": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Some CPU @ 2.10GHz",
    "cores": 2,
    "device": "cpu",
    "git": {"commit": "4b745a4", "dirty": False},
    "engine": {"name": "local", "workers": 2, "chunk": None},
}


WEIGHTS = {  # of a model before pruning: shape, and uses of an entry for one example
    "conv.weight": ((4, 1, 3, 3), 64),
    "fc.weight": ((8, 16), 1),
    "head.weight": ((5, 8), None),
}


def pruned_records(made: list[RoundRecord], names: Sequence[str], every: int = 4) -> list[RoundRecord]:
    """Level i, from round ``every * i + 1`` on, has sparsity ``1 - 0.8^i``; the last of ``names`` is pruned less."""
    found = []
    for r in made:
        level = (r.round - 1) // every
        left = {name: (0.9 if name == names[-1] else 0.8) ** level for name in names}
        sent = {"bytes_up": int(r.bytes_up * 0.8**level), "bytes_down": int(r.bytes_down * 0.8**level)}
        told = {"sparsity": 1 - 0.8**level, "remaining": left} if level else {}
        found.append(dataclasses.replace(r, **sent, **told))
    return found


@dataclasses.dataclass
class Maker:
    """Makes run folders below one folder, from what its other functions build."""

    root: Path
    _count: Any = dataclasses.field(default_factory=itertools.count)
    config = staticmethod(config)
    records = staticmethod(records)
    summary = staticmethod(summary)
    split = staticmethod(split)
    pruned_records = staticmethod(pruned_records)

    def __call__(
        self,
        *,
        conf: dict[str, Any] | None = None,
        made: list[RoundRecord] | None = None,
        clients: int = 20,
        with_summary: dict[str, Any] | None = None,
        with_split: dict[str, Any] | None = None,
    ) -> Path:
        conf, made = conf or config(), records(20) if made is None else made
        folder = self.root / f"run-{next(self._count)}"
        folder.mkdir()
        runs.write_config(folder, conf)
        with contextlib.closing(runs.Lines(folder)) as lines:
            for record in made:
                lines.add(record, evaluations(record, clients, conf["seed"]))
        for file, content in (
            ("summary.json", with_summary),
            ("split.json", with_split),
            ("environment.json", ENVIRONMENT),
        ):
            if content:
                runs.write_json(folder / file, content)
        return folder


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


@pytest.fixture
def whole(make: Maker) -> Path:
    made = records(20)
    return make(made=made, with_summary=summary(made), with_split=split())


def model() -> dict[str, torch.Tensor]:
    """Tensors with as many zeros as remain of WEIGHTS after 12 rounds, and others that cannot be pruned."""
    tensors = {"fc.bias": torch.ones(8), "norm.running_mean": torch.zeros(4)}
    for name, (shape, _) in WEIGHTS.items():
        tensor = rng.normal(rng.fold(5, name), math.prod(shape))
        tensor[: tensor.numel() // 3] = 0.0
        tensors[name] = tensor.reshape(shape)
    return tensors


@pytest.fixture
def pruned(make: Maker) -> Path:
    """A run of 12 rounds and three levels, with its model."""
    made = pruned_records(records(12), tuple(WEIGHTS))
    facts = {"parameters": 300, "parameters_left": 210}
    weights = {name: {"shape": list(shape), "uses": uses} for name, (shape, uses) in WEIGHTS.items()}
    conf = config(train__rounds=12) | {"pruning": {"name": "lottery-ticket", "rate": 0.2, "every": 4}}
    folder = make(conf=conf, made=made, with_summary=summary(made, model={**facts, "weights": weights}))
    runs.save_model(folder, model(), {})
    return folder


@pytest.fixture
def sweep(make: Maker) -> list[runs.RunFolder]:
    """Two splits with three seeds each, and one run of another strategy that is still going on."""
    folders = []
    for alpha in (0.1, 1.0):
        for seed in (1, 2, 3):
            made = make.records(12, seed=seed, top=0.8 + 0.1 * alpha)
            conf = make.config(f"a{alpha}-{seed}", seed=seed, data__split={"name": "dirichlet", "alpha": alpha})
            folders.append(make(conf=conf, made=made, with_summary=make.summary(made)))
    folders.append(make(conf=make.config(strategy={"name": "fedprox", "mu": 0.01}), made=make.records(5)))
    return [runs.open_run(folder) for folder in folders]


class Page(HTMLParser):
    """Tags with attributes, tile values by label, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tiles: dict[str, tuple[str, str]] = {}
        self.text = ""
        self._label, self._value, self._place = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append((tag, values))
        self._place = tag if tag == "data" else values.get("class") or ""
        self._value = values.get("value") or ""

    def handle_endtag(self, tag):
        self._place = ""

    def handle_data(self, data):
        self.text += data
        if self._place == "label":
            self._label = data
        elif self._place == "data":
            self.tiles[self._label] = (data, self._value)


@pytest.fixture
def parse() -> type[Page]:
    return Page


def _assert_self_contained(html: str) -> None:
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "img", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in {"src", "href", "xlink:href", "srcset", "action"} & attributes.keys():
            assert attributes[name].startswith(("#", "data:")), (tag, name)
    assert not re.findall(r"url\((?!#)|@import|https?:|file:", html)
    assert "default-src 'none'" in html


@pytest.fixture
def self_contained() -> Callable[[str], None]:
    """Asserts that a page asks the network for nothing and runs nothing."""
    return _assert_self_contained
