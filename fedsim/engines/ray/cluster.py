"""Being a driver of a Ray cluster for the time of a run: quietly, and without Ray's hold on signals."""

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import RayError

from fedsim.errors import RunError

KNOCK_S = 10.0  # a cluster must answer in so long


@contextmanager
def attached(address: str | None, own_cpus: int) -> Iterator[None]:
    """Start a Ray of our own, or attach to one; leave it as it was found.

    Args:
        address: see :func:`fedsim.engines.ray.ray`.
        own_cpus: of a Ray of our own.

    Raises:
        RunError: nothing to attach to, or this process is attached to something else already.
    """
    ours = not ray.is_initialized()
    if not ours and address != "auto":
        rule = "this process is attached to Ray already; use address: auto, or call ray.shutdown() first"
        raise RunError(f"engine.address: {rule}, got {address}")
    with _unheard():
        try:
            if ours:
                with _quietly():
                    _initialise(address, own_cpus)
            yield
        except RayError as error:
            raise RunError(f"Ray failed: {type(error).__name__}: {error}") from error
        finally:
            if ours:
                with _quietly():
                    ray.shutdown()


def cpus() -> int:
    """CPUs of the cluster, busy or not."""
    return int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


def free_cpus() -> int:
    """CPUs of the cluster that nobody has taken."""
    return int(ray.available_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


def _initialise(address: str | None, own_cpus: int) -> None:
    own: dict[str, Any] = {"num_cpus": own_cpus, "include_dashboard": False} if address is None else {}
    try:
        if address is not None:
            _knock(address)
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises many kinds
        lines = str(error).strip().splitlines()
        what = " ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))  # between them Ray puts a traceback of its own
        where = "start Ray" if address is None else f"attach to Ray at {address}"
        raise RunError(f"engine.address: cannot {where}: {type(error).__name__}: {what}") from error


def _knock(address: str) -> None:
    """See if anybody answers; where nobody does, Ray would go on trying for ten minutes.

    Raises:
        OSError: nobody does.
        ValueError: not an address.
    """
    named = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    known = named.removeprefix("ray://") if named.startswith("ray://") else canonicalize_bootstrap_address(named)
    host, _, port = str(known).rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Ray's warnings of its own future; and SIGTERM, which Ray takes to end the process, means what it did."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if here and before is not None:  # None: set by somebody else than Python
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _unheard() -> Iterator[None]:
    """Without what Ray prints of lost processes, from a thread of its own, into whatever is on the screen."""
    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before
