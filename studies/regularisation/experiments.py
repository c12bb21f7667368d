"""What is run: a config, and the axes along which it is varied. Every experiment is run with every seed."""

from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
IID: Any = "iid"
SKEWED: Any = {"name": "dirichlet", "alpha": 0.3, "min_examples": 10}
FEDERATIONS = {"IID": IID, "Dirichlet 0.3": SKEWED}


class Experiment(NamedTuple):
    """config: file beside this one. axes: key -> values. variants: names of the values of the first axis."""

    config: str
    axes: dict[str, list[Any]]
    variants: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its results."""
        return self.config.removesuffix(".yaml")


def _regularizers(*choices: list[Any]) -> dict[str, list[Any]]:
    return {"model.regularizers": [*choices]}


def _heads(**keys: Any) -> list[Any]:
    return [{"name": "collaborative", **keys}]


METHODS = [  # one file each, on the CNN
    "plain",
    "dropout",
    "dropout-convolutions",
    "spatial-dropout",
    "dropblock",
    "dropconnect",
    "maxout",
    "variational-dropout",
    "targeted-dropout",
    "cutout",
    "mixup",
    "label-smoothing",
    "l1",
    "l2",
    "group-lasso",
    "orthogonal",
    "spectral",
    "proximal",
]
OTHERS = [
    "plain-batch-norm",
    "bn-slimming",
    "plain-resnet",
    "stochastic-depth",
    "shakedrop",
    "plain-fractal",
    "droppath",
]
SPLITS = {"data.split": [IID, SKEWED]}
INITS, DEPTHS = ("default", "fixup"), (10, 100, 1000)
MU = (0.0, 0.5, 1.0, 1.5)

EXPERIMENTS = (
    *(Experiment("base.yaml" if name == "plain" else f"{name}.yaml", SPLITS) for name in (*METHODS, *OTHERS)),
    Experiment(
        "dropblock-schedules.yaml",
        _regularizers(
            *([{"name": "dropblock", "drop": 0.3, "groups": 3, "schedule": s}] for s in ("constant", "linear"))
        )
        | SPLITS,
        ("constant", "linear"),
    ),
    Experiment(
        "multi-sample-dropout.yaml",
        _regularizers(*([{"name": "multi-sample-dropout", "samples": m}] for m in (1, 2, 8))) | SPLITS,
        ("1", "2", "8"),
    ),
    Experiment(
        "ensemblenet.yaml",
        _regularizers(*([{"name": "ensemblenet", "heads": 3, "weight": mu}] for mu in MU)) | SPLITS,
        tuple(map(str, MU)),
    ),
    Experiment(
        "noisy-labels.yaml",
        _regularizers([], _heads(), _heads(beta=1.0), _heads(rescale=False)) | SPLITS,
        ("one head", "collaborative", "no consensus", "no rescaling"),
    ),
    Experiment("deep-residual.yaml", {"model.init": ["default", "fixup"]} | SPLITS, ("default", "fixup")),
    Experiment(
        "depth.yaml",
        {"model": [{"name": "residual-mlp", "depth": d, "width": 32, "init": i} for i in INITS for d in DEPTHS]},
        tuple(f"{init}, {depth} blocks" for init in INITS for depth in DEPTHS),
    ),
    Experiment("skewed-norms.yaml", {"model.norm": ["none", "batch", "group"]}, ("none", "batch", "group")),
    Experiment(
        "speeches.yaml",
        _regularizers([], ["tied-dropout"], ["zoneout"]),
        ("plain", "tied-dropout", "zoneout"),
    ),
)
