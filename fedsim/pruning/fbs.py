"""Feature boosting and suppression: every example uses the channels that matter for it, and all weights stay."""

import math
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsim.models import places
from fedsim.models.layers.fbs import GatedConv2d, gate
from fedsim.models.places import join
from fedsim.models.residual import Residual
from fedsim.pruning.pruning import Change, Moment, Pruning
from fedsim.records import IGNORED, Params
from fedsim.training.objective import Objective


def fbs(
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.5,
    step: Annotated[float, Gt(0), Le(1)] = 0.1,
    until: Annotated[float, Ge(0), Le(1)] = 0.5,
    penalty: Annotated[float, Ge(0)] = 1e-8,
) -> Pruning:
    """Feature boosting and suppression: each example uses the channels its gates choose; all weights stay.

    Behind each convolution ``relu(wta_k(g(x)) * (norm(conv(x)) + beta))`` with ``g(x) = relu(mean |x| phi + rho)`` and
    ``k = ceil(d * channels)``. The server lowers d from 1 by steps; evaluation uses the d of the round's training.

    Args:
        density: d in the end, in (0, 1].
        step: from one d to the next, in (0, 1].
        until: share of all rounds after which the last d is reached, in [0, 1]; 0: from the first round on.
        penalty: on the sum of an example's gates, >= 0.

    Raises:
        ValueError: when bound, if the model has no convolution with a ReLU behind it.

    Source: Gao et al. 2019, "Dynamic Channel Pruning: Feature Boosting and Suppression", arXiv:1810.05331; the steps
        are the authors' recipe. Differs: no dense training first, unless the model is given trained.
    """
    before = partial(lowered, density=density, step=step, until=until)
    return Pruning(before, bind=partial(bind_fbs, penalty=penalty))


def bind_fbs(model: nn.Module, objective: Objective, *, penalty: float = 1e-8) -> Objective:
    """Gate every convolution with a ReLU behind it, in place, and add ``penalty * sum_l mean ||g_l||_1``.

    Those are convolutions of torch's own class and one group, with at most one norm between them and an ``nn.ReLU``
    in an ``nn.Sequential``, and those inside the branch of a residual block; not the last of a branch, whose channels
    meet the shortcut's. Weights keep their names; the norm becomes a child of its convolution. New parameters come
    from torch's generator. All densities are 1 at first.

    Args:
        model: not yet trained, or trained densely: its scales are lost, then, and it needs training at density 1.
        penalty: factor, >= 0, on the sum of gates of an example, averaged over the batch.

    Raises:
        ValueError: the model has no such convolution.
    """
    found = _gateable(model)
    if not found:
        raise ValueError(
            "needs convolutions with a ReLU behind them, which it can gate; cnn, conv-2, conv-4, conv-6, resnet and "
            "m-cifarnet have them"
        )
    for path, norm in found.items():
        conv = model.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)  # as _gateable has found it
        gate(conv, _taken(model, norm) if norm else None)
    maps = tuple((join(path, "gate"), partial(gates_used, strength=penalty)) for path in found) if penalty else ()
    return Objective(objective.loss, objective.penalties, (*objective.maps, *maps), objective.mixing)


def gates_used(g: Tensor, labels: Tensor, *, strength: float) -> Tensor:
    """``strength * mean_b sum_c |g_bc|`` over the examples that count. Args: g (batch, channels); labels (batch,)."""
    counted = (labels != IGNORED).to(g)
    return strength * (g.abs().sum(-1) * counted).sum() / counted.sum().clamp(min=1.0)


def density_at(now: int, rounds: int, *, density: float, step: float, until: float) -> float:
    """The density in a round: ``1 - step * i`` in equal stretches of rounds, down to ``density``.

    With ``n = ceil((1 - density) / step)`` steps down, the i-th comes when ``i / n`` of the first ``until`` of all
    rounds are over, the last not before.

    Args:
        now: the round, 1, 2, ...; of ``rounds``.
        density: the last, in (0, 1]. step: > 0. until: share of rounds, in [0, 1].

    >>> [density_at(round, 10, density=0.5, step=0.2, until=0.6) for round in range(1, 11)]
    [1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.5, 0.5, 0.5, 0.5]
    """
    steps = math.ceil((1.0 - density) / step - 1e-9)
    over, stretch = now - 1, until * rounds
    taken = steps if over >= stretch - 1e-9 else math.floor(steps * over / stretch + 1e-9)
    return density if taken == steps else round(1.0 - step * taken, 9)


def lowered(moment: Moment, *, density: float, step: float, until: float) -> Change | None:
    """``before`` of the method: what the gates' buffers hold is set to :func:`density_at` of the round.

    A density is a buffer of the global model, so it reaches every client, evaluation and a resumed run by itself.
    """
    now = density_at(moment.round, moment.rounds, density=density, step=step, until=until)
    names = [join(path, "density") for path, one in moment.model.named_modules() if isinstance(one, GatedConv2d)]
    before = {name: moment.buffers[name] for name in names}
    changed: Params = {name: torch.full_like(old, now) for name, old in before.items()}
    if all(torch.equal(changed[name], old) for name, old in before.items()):
        return None
    return Change(moment.params, {**moment.buffers, **changed}, moment.memory)


def set_density(model: nn.Module, density: float) -> None:
    """Set the density of all gated convolutions, in place."""
    for module in model.modules():
        if isinstance(module, GatedConv2d):
            module.density.fill_(density)


def _gateable(model: nn.Module) -> dict[str, str]:
    """Paths of convolutions that can be gated, and of the norm behind each, "" if there is none."""
    found = {}
    for unit in places.convolutions(model):
        norms = _between(model, unit.layer, unit.activation)
        if norms is not None and len(norms) <= 1:
            found[unit.layer] = next(iter(norms), "")
    for path, block in model.named_modules():
        if isinstance(block, Residual):
            inner = {join(path, name): join(path, f"norm{i}") for i, name in enumerate(block.weights[:-1], 1)}
            found |= {layer: norm if _is_norm(model, norm) else "" for layer, norm in inner.items()}
    return {path: norm for path, norm in found.items() if _is_plain(model.get_submodule(path))}


def _between(model: nn.Module, layer: str, activation: str | None) -> list[str] | None:
    """Paths of the norms between a layer and the ReLU behind it; None if there is no ReLU, or something else is."""
    if activation is None or type(model.get_submodule(activation)) is not nn.ReLU:
        return None
    above, _, first = layer.rpartition(".")
    names = [*model.get_submodule(above)._modules]
    between = [join(above, name) for name in names[names.index(first) + 1 : names.index(activation.rpartition(".")[2])]]
    norms = [path for path in between if type(model.get_submodule(path)) is not nn.Identity]
    return norms if all(_is_norm(model, path) for path in norms) else None


def _is_norm(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), _BatchNorm | nn.GroupNorm)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.groups == 1


def _taken(model: nn.Module, path: str) -> nn.Module:
    """Take a module from its place, where an identity stays."""
    above, _, name = path.rpartition(".")
    norm = model.get_submodule(path)
    model.get_submodule(above)._modules[name] = nn.Identity()
    return norm
