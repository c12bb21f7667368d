"""The synthetic federated data of the FedProx paper: every device has its own model and its own inputs."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from fedsim import rng
from fedsim.data.checks import check
from fedsim.records import Dataset, Examples

_FEATURES, _CLASSES = 60, 10
_LOG_MEAN, _LOG_STD, _FEWEST = 4.0, 2.0, 50
_TEST_SHARE = 5  # one in five


def synthetic(
    key: int,
    *,
    alpha: Annotated[float, Ge(0)] = 1.0,
    beta: Annotated[float, Ge(0)] = 1.0,
    iid: bool = False,
    owners: Annotated[int, Ge(1)] = 30,
    max_examples: Annotated[int, Ge(50)] = 100_000,
) -> Dataset:
    """FedProx's synthetic data: 60 features, 10 classes; each device has its own model, beta spreads their inputs.

    For device k: ``y = argmax(W_k x + b_k)``, ``x ~ N(v_k, Sigma)``, ``Sigma = diag(j^-1.2)``, with entries
    ``W_k, b_k ~ N(u_k, 1)``, ``u_k ~ N(0, alpha^2)``, ``v_k ~ N(B_k, 1)``, ``B_k ~ N(0, beta^2)``. Sizes:
    ``floor(exp(z)) + 50``, ``z ~ N(4, 2^2)``. A device's data depend on ``key`` and its number only, not on ``owners``;
    on another kind of processor the last place of a normal draw may differ (:func:`fedsim.rng.normal`), and with it,
    rarely, that of an input, a label or a size.

    Args:
        key: of all draws.
        alpha: spread of u_k between devices, >= 0. No label depends on it: u_k adds ``u_k (1 + sum_j x_j)`` to all ten
            scores alike, which no argmax sees. Kept for the paper's name of its data sets.
        beta: spread of B_k between devices, >= 0.
        iid: one W and b (entries N(0, 1)) and ``v_k = 0`` for all devices; alpha and beta then have no effect.
        owners: number of devices, >= 1.
        max_examples: largest size of a device, >= 50. The default cuts about one device in 11,600.

    Returns:
        Inputs float32 (n, 60); the last fifth (rounded down) of each device's examples is test; columns: ``device``.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", section 5.1 and appendix C.1.
        arXiv:1812.06127.
        Differs: the paper writes N(0, alpha) and N(0, beta) without saying whether that is a variance; as in its
        authors' code (litian96/FedProx) it is a standard deviation here. Sizes are cut at max_examples.
    """
    for name, value, least in (
        ("alpha", alpha, 0),
        ("beta", beta, 0),
        ("owners", owners, 1),
        ("max_examples", max_examples, 50),
    ):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    key = rng.fold(key, "synthetic")
    z = _device_draws(key, owners)
    sizes = (torch.exp(_LOG_MEAN + _LOG_STD * z.size).long() + _FEWEST).clamp(max=max_examples)  # (owners,)
    models = alpha * z.u[:, None, None] + z.model  # (owners, 10, 61), the last column is b
    centres = beta * z.big_b[:, None] + z.v  # (owners, 60)
    if iid:
        models, centres = z.model[:1].expand_as(models), torch.zeros_like(centres)
    parts = [
        _examples(rng.fold(key, "device", k, "x"), int(n), centre, model)
        for k, (n, centre, model) in enumerate(zip(sizes, centres, models, strict=True))
    ]
    held = (sizes // _TEST_SHARE).numpy()
    kept = sizes.numpy() - held
    dataset = Dataset(
        name="synthetic",
        train=_joined([(x[:n], y[:n]) for (x, y), n in zip(parts, kept, strict=True)]),
        test=_joined([(x[n:], y[n:]) for (x, y), n in zip(parts, kept, strict=True)]),
        num_classes=_CLASSES,
        columns={"device": np.repeat(np.arange(owners, dtype=np.int64), kept)},
        test_columns={"device": np.repeat(np.arange(owners, dtype=np.int64), held)},
    )
    check(dataset)
    return dataset


class _Draws(NamedTuple):
    """Standard normal draws of every device, float64: (owners,), v (owners, 60), model (owners, 10, 61)."""

    size: Tensor
    u: Tensor
    big_b: Tensor
    v: Tensor
    model: Tensor


def _device_draws(key: int, owners: int) -> _Draws:
    keys = rng.fold_tensor(rng.as_tensor(rng.fold(key, "device")), torch.arange(owners))
    count = 3 + _FEATURES + _CLASSES * (_FEATURES + 1)
    z = torch.func.vmap(lambda one: rng.normal(one, count, dtype=torch.float64))(keys)  # (owners, 673)
    size, u, big_b, v, model = torch.split(z, [1, 1, 1, _FEATURES, _CLASSES * (_FEATURES + 1)], dim=1)
    return _Draws(size[:, 0], u[:, 0], big_b[:, 0], v, model.reshape(owners, _CLASSES, _FEATURES + 1))


def _examples(key: int, n: int, centre: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (n, 60) and labels (n,) of one device."""
    std = torch.arange(1, _FEATURES + 1, dtype=torch.float64) ** (-1.2 / 2)
    inputs = (centre + std * rng.normal(key, n, _FEATURES, dtype=torch.float64)).to(torch.float32)
    scores = torch.addmm(model[:, -1], inputs.double(), model[:, :-1].T)  # (n, 10); float64: a tie is rare
    return inputs, scores.argmax(1)


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> Examples:
    return Examples(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
