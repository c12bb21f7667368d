"""What is run: each experiment makes rows of numbers at a place, which is a data set, a split and a seed."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fedsim
from fedsim.api.inspecting import totals
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.models.layers.fbs import GatedConv2d
from fedsim.pruning.fbs_cost import fbs_macs
from fedsim.records import Examples

HERE = Path(__file__).parent
SPLITS: dict[str, Any] = {"IID": "iid", "2-shard": {"name": "shards", "shards_per_client": 2}}
DATA = ("fashion", "digits")
LEVELS = 9  # of tickets; 0.8^9 is about an eighth
ONE_SHOT = 0.79  # leaves what seven levels leave
SHARES = (0.5, 0.75, 0.9)
DENSITIES = (1.0, 0.7, 0.5, 0.3)

Row = dict[str, Any]


class Place(NamedTuple):
    """Where an experiment is run. changes: to every config, for a short version of it. out: where run folders go."""

    data: str
    split: str
    seed: int
    changes: Mapping[str, Any]
    out: Path

    def run(self, config: str, **changes: Any) -> fedsim.Run:
        """Run ``config-data.yaml``; keys have ``__`` for their dots."""
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        where = {"data.split": SPLITS[self.split], "seed": self.seed, "output": str(self.out)}
        return fedsim.run(HERE / f"{config}-{self.data}.yaml", {**where, **dotted, **self.changes})


def tickets(place: Place) -> Iterator[Row]:
    """Accuracy at the end of every level, of tickets and of what they are held against."""
    every = 2 if place.changes else 8
    rounds = every * (3 if place.changes else LEVELS + 1)
    for control in ("none", "reinit", "random-mask"):
        section = {"name": "lottery-ticket", "rate": 0.2, "every": every, "control": control}
        run = place.run("tickets", pruning=section, train__rounds=rounds, train__eval_every=every)
        arm = "ticket" if control == "none" else control
        yield from (_level(arm, one, every) for one in run.rounds if one.round % every == 0)
    section = {"name": "lottery-ticket", "rate": ONE_SHOT, "every": every, "levels": 1}
    run = place.run("tickets", pruning=section, train__rounds=2 * every, train__eval_every=every)
    yield _level("one-shot", run.rounds[-1], every)


def _level(arm: str, one: Any, every: int) -> Row:
    left = 1.0 - (one.sparsity or 0.0)
    return {"arm": arm, "level": one.round // every - 1, "remaining": left, "accuracy": one.accuracy}


def arms(place: Place) -> Iterator[Row]:
    """A CNN, half of its filters removed, and then trained on or trained anew."""
    run = place.run("cnn", pruning=None)
    more = max(len(run.rounds) // 4, 1)
    yield {"arm": "whole", "accuracy": run.rounds[-1].accuracy, "rounds": len(run.rounds), **_sizes(run)}
    for arm, options in (
        ("fine-tune", {"finetune": more}),
        ("scratch-e", {"scratch": "e"}),
        ("scratch-b", {"scratch": "b"}),
    ):
        yield _after(arm, fedsim.prune(run.folder, "l1-filter", 0.5, **options))
    for criterion in ("thinet", "reconstruction"):
        yield _after(criterion, fedsim.prune(run.folder, criterion, 0.5, finetune=more))
    yield _after("random", fedsim.prune(run.folder, "l1-filter", 0.5, finetune=more, options={"random": True}))
    for share in (0.5, 0.95):
        for arm, options in (("fine-tune", {"finetune": more}), ("scratch-e", {"scratch": "e"})):
            done = fedsim.prune(run.folder, "magnitude", share, **options)
            yield {**_after(f"magnitude {share:.0%}, {arm}", done), "macs": done.after.numbers.effective_macs}
    slim = place.run("cnn", pruning=None, model__regularizers=[{"name": "bn-slimming", "strength": 1e-4}])
    yield _after("network-slimming", fedsim.prune(slim.folder, "network-slimming", 0.5, finetune=more))


def _after(arm: str, done: Any) -> Row:
    rounds = done.run.rounds
    numbers = {"accuracy_before": done.after.accuracy, "parameters": done.after.numbers.parameters}
    return {
        "arm": arm,
        "accuracy": rounds[-1].accuracy,
        "rounds": len(rounds),
        "macs": done.after.numbers.macs,
        **numbers,
    }


def _sizes(run: fedsim.Run) -> Row:
    numbers = totals(run.model(), tuple(run.summary["model"]["input_shape"]))
    return {"macs": numbers.macs, "parameters": numbers.parameters}


TARGETED: dict[str, list[Any]] = {
    "plain": [],
    "dropconnect": [{"name": "dropconnect", "p": 0.495}],
    "targeted": [{"name": "targeted-dropout", "target": 0.75, "drop": 0.66, "ramp": False, "where": "hidden"}],
    "targeted, ramped": [{"name": "targeted-dropout", "target": 0.95, "drop": 0.9, "where": "hidden"}],
}


def targeted(place: Place) -> Iterator[Row]:
    """Accuracy after a part of every filter's weights has gone, without any training after."""
    for arm, regularizers in TARGETED.items():
        run = place.run("targeted", pruning=None, model__regularizers=regularizers)
        yield {"arm": arm, "sparsity": 0.0, "accuracy": run.rounds[-1].accuracy, "mass": _mass(run.model())}
        for share in SHARES:
            options = {"scope": "filter", "output": False}
            done = fedsim.prune(run.folder, "magnitude", share, options=options)
            yield {"arm": arm, "sparsity": share, "accuracy": done.after.accuracy}


def _mass(model: nn.Module) -> float:
    """Share of the squared weights of hidden layers that lies in the lowest three quarters of each row."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)][:-1]
    rows = [layer.weight.detach().square().sort(1).values for layer in layers]
    low = sum(float(row[:, : int(0.75 * row.shape[1])].sum()) for row in rows)
    return low / sum(float(row.sum()) for row in rows)


def gates(place: Place) -> Iterator[Row]:
    """Feature boosting and suppression, and static pruning of about the same arithmetic in the same rounds."""
    rounds = 2 if place.changes else 20
    for density in DENSITIES:
        section = {"name": "fbs", "density": density}
        run = place.run("cnn", pruning=section, train__rounds=rounds, train__eval_every=rounds)
        model, shape = run.model(), tuple(run.summary["model"]["input_shape"])
        row = {"arm": "fbs", "density": density, "accuracy": run.rounds[-1].accuracy}
        yield {**row, "macs": sum(fbs_macs(model, shape).values()), "both": _now_and_then(model, _test(run))}
        section = {"name": "l1-filter", "sparsity": 1.0 - density, "at": rounds // 2}
        static = None if density == 1.0 else section
        run = place.run("cnn", pruning=static, train__rounds=rounds, train__eval_every=rounds)
        yield {"arm": "l1-filter", "density": density, "accuracy": run.rounds[-1].accuracy, **_sizes(run)}


def _test(run: fedsim.Run) -> Examples:
    with importable(HERE):
        return build.federated_data(config_files.check(run.config)).test


def _now_and_then(model: nn.Module, examples: Examples) -> float:
    """Share of gated channels that are open for between 5 and 95 % of the examples."""
    opened: list[Tensor] = []

    def watch(module: nn.Module, args: object, output: Tensor) -> None:
        opened.append((output.detach().flatten(2).abs().sum(2) > 0).double().mean(0))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, GatedConv2d)]
    with torch.no_grad():
        model.eval()(examples.inputs)
    for handle in handles:
        handle.remove()
    frequency = torch.cat(opened)
    return float(((frequency > 0.05) & (frequency < 0.95)).double().mean())


SENT: dict[str, dict[str, Any]] = {
    "dense": {},
    "magnitude 90 %": {"pruning": {"name": "magnitude", "sparsity": 0.9}},
    "lottery ticket": {"pruning": {"name": "lottery-ticket", "rate": 0.6, "every": 6}},
    "snip 90 %": {"pruning": {"name": "snip", "sparsity": 0.9}},
    "grasp 90 %": {"pruning": {"name": "grasp", "sparsity": 0.9}},
    "rigl 90 %": {"pruning": {"name": "rigl", "sparsity": 0.9, "every": 4}},
    "personal tickets": {"pruning": {"name": "personal-tickets"}},
    "top-k 10 %": {"transforms": [{"name": "top-k", "fraction": 0.1}]},
    "top-k 1 %": {"transforms": [{"name": "top-k", "fraction": 0.01}]},
    "top-k 1 %, 8 bit": {"transforms": [{"name": "top-k", "fraction": 0.01}, {"name": "quantise", "bits": 8}]},
    "8 bit": {"transforms": [{"name": "quantise", "bits": 8}]},
    "4 bit": {"transforms": [{"name": "quantise", "bits": 4}]},
    "qsgd 8": {"transforms": [{"name": "qsgd", "bits": 8}]},
    "sign": {"transforms": ["sign"]},
    "snip 90 %, 8 bit": {
        "pruning": {"name": "snip", "sparsity": 0.9},
        "transforms": [{"name": "quantise", "bits": 8}],
    },
}


def sent(place: Place) -> Iterator[Row]:
    """Bytes that clients send, and accuracy."""
    for arm, changes in SENT.items():
        run = place.run("bytes", **changes)
        up, curve = 0, []
        for one in run.rounds:
            up += one.bytes_up
            curve.append([up, one.accuracy])
        target = run.config["train"]["target_accuracy"]
        reached = next((spent for spent, accuracy in curve if accuracy >= target), math.nan)
        down = sum(one.bytes_down for one in run.rounds)
        own = run.rounds[-1].client_accuracy_mean
        row = {"arm": arm, "curve": curve, "accuracy": curve[-1][1], "up": up, "down": down, "own": own}
        yield {**row, "to_target": None if math.isnan(reached) else reached, "target": target}


EXPERIMENTS: dict[str, Callable[[Place], Iterator[Row]]] = {
    "tickets": tickets,
    "arms": arms,
    "targeted": targeted,
    "gates": gates,
    "sent": sent,
}
