"""Local rules that actors find on the driver's sys.path: a plain module, as a user's would be."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import torch

from fedsim import params as p
from fedsim.training.local_rule import LocalRule

PATIENCE_S = 120


def init(params):
    return {"rounds": torch.zeros((), dtype=torch.int64), "drift": torch.zeros(3, 1, dtype=torch.float64)}


def correct(grads, local, broadcast, state):
    return p.scale(grads, 1.0 + 0.1 * state["rounds"].to(torch.float32))


def finish(local, broadcast, state, num_steps):
    moved = p.l2_norm(p.sub(local, broadcast.params))
    return {"rounds": state["rounds"] + 1, "drift": state["drift"] + moved * torch.tensor([[1.0], [-2.0], [0.5]])}


def drifting():
    """A rule with a state of several dtypes and shapes, which changes the gradients of the next round."""
    return LocalRule(init, correct, finish)


def halting(marker, parent=0):
    """The same rule, but in round 2 the first actor (whose parent this is) writes who it is, and waits to be killed.

    parent: process id of a node's raylet; 0 for any. Actors of other nodes wait until that one has got so far.
    """
    return LocalRule(init, correct, partial(_halt, marker=str(marker), parent=parent))


def _halt(local, broadcast, state, num_steps, *, marker, parent):
    if broadcast.round == 2:
        if parent in (0, os.getppid()) and not Path(marker).exists():
            Path(marker).write_text(str(os.getpid()))
            time.sleep(PATIENCE_S)
        _wait(lambda: Path(marker).exists())
    return finish(local, broadcast, state, num_steps)


def _wait(there):
    until = time.monotonic() + PATIENCE_S
    while not there() and time.monotonic() < until:
        time.sleep(0.01)


def deadly(folder):
    """A rule that ends every process that trains in round 2, which leaves a file of its number."""
    return LocalRule(init, partial(_die, folder=str(folder)), finish)


def _die(grads, local, broadcast, state, *, folder):
    if broadcast.round == 2:
        (Path(folder) / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return grads


def telling(folder, nodes):
    """The same rule; each process leaves a file named by its parent, its node's raylet, and waits for the others."""
    return LocalRule(init, correct, partial(_tell, folder=str(folder), nodes=nodes))


def _tell(local, broadcast, state, num_steps, *, folder, nodes):
    (Path(folder) / str(os.getppid())).touch()
    _wait(lambda: len(list(Path(folder).iterdir())) == nodes)
    return finish(local, broadcast, state, num_steps)


def raising():
    """A rule that cannot do what it is asked in round 2."""
    return LocalRule(init, _raise, finish)


def _raise(grads, local, broadcast, state):
    if broadcast.round == 2:
        raise ZeroDivisionError("of the rule")
    return grads
