"""Who would hold what, without running anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.api.folders import folder_of
from fedsim.config import build
from fedsim.config import load as config_files
from fedsim.config.foreign import importable
from fedsim.data.partition_files import save as save_partition
from fedsim.recording import split_facts
from fedsim.records import Partition


@dataclass(frozen=True)
class Split:
    """Who would hold what. ``facts`` are those of split.json."""

    partition: Partition
    labels: Tensor
    facts: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Write it to a file for ``split: {name: file, path: ...}``."""
        save_partition(self.partition, self.labels, path)


def split(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    progress: build.Progress = build.silent,
) -> Split:
    """Load the data of a config and split it, without running anything."""
    with importable(folder_of(config)):
        data = build.federated_data(config_files.load(config, overrides), progress)
    return Split(data.partition, data.train.labels, split_facts(data))
