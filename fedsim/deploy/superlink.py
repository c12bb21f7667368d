"""The server's side of Flower: a SuperLink, the clients' keys, the run, and the front door before it all."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from flwr.serverapp import Grid

from fedsim.deploy import interventions, sides, superlink_child
from fedsim.deploy.address import Address
from fedsim.deploy.certificates import ServerFiles, load_public
from fedsim.deploy.front_door import Door, front_door
from fedsim.deploy.listening import listeners
from fedsim.deploy.refusals import Say
from fedsim.deploy.superlink_child import Child
from fedsim.engines.flower.process import quiet_log
from fedsim.errors import DataError

COMPONENTS = {"serverapp": "fedsim.deploy.apps:server_app", "clientapp": "fedsim.deploy.apps:client_app"}

_APP = """[project]
name = "fedsim-run"
version = "1.0.0"
description = "Names the apps of fedsim, which is installed on every machine"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedsim"

[tool.flwr.app.components]
serverapp = "{serverapp}"
clientapp = "{clientapp}"

[tool.flwr.app.config]
"""
_README = "# fedsim\n\nThere is no code here: the apps are in the package fedsim.\n"


@dataclass
class Link:
    """Flower's side of a running server.

    nodes: client -> node id of its registered key; {} without certificates.
    address: where clients connect to.
    """

    nodes: Mapping[int, int]
    address: Address
    _child: Child
    _door: Door
    _opens: Callable[[Callable[[], None]], AbstractContextManager[Grid]]
    _grid: Grid | None = None

    @contextlib.contextmanager
    def grid(self) -> Iterator[Grid]:
        """Start the run, and be its server for as long as the context lasts; once per link.

        Raises:
            RunError: the run cannot be started, or Flower's own process for it failed.
        """
        with quiet_log(), self._opens(self.check) as grid:
            self._grid = grid
            try:
                yield grid
            finally:
                self._grid = None

    def online(self) -> set[int]:
        """Node ids that are online; to be asked while the grid is open."""
        if self._grid is None:
            raise ValueError("which nodes are online is known while the grid is open")
        return set(self._grid.get_node_ids())

    def check(self) -> None:
        """Complain if something that is needed has ended.

        Raises:
            RunError: the SuperLink or the front door has ended; with the SuperLink's last words.
        """
        self._child.check()
        self._door.check()


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def superlink(
    listen: Address,
    files: ServerFiles | None,
    *,
    stock: bool = False,
    say: Say = _print,
    log: Path | None = None,
    components: Mapping[str, str] = COMPONENTS,
) -> Iterator[Link]:
    """Start Flower's SuperLink, make the clients' keys known to it, and let clients in.

    Args:
        listen: where clients connect to; port 0 takes any free one.
        files: the server's certificate and the clients' keys; None: plain, and whoever comes is let in.
        stock: use nothing of Flower but its supported interfaces.
        say: prints a line for a person.
        log: file that the SuperLink's output is appended to; None: one that is thrown away.
        components: names of the apps, for Flower's own processes.

    Raises:
        ConfigError: nobody can listen there. DataError: a certificate or a key cannot be used.
        RunError: the SuperLink does not start.
    """
    keys = {} if files is None else _distinct(files.clients)
    app = {"pyproject.toml": _APP.format(**components).encode(), "README.md": _README.encode()}
    stock = stock or not _fits(say)
    with ExitStack() as stack:
        sockets = listeners(listen)  # a port in use is to be known at once; whoever comes before the end of this waits
        for one in sockets:
            stack.callback(one.close)
        home = Path(tempfile.mkdtemp(prefix="fedsim-"))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        stack.enter_context(_direct())
        side = stack.enter_context(sides.stock(home, app) if stock else sides.quick(app))
        output = home / "superlink.log" if log is None else log
        child = stack.enter_context(superlink_child.running(home, output, side.environment, side.isolation))
        nodes = side.register(child.address, keys)
        header = side.header if files is not None else None
        known = None if header is None else frozenset(map(header, keys.values()))
        door = stack.enter_context(
            front_door(listen, f"http://{child.address}", files, say, known=known, sockets=sockets)
        )
        yield Link(nodes, door.address, child, door, partial(side.opens, child.address))


def _fits(say: Say) -> bool:
    fits = interventions.fits("server")
    if not fits:
        found, made = metadata.version("flwr"), interventions.MADE_FOR
        say(f"warning: flwr {found} is not the {made} that the quick ways are for: as with --stock, which is slower")
    return fits


def _distinct(keys: Mapping[int, Path]) -> Mapping[int, Path]:
    owners: dict[object, Path] = {}
    for path in keys.values():
        other = owners.setdefault(load_public(path).public_numbers(), path)
        if other != path:
            raise DataError(f"{path}: is the same key as {other}; every client must have its own")
    return keys


@contextlib.contextmanager
def _direct() -> Iterator[None]:
    """Reach the SuperLink directly, whatever proxy the environment names: Flower's clients would ask it."""
    names = "no_proxy", "NO_PROXY"
    before = {name: os.environ.get(name) for name in names}
    listed = before["no_proxy"] or before["NO_PROXY"] or ""
    os.environ.update(dict.fromkeys(names, ",".join(filter(None, [listed, "127.0.0.1"]))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
