"""Last batches of a single example, which batch norm cannot be trained on."""

from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from fedsim.config.schema import Config
from fedsim.data.federated import FederatedData
from fedsim.errors import ConfigError
from fedsim.models.zoo import check_single
from fedsim.records import Indices
from fedsim.training.stopping import held_out


def check_last_batches(config: Config, data: FederatedData, built: nn.Module, validation: float) -> None:
    """Refuse a last batch of one example where the model cannot be trained on one; batch norm cannot."""
    batch_size = config.train.batch_size
    sizes = np.array([n - held_out(validation, n) for n in data.partition.sizes().tolist()])
    single = np.flatnonzero(_leaves_one(sizes, batch_size))
    if not len(single):
        return
    example = data.train.inputs[0]
    try:
        check_single(built, tuple(example.shape), data.num_classes, example, name=config.model.name)
    except ConfigError as error:
        more = f" (and {len(single) - 1} more)" if len(single) > 1 else ""
        reason = str(error).removeprefix("model.name: ")
        raise ConfigError(
            f"train.batch_size: {batch_size} leaves client {single[0]}{more} a last batch of one example, but "
            f"{reason}; {_remedy(config, sizes)}"
        ) from error


def _leaves_one(sizes: Indices, batch_size: int | Literal["all"]) -> npt.NDArray[np.bool_]:
    """Which clients have a last batch of exactly one example."""
    return np.equal(sizes if batch_size == "all" else (sizes - 1) % batch_size + 1, 1)


def _remedy(config: Config, sizes: Indices) -> str:
    """What helps against last batches of one example: another batch size, unless a client has no more than one."""
    if (sizes == 1).any():
        repaired = "min_examples" in config.data.split.params() and config.data.split.name != "file"
        key = " (data.split.min_examples)" if repaired else ""
        return f"each client needs at least two examples{key}"
    assert config.train.batch_size != "all"  # which leaves one only where a client has one
    larger = range(config.train.batch_size + 1, 2 * config.train.batch_size + 10)
    return f"{next((size for size in larger if not _leaves_one(sizes, size).any()), 'all')} would leave none"
