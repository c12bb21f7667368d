"""Where a run ran: versions, host, device, threads, git state."""

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "flwr", "scikit-learn", "safetensors", "pydantic")


def describe(engine: dict[str, Any]) -> dict[str, Any]:
    """What environment.json holds.

    Args:
        engine: what the engine says of itself.
    """
    return {
        "fedsim": _version("fedsim-flower"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "git": _git(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "engine": engine,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name; Linux alone tells it in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict[str, Any] | None:
    """Commit of the working folder, and whether it holds uncommitted changes; None outside a checkout."""
    try:
        commit = _git_says("rev-parse", "HEAD")
        return (
            {"commit": commit, "dirty": bool(_git_says("status", "--porcelain", "--untracked-files=no"))}
            if commit
            else None
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git_says(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
