"""The data and the split, written once as arrays, so that every runner trains on the same examples of the same clients.

Writing needs fedsim (it finds or downloads Fashion-MNIST); reading needs NumPy only. Run: python prepared.py
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from workloads import Workload

FILE = Path(__file__).parent / ".data" / "fashion-mnist.npz"
SPLIT_SEED = 20171  # of the order in which examples are dealt to clients


class Data(NamedTuple):
    """The examples of one workload; client k holds the k-th block of equal length of the training examples.

    x, x_test: float32 (n, *input_shape) in [0, 1]. y, y_test: int64 (n,).
    """

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    x_test: npt.NDArray[np.float32]
    y_test: npt.NDArray[np.int64]


def write() -> None:
    """Write images as bytes, labels, and the order in which training examples are dealt, if that is not done yet."""
    if FILE.exists():
        return
    from fedsim.data.datasets import DATASETS  # noqa: PLC0415 -- readers live where there is no fedsim

    found = DATASETS["fashion-mnist"]()
    arrays = {"order": np.random.default_rng(SPLIT_SEED).permutation(len(found.train))}
    for name, part in (("train", found.train), ("test", found.test)):
        arrays[f"x_{name}"] = (part.inputs * 255).round().byte().squeeze(1).numpy()
        arrays[f"y_{name}"] = part.labels.numpy()
    FILE.parent.mkdir(exist_ok=True)
    unfinished = FILE.with_name("unfinished.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(FILE)


def load(workload: Workload) -> Data:
    """The examples that a workload's clients hold, client after client, and the whole test set."""
    with np.load(FILE) as file:
        held = file["order"][: workload.clients * workload.examples]
        return Data(
            shaped(file["x_train"][held], workload.input_shape),
            file["y_train"][held],
            shaped(file["x_test"], workload.input_shape),
            file["y_test"],
        )


def shaped(images: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Images (n, 28, 28) as float32 (n, *shape): flat, or with zeros around them and the same in every channel."""
    pixels = images.astype(np.float32) / 255
    if len(shape) == 1:
        return pixels.reshape(len(pixels), *shape)
    channels, height, _ = shape
    border = (height - pixels.shape[1]) // 2
    padded = np.pad(pixels, ((0, 0), (border, border), (border, border)))
    return np.repeat(padded[:, None], channels, axis=1)


def block(workload: Workload, client: int) -> slice:
    """Where a client's examples lie."""
    return slice(client * workload.examples, (client + 1) * workload.examples)


def cohort(workload: Workload, number: int) -> list[int]:
    """Clients of a round, drawn without replacement; for runners that may choose them."""
    drawn = np.random.RandomState(number).permutation(workload.clients)[: workload.cohort]
    return sorted(drawn.tolist())


if __name__ == "__main__":
    write()
