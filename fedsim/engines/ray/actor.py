"""What runs in the actors. Ray carries bytes and arrays only, so it need not understand what is in them."""

import platform
from importlib.metadata import version

import ray
import torch

from fedsim.engines.local.memory import Packed, packed, unpacked
from fedsim.engines.local.trainer import Trainer, trainer
from fedsim.engines.local.worker import answer as answered
from fedsim.environment import cpu
from fedsim.errors import RunError


def begin(given: Packed) -> tuple[Trainer | None, Packed]:
    """Get ready.

    Args:
        given: job, plan, and whether the model mixes examples.

    Returns:
        The trainer, and for the driver: the node's address, its :func:`versions` and its processor, or a RunError.
    """
    torch.set_num_threads(1)
    node = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    try:
        job, plan, mixes = unpacked(given, copy=False)
        own = trainer(job, plan, mixes=mixes)
    except Exception as error:
        return None, packed(RunError(f"node {node} cannot take the job: {type(error).__name__}: {error}"))
    return own, packed((node, versions(), cpu()))


def answer(own: Trainer | None, sent: Packed, order: Packed) -> Packed:
    """Do a task.

    Args:
        own: from :func:`begin`.
        sent: the broadcast.
        order: task, states of its clients, key of the round.

    Returns:
        What :func:`fedsim.engines.local.worker.answer` says.
    """
    assert own is not None  # a crew asks nothing of an actor that could not get ready
    task, states, key = unpacked(order, copy=True)
    return packed(answered(own, unpacked(sent, copy=False), task, states, key))


def versions() -> dict[str, str]:
    """What must be the same everywhere."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"fedsim": version("fedsim-flower"), "python": python, "torch": torch.__version__}
