"""Transforms that make updates shorter. Their parameters are YAML keys.

``error_feedback`` has a client remember what was lost, and add it to its next update. If one of the transforms asks for
it, the memory is of all that is lost by them together.
"""

from functools import partial
from typing import Annotated, Literal

from annotated_types import Gt, Le

from fedsim.records import Params
from fedsim.transforms.transform import Selection, Transform
from fedsim.wire import selection

Fraction = Annotated[float, Gt(0), Le(1)]


def top_k(*, fraction: Fraction = 0.01, error_feedback: bool = True) -> Transform:
    """The entries of largest magnitude, of all tensors together; their positions are sent, too.

    Args:
        fraction: of the entries that are not pruned; at least one is sent.
        error_feedback: biased without it: small entries would never be sent.

    Source: Stich, Cordonnier, Jaggi 2018, "Sparsified SGD with memory", NeurIPS, algorithm 1 with top_k.
    """
    return Transform("top-k", Selection(partial(_largest, fraction), drawn=False), error_feedback=error_feedback)


def random_k(*, fraction: Fraction = 0.01, error_feedback: bool = False) -> Transform:
    """Entries drawn anew by every client in every round; no positions are sent, the server draws the same.

    Without error feedback they are multiplied by n / k, so that the mean over draws is the update: its variance grows
    with n / k. With it they are not, for the memory would grow without end.

    Args:
        fraction: of the entries that are not pruned; at least one is sent.
        error_feedback: biased, but nothing is lost for good.

    Source: Stich, Cordonnier, Jaggi 2018, "Sparsified SGD with memory", NeurIPS, algorithm 1 with rand_k.
    """
    return Transform("random-k", Selection(partial(_drawn, fraction), drawn=True), error_feedback=error_feedback)


def qsgd(*, bits: Literal[8, 4, 2] = 8) -> Transform:
    """Random rounding to 2^(bits - 1) - 1 levels of the norm of each 512 values; the mean over draws is the update.

    Source: Alistarh et al. 2017, "QSGD: Communication-efficient SGD via gradient quantization and encoding", NeurIPS.
        Differs: see :func:`fedsim.wire.quantised.qsgd`.
    """
    return Transform("qsgd", coding=f"qsgd{bits}")


def quantise(*, bits: Literal[8, 4] = 8, error_feedback: bool = False) -> Transform:
    """The nearest of 2^bits - 1 equally spaced numbers up to each tensor's largest magnitude."""
    return Transform("quantise", coding=f"uniform{bits}", error_feedback=error_feedback)


def sign(*, error_feedback: bool = True) -> Transform:
    """Each value's sign, times the mean magnitude of its tensor's values: one bit a value.

    Args:
        error_feedback: biased without it.

    Source: Karimireddy et al. 2019, "Error feedback fixes SignSGD and other gradient compression schemes", ICML,
        algorithm 1 (EF-signSGD).
    """
    return Transform("sign", coding="sign", error_feedback=error_feedback)


def half(*, dtype: Literal["fp16", "bf16"] = "fp16", error_feedback: bool = False) -> Transform:
    """Values in 16 bits: fp16 with 11 significant bits up to 65,504, or bf16 with 8 and the range of float32."""
    return Transform("half", coding=dtype, error_feedback=error_feedback)


def sparse() -> Transform:
    """Nothing is lost: each tensor in its shortest form, which pays where many entries have not moved at all."""
    return Transform("sparse", coding="exact")


def _largest(fraction: float, entries: Params, key: int) -> Params:
    return selection.top_k(entries, fraction)


def _drawn(fraction: float, entries: Params, key: int) -> Params:
    return selection.random_k(entries, fraction, key)
