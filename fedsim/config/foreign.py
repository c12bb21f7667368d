"""Somebody else's code: where ``package.module:name`` is looked for, and how it is imported."""

import contextlib
import hashlib
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedsim.config.spelling import did_you_mean


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let ``package.module:name`` find modules in the working folder and in ``folder``, as a script there would."""
    before = list(sys.path)
    sys.path[:0] = list(dict.fromkeys([os.getcwd(), str(folder.resolve())]))  # noqa: PTH109
    try:
        yield
    finally:
        sys.path[:] = before


def import_named(name: str) -> Any:
    """The object that ``package.module:name`` names.

    Raises:
        ValueError: it does not import, the module has no such name, or a module of the same name but from another file
            was imported before.
    """
    module, _, attribute = name.partition(":")
    importlib.invalidate_caches()  # a file may have been written since this process last looked
    _check_same_file(module.partition(".")[0])
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody else's module raises is for its author to read
        raise ValueError(f"cannot import {module!r}: {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        raise ValueError(f"module {module!r} has no {attribute!r}{did_you_mean(attribute, vars(found))}")
    factory = getattr(found, attribute)
    if not callable(factory):
        raise ValueError(f"must be a function or class, {name!r} is of type {type(factory).__name__}")
    return factory


def _check_same_file(top: str) -> None:
    """Python keeps the first module of a name. Another one meant now must not be mistaken for it."""
    loaded = getattr(sys.modules.get(top), "__file__", None)
    spec = importlib.machinery.PathFinder.find_spec(top) if loaded else None
    if loaded and spec and spec.origin and not Path(loaded).samefile(spec.origin):
        rule = f"{spec.origin} has the name of {loaded}, which this process has imported before"
        raise ValueError(f"cannot import {top!r}: {rule}; rename one, or run them in two processes")


def sources(names: Iterable[str]) -> dict[str, str]:
    """The sha256 of the file of each named module, so that it can be told when it changes. Not of what it imports.

    Args:
        names: ``package.module:name``, already imported.
    """
    modules = sorted({name.partition(":")[0] for name in names})
    files = {module: getattr(sys.modules.get(module), "__file__", None) for module in modules}
    return {module: hashlib.sha256(Path(file).read_bytes()).hexdigest() for module, file in files.items() if file}
