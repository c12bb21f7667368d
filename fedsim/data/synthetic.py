"""The synthetic federated data of the FedProx paper: every device has its own model and its own inputs."""

import math
from typing import Annotated

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
    """FedProx's synthetic data: 60 features, 10 classes; alpha makes devices' models differ, beta their inputs.

    For device k: ``y = argmax(W_k x + b_k)``, ``x ~ N(v_k, Sigma)``, ``Sigma = diag(j^-1.2)``, with entries
    ``W_k, b_k ~ N(u_k, 1)``, ``u_k ~ N(0, alpha^2)``, ``v_k ~ N(B_k, 1)``, ``B_k ~ N(0, beta^2)``. Sizes:
    ``floor(exp(z)) + 50``, ``z ~ N(4, 2^2)``. A device's data depend on ``key`` and its number only, not on ``owners``.

    Args:
        key: of all draws.
        alpha: spread of u_k between devices, >= 0.
        beta: spread of B_k between devices, >= 0.
        iid: one W and b, entries N(0, 1), and ``v_k = 0`` for all devices; alpha and beta then have no effect.
        owners: number of devices, >= 1.
        max_examples: largest size of a device, >= 50. The default cuts about one device in 11,000.

    Returns:
        Inputs float32 (n, 60); the last fifth (rounded down) of each device's examples is test; columns: ``device``.

    Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", section 5.1 and appendix C.1.
        arXiv:1812.06127.
        Differs: the paper writes N(0, alpha) and N(0, beta) without saying whether that is a variance; as in its
        authors' code it is a standard deviation here. Sizes are cut at max_examples.
    """
    for name, value, least in (("alpha", alpha, 0), ("beta", beta, 0), ("owners", owners, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")
    key = rng.fold(key, "synthetic")
    sizes = np.array([min(_size(rng.fold(key, "device", k)), max_examples) for k in range(owners)], dtype=np.int64)
    parts = [_device(key, k, int(n), alpha=alpha, beta=beta, iid=iid) for k, n in enumerate(sizes)]
    held = sizes // _TEST_SHARE
    dataset = Dataset(
        name="synthetic",
        train=_joined([(x[: len(x) - h], y[: len(y) - h]) for (x, y), h in zip(parts, held, strict=True)]),
        test=_joined([(x[len(x) - h :], y[len(y) - h :]) for (x, y), h in zip(parts, held, strict=True)]),
        num_classes=_CLASSES,
        columns={"device": np.repeat(np.arange(owners, dtype=np.int64), sizes - held)},
        test_columns={"device": np.repeat(np.arange(owners, dtype=np.int64), held)},
    )
    check(dataset)
    return dataset


def _size(key: int) -> int:
    z = _LOG_MEAN + _LOG_STD * float(rng.normal(rng.fold(key, "size"), dtype=torch.float64))
    return int(math.exp(z)) + _FEWEST


def _device(key: int, k: int, n: int, *, alpha: float, beta: float, iid: bool) -> tuple[Tensor, Tensor]:
    """Inputs (n, 60) and labels (n,) of device k."""
    own = rng.fold(key, "device", k)
    weight, bias = _model(rng.fold(key, "model") if iid else own, 0.0 if iid else alpha)
    centre = torch.zeros(_FEATURES, dtype=torch.float64) if iid else _centre(own, beta)
    std = torch.arange(1, _FEATURES + 1, dtype=torch.float64) ** (-1.2 / 2)
    inputs = (centre + std * rng.normal(rng.fold(own, "x"), n, _FEATURES, dtype=torch.float64)).to(torch.float32)
    scores = torch.addmm(bias, inputs.double(), weight.T)  # (n, 10); float64, so that no machine sees other labels
    return inputs, scores.argmax(1)


def _model(key: int, alpha: float) -> tuple[Tensor, Tensor]:
    """W (10, 60) and b (10,), float64, entries N(u, 1)."""
    u = alpha * rng.normal(rng.fold(key, "u"), dtype=torch.float64)
    entries = u + rng.normal(rng.fold(key, "model"), _CLASSES, _FEATURES + 1, dtype=torch.float64)
    return entries[:, :-1], entries[:, -1]


def _centre(key: int, beta: float) -> Tensor:
    """Mean v of the inputs (60,), float64, entries N(B, 1)."""
    return beta * rng.normal(rng.fold(key, "B"), dtype=torch.float64) + rng.normal(
        rng.fold(key, "v"), _FEATURES, dtype=torch.float64
    )


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Examples:
    return Examples(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
