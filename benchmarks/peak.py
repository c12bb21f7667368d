"""The machine's peak: float32 matrix products, one process with one thread on every core, all at once.

Run: python peak.py prints what one process reaches.
"""

import subprocess
import sys
import time
from pathlib import Path

from peers import CORES

SIDE = 1024
SECONDS = 3.0


def measure() -> float:
    """Floating-point operations a second, a multiply-add counted as two, of all cores together, best of many each."""
    command = [sys.executable, str(Path(__file__))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(CORES)]
    return sum(float(process.communicate()[0]) for process in processes)


def of_one_process() -> float:
    """The best of as many products as fit into a few seconds, in one thread."""
    import torch  # noqa: PLC0415 -- not needed to ask for a measurement

    torch.set_num_threads(1)
    a, b, out = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE), torch.empty(SIDE, SIDE)
    end, best = time.perf_counter() + SECONDS, float("inf")
    while (began := time.perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best


if __name__ == "__main__":
    print(of_one_process())
