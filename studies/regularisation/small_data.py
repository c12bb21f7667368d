"""Real data, cut down: so few that a net learns them by heart, so small that hundreds of runs take minutes."""

from functools import cache

import torch.nn.functional as F
from torch import Tensor

from fedsim import rng
from fedsim.data.idx import fashion_mnist
from fedsim.data.text import shakespeare
from fedsim.records import Dataset, Examples

CLASSES = 10

_whole_fashion, _whole_shakespeare = cache(fashion_mnist), cache(shakespeare)


def fashion(*, train: int = 2000, test: int = 2000, label_noise: float = 0.0, key: int) -> Dataset:
    """Some pictures of Fashion-MNIST, 14 x 14 by averaging 2 x 2 pixels.

    Args:
        train, test: how many, of a random order.
        label_noise: share of training labels that are replaced by another class, all alike likely; in [0, 1).
        key: of the data; picks the examples and the wrong labels.
    """
    whole = _whole_fashion()
    assert whole.test is not None
    kept, held = _some(whole.train, train, rng.fold(key, "train")), _some(whole.test, test, rng.fold(key, "test"))
    wrong = rng.bernoulli(rng.fold(key, "wrong"), label_noise, train)
    by = 1 + (rng.uniform(rng.fold(key, "by"), train) * (CLASSES - 1)).long()
    labels = (kept.labels + by * wrong) % CLASSES
    return Dataset("small-fashion", _halved(kept, labels), _halved(held, held.labels), CLASSES)


def speeches(*, train: int = 300, test: int = 300, window: int = 40, key: int) -> Dataset:
    """Some windows of Shakespeare's plays, to guess each next character.

    Args:
        train, test: how many windows, of a random order.
        window: characters of each.
        key: of the data.
    """
    whole = _whole_shakespeare(window=window)
    assert whole.test is not None
    kept, held = _some(whole.train, train, rng.fold(key, "train")), _some(whole.test, test, rng.fold(key, "test"))
    return Dataset("small-shakespeare", kept, held, whole.num_classes)


def _some(examples: Examples, n: int, key: int) -> Examples:
    chosen: Tensor = rng.permutation(key, len(examples))[:n]
    return examples.take(chosen)


def _halved(examples: Examples, labels: Tensor) -> Examples:
    return Examples(F.avg_pool2d(examples.inputs, 2), labels)
