"""``fedsim client``: one client of a federation, on this machine."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsim.config import build
from fedsim.data.locations import cache_folder
from fedsim.deploy.address import Address
from fedsim.deploy.apps import CLIENT
from fedsim.deploy.certificates import ClientFiles, client_files
from fedsim.deploy.client import run_client
from fedsim.deploy.joining import participant
from fedsim.deploy.participation import client_app
from fedsim.deploy.refusals import Say
from fedsim.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Who this client is, and where its server is.

    certs: folder made by ``fedsim certs``, or the one in it that is this client's; None: no TLS and no keys.
    partition: number of the client. own_data: all data of the config is its own.
    wait_s: for the server, before giving up; None: for ever.
    state: folder for what is kept between rounds; None: in the user's cache, by server and client.
    stock: use nothing of Flower but its supported interfaces, which is slower.
    """

    server: Address
    certs: Path | None
    partition: int
    own_data: bool = False
    wait_s: float | None = None
    state: Path | None = None
    stock: bool = False


def join(
    config: Path,
    overrides: Mapping[str, Any],
    options: Options,
    say: Say,
    *,
    progress: build.Progress = build.silent,
) -> None:
    """Load the data, connect, and do what the server asks until it says that the run is over.

    Raises:
        ConfigError, DataError: the config, the data or the certificates are not as they must be.
        RunError: the server does not take this client, or did not come in ``wait_s``.
    """
    files = connecting_files(options)
    states = state_folder(options)
    torch.set_num_threads(1)  # like every engine: results do not depend on the number of cores
    partition, own_data = options.partition, options.own_data
    who = participant(
        config, overrides, partition=partition, own_data=own_data, states=states, say=say, progress=progress
    )
    given = {"config": str(config.resolve()), "overrides": dict(overrides), "states": str(states)}
    os.environ[CLIENT] = json.dumps({**given, "partition": partition, "own_data": own_data})
    say(f"client {who.client}: {len(who.train)} examples to train on, {len(who.test)} held out")
    run_client(
        client_app(lambda _: who),
        options.server,
        files,
        partition=options.partition,
        stock=options.stock,
        say=say,
        state=states,
        until=who.over,
        wait_s=options.wait_s,
    )


def state_folder(options: Options) -> Path:
    """Where this client keeps things between rounds."""
    if options.state is not None:
        return options.state.expanduser().resolve()
    name = hashlib.sha256(str(options.server).encode()).hexdigest()[:12]
    return cache_folder("clients") / f"{name}-{options.partition}"


def connecting_files(options: Options) -> ClientFiles | None:
    """What the client needs of the folder of certificates; None without one.

    Raises:
        ConfigError: there is none, for an address elsewhere.
    """
    if options.certs is not None:
        return client_files(options.certs, options.partition)
    if not options.server.is_loopback:
        rule = "without certificates the server must be at a loopback address"
        raise ConfigError(f"--server: {rule}, got {options.server}; certificates come from fedsim certs")
    return None
