"""Everything that uses names of Flower's which are not public: one module for the server, one for the client.

They make rounds quick where Flower's own ways are slow, and they were made for one minor release. With any other, or
where a name is gone, ``fits`` says so and the supported ways are taken.
"""

import importlib
from importlib import metadata
from typing import Any

MADE_FOR = "1.41"


def fits(part: str) -> bool:
    """Whether the installed Flower is the one that a part was made for, with every name in it that the part uses.

    Args:
        part: "server" or "client", a module of this package; its ``NAMES`` are all it uses, "module:name.name".
    """
    release = metadata.version("flwr").split(".")
    if release[:2] != MADE_FOR.split("."):
        return False
    try:
        names = importlib.import_module(f"{__name__}.{part}").NAMES
    except (ImportError, AttributeError):
        return False
    return not missing(names)


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of the names "module:name.name" that are not there."""
    return [name for name in names if not _there(name)]


def _there(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True
