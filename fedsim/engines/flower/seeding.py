"""Global generators, seeded for the code of somebody else.

fedsim itself draws from keys, and touches no global generator. A Flower app draws from nothing else: strategies
sample nodes with ``random``, its noise comes from ``np.random``, and training draws from torch.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from fedsim.rng import torch_seeded


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed ``random``, ``np.random`` and torch's global generator of the CPU, and put them back at the end.

    Args:
        seed: in [0, 2^32); None leaves them alone.
    """
    if seed is None:
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        with torch_seeded(seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
