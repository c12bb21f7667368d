"""Fast simulation on one machine: stacked clients, fused steps, worker processes."""

import os
import shutil
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from fedsim.engines.local.engine import Local
from fedsim.engines.local.measuring import Mode

_COMPILERS = (os.environ.get("CXX", "g++"), "clang++")
Workers = Annotated[int, Ge(1)] | Literal["auto"]


def local(
    *,
    mode: Mode = "auto",
    workers: Workers = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    compile: bool = False,
) -> Local:
    """The fastest way through a cohort on this machine.

    Args:
        mode: how a client is trained. ``sequential``: one after another, by autograd. ``vectorised``: several at once
            under ``torch.func.vmap``. ``fused``: by a backward pass written by hand, for chains of standard layers.
            ``auto`` takes the fastest of those that work for the model, measured once and remembered; results differ
            by no more than rounding, and a resumed run keeps to what it began with.
        workers: processes of one thread each; 1 trains in this process. ``auto``: one for each core, if the run is
            long enough to repay their start. Results are bit-equal for any number.
        device: ``auto`` is cuda where torch finds it. On cuda one process trains everything.
        precision: bf16 runs forward passes under ``torch.autocast``; parameters and sums stay as they are.
        compile: let ``torch.compile`` make code of the sequential or vectorised gradient: worth its start of tens of
            seconds in long runs of models that cannot be fused. Needs a C++ compiler on the CPU.

    Returns:
        The engine.

    Raises:
        ValueError: more than one worker on cuda or on a system that is not POSIX, or ``compile`` without a compiler.
            A cuda that is not there is an error of ``prepared``, so that a run folder from elsewhere can be opened.
    """
    found = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if workers not in ("auto", 1) and (found == "cuda" or os.name != "posix"):
        raise ValueError(f"workers must be 1 {'on cuda' if found == 'cuda' else 'on this system'}, got {workers}")
    if compile and found == "cpu" and not any(map(shutil.which, _COMPILERS)):
        raise ValueError(f"compile: needs a C++ compiler, and neither {' nor '.join(_COMPILERS)} is found")
    return Local(mode, workers, found, compile, precision == "bf16")
