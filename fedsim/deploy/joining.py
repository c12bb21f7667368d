"""From a config to a participant: a client loads the data that it holds, and nothing else of the federation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedsim.api import folders
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.deploy import settings
from fedsim.deploy.participation import Participant
from fedsim.deploy.states import States
from fedsim.errors import ConfigError, DataError
from fedsim.federation import Federation
from fedsim.records import Examples


def participant(
    config: Path,
    overrides: Mapping[str, Any],
    *,
    partition: int,
    own_data: bool,
    states: Path,
    say: Callable[[str], None],
    progress: build.Progress = build.silent,
) -> Participant:
    """The client that a config describes on this machine.

    Args:
        config: path of the YAML file.
        overrides: dotted key -> value.
        partition: number of the client, >= 0; without ``own_data`` it holds this part of the split.
        own_data: all examples of the config's dataset are this client's.
        states: folder for what it keeps between rounds.
        say: prints a line for a person.
        progress: called while data is downloaded.

    Raises:
        ConfigError, DataError: as for a run; or there is no such part.
    """
    if partition < 0:
        raise ConfigError(f"--partition: must be >= 0, got {partition}")
    with importable(folders.folder_of(config)):
        checked = config_files.load(config, overrides)
        federation, _ = build.federation(checked, progress)
    train, test = (_all if own_data else _part)(federation, partition)
    if not len(train):
        raise DataError(f"data: client {partition} has no examples to train on")
    own, compression = settings.shared(checked), federation.compression
    return Participant(partition, federation.work, train, test, own_data, own, States(states), say, compression)


def _all(federation: Federation, partition: int) -> tuple[Examples, Examples]:
    return federation.data.train, federation.data.test


def _part(federation: Federation, partition: int) -> tuple[Examples, Examples]:
    data = federation.data
    if partition >= data.num_clients:
        raise ConfigError(f"--partition: must be below data.clients ({data.num_clients}), got {partition}")
    held = torch.from_numpy(data.test_partition.client(partition))
    return data.client(partition), data.client_test.take(held)
